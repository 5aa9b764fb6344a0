"""The multiplexed connection: all commands of one process and loop over one socket, which it keeps connected.

A command goes from `RedisConnection.post` to the `Session` of the current socket, and leaves in the write at the end of
the tick (`WriteTick`). While there is no session, or the server refuses writes, it waits (`WaitingCommands`).

Cancelling a command drops its future and never its read. A blocking read (``XREAD BLOCK``) delays every command behind
it, so it needs a `RedisConnection` of its own.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from time import monotonic
from typing import Any

import hiredis
from redis import exceptions as redis_errors

from ..errors import BrokerUnavailable, ConfigError, StringTooLong
from . import outages
from .clock import Clock
from .commands import Arg, Command, Packed, Script, Then, head_of, pack, pack_in_pieces, pieces_of
from .dial import WrongServer
from .error_replies import MEMORY, NOT_PRIMARY, TEMPORARY, ErrorReply, StringLimit, error_of
from .handshake import Handshake, end_of_cancelled, is_permanent, reason_of, wait_for
from .reconnect_hooks import Hook, ReconnectHooks
from .session import STALL_S, Session
from .url import shown_url
from .waiting_commands import WaitingCommands
from .write_probe import WRITE_PROBE, WriteProbe
from .write_tick import WriteTick, nowhere

log = logging.getLogger(__name__)

_BACKOFF_S = (0.02, 1.0)
"""First and longest pause between attempts to connect."""
_random = random.Random()
"""A generator apart from Python's global one: processes that seed that one alike would all reconnect at once."""


class FateUnknown(BrokerUnavailable):
    """The connection broke between a command and its reply: the server may have carried it out, or not."""


class RedisConnection:
    """One multiplexed connection of one event loop.

    While it is open it reconnects by itself, with backoff. A command that was sent and not answered when the connection
    broke is sent again if it was given ``repeat=True``, and fails with `FateUnknown` otherwise. A command that the
    server refuses for a temporary reason (`error_replies`) is sent again with backoff. If the server is not the
    primary, the connection closes and resolves the address anew.

    In the first ``patience_s`` seconds of an outage commands wait, whether the server is away or refuses writes. Then
    the waiting commands fail with `BrokerUnavailable`, and later ones fail at once, until the outage ends. A command
    with ``patient=True`` waits until `close`, in order with the other patient ones. A command with ``prompt=True`` does
    not wait for a server that refuses it.

    Args:
        url: of the server.
        name: the client name that ``CLIENT LIST`` shows.
        patience_s: how long `open`, and commands in an outage, wait.
        probes: find out every second whether the server accepts writes. Not needed where the owner sends a write every
            few seconds anyway.
        stall_s: a server that owes a reply and sends nothing for this long counts as dead.

    Every method except `now_ms` must be called from the loop that called `open`. When that loop ends, so does the
    connection.

    Raises:
        TypeError, ConfigError: ``url`` is not a Redis URL, or has a wrong option.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str = "penstock",
        patience_s: float = 5.0,
        probes: bool = True,
        stall_s: float = STALL_S,
    ) -> None:
        self.url, self.patience_s = url, patience_s
        self._name, self._probes, self._stall_s = name, probes, stall_s
        self._handshake = Handshake(url, name)
        self._shown_url = shown_url(url)
        self._clock = Clock()
        self.now_ms = self._clock.now_ms
        """Returns Unix time by the broker's clock, in milliseconds. Any thread may call it.

        The clock's own method, as each request asks several times.
        """
        self._write_tick = WriteTick()
        self._waiting = WaitingCommands(self._fail)
        self._write_probe = WriteProbe(self._enqueue, self._on_writes_accepted)
        self._hooks = ReconnectHooks(name, lambda: self.connected and not self._closed)
        self._string_limit = StringLimit()
        self._session: Session | None = None
        """The current socket; None while there is no connection."""
        self.reconnects = 0
        """How often it has connected again."""
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._reason = "it does not answer"
        """Why commands fail while there is no connection or writes are refused."""

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """The connection's event loop, looked up once: up to Python 3.11 each lookup is a system call."""
        return asyncio.get_running_loop()

    @property
    def connected(self) -> bool:
        return self._session is not None

    @property
    def refuses_writes(self) -> bool:
        """Whether the server answers but refuses writes."""
        return bool(self._write_probe.refusal)

    @property
    def outage_s(self) -> float:
        """Seconds for which the server has been away or has refused writes; 0 if it is connected and accepts them."""
        return self._waiting.outage_s

    @property
    def has_waiting_commands(self) -> bool:
        """Whether any command waits: refused, lost with the connection, or not sent because there is none."""
        return self._waiting.any

    @property
    def max_string_bytes(self) -> int:
        """The largest known number of bytes that the server accepts as one string; see `StringLimit`."""
        return self._string_limit.largest

    def on_reconnect(self, hook: Hook) -> None:
        """Run ``hook`` in a task after each reconnect. A hook that fails with `BrokerUnavailable` runs again."""
        self._hooks.add(hook)

    async def open(self) -> RedisConnection:
        """Connect, and stay connected until `close`.

        Raises:
            BrokerUnavailable: the server did not answer within ``patience_s``, or rejected the login or the TLS
                handshake; the message has the reason.
            ConfigError: the server cannot be a broker: it is a node of a cluster, or a sentinel.
        """
        opened: asyncio.Future[None] = self._loop.create_future()
        self._waiting.begin_outage(self.patience_s)
        self._task = self._loop.create_task(self._run(opened), name=f"broker connection {self._name}")
        try:
            await wait_for(self.patience_s, opened)
        except asyncio.TimeoutError:
            error = self._unavailable()
            await self.close()
            raise error from None
        except BaseException:
            await self.close()
            raise
        return self

    async def close(self) -> None:
        """Close the connection. Commands without a reply fail with `BrokerUnavailable`."""
        if not self._closed:
            self._write_tick.end()
            self._closed, self._reason = True, "the connection was closed"
            if self._task is not None:
                self._task.cancel()
        if self._task is not None:
            await end_of_cancelled(self._task)
        self._fail_all()  # if the task was cancelled before it began
        await self._hooks.cancel()

    def reconnect(self, reason: str) -> None:
        """Close the socket and connect again. Without a socket it has no effect: the connection does so anyway."""
        if self._session is not None:
            self._session.abort(reason)

    async def wait_for_patient(self, timeout_s: float) -> None:
        """Return when the server has accepted all waiting patient commands, or after ``timeout_s`` seconds."""
        if self._waiting.any and not self._closed:
            last = self.run_script(WRITE_PROBE, [], [], repeat=True, patient=True)
            await asyncio.wait([last], timeout=max(0.0, timeout_s))
            if not last.cancel() and not last.cancelled():
                last.exception()  # the connection was closed

    def post(
        self,
        then: Then,
        *args: Arg,
        repeat: bool = False,
        patient: bool = False,
        prompt: bool = False,
        bulky: bool = False,
        bulky_reply: bool = False,
        needs_memory: bool = False,
    ) -> None:
        """Send a command in this tick's write.

        Args:
            then: called with the reply or an exception, as soon as it is read.
            args: the command's name and its arguments.
            repeat: the command may be carried out twice, so it is sent again after a lost connection.
            patient: wait without a time limit; see the class.
            prompt: do not wait for a server that refuses the command; see the class.
            bulky: do not copy arguments of more than ``COPIED_BYTES``.
            bulky_reply: the reply may be a string of that size; read it straight into its final buffer.
            needs_memory: fail with `BrokerFull` where a patient command would wait for memory.
        """
        packed = pack_in_pieces(args) if bulky else pack(args)
        self._enqueue(Command(packed, then, repeat, None, patient, prompt, bulky_reply, needs_memory))

    def send(
        self,
        *args: Arg,
        repeat: bool = False,
        patient: bool = False,
        prompt: bool = False,
        bulky: bool = False,
        bulky_reply: bool = False,
    ) -> asyncio.Future[Any]:
        """Send a command, as `post` does, and return the future of its reply.

        Raises (through the future):
            BrokerUnavailable: see the class.
            BrokerRefused: the server answered with an error.
        """
        future: asyncio.Future[Any] = self._loop.create_future()
        then = partial(_resolve, future)
        self.post(then, *args, repeat=repeat, patient=patient, prompt=prompt, bulky=bulky, bulky_reply=bulky_reply)
        return future

    def post_script(
        self,
        then: Then,
        script: Script,
        keys: Sequence[str],
        args: Sequence[Arg],
        *,
        repeat: bool = False,
        patient: bool = False,
        prompt: bool = False,
        bulky: bool = False,
    ) -> None:
        """Run ``script`` with ``keys`` and ``args``; options as of `post`."""
        operands: tuple[Arg, ...] = (len(keys), *keys, *args)
        packing = pack_in_pieces if bulky else pack

        def pack_whole() -> Packed:
            return packing(("EVAL", script.text, *operands))

        if self._session is None:
            packed = pack_whole()
        elif script.digest in self._session.loaded_scripts:
            packed = packing(("EVALSHA", script.digest, *operands))
        else:
            packed = pack_whole()
            self._session.loaded_scripts.add(script.digest)
        self._enqueue(Command(packed, then, repeat, pack_whole, patient, prompt))

    def run_script(
        self,
        script: Script,
        keys: Sequence[str],
        args: Sequence[Arg],
        *,
        repeat: bool = False,
        patient: bool = False,
        prompt: bool = False,
    ) -> asyncio.Future[Any]:
        """Run ``script`` with ``keys`` and ``args`` and return the future of its reply; errors as of `send`."""
        future: asyncio.Future[Any] = self._loop.create_future()
        then = partial(_resolve, future)
        self.post_script(then, script, keys, args, repeat=repeat, patient=patient, prompt=prompt)
        return future

    def join_write(self, fill: Callable[[], None]) -> None:
        """Call ``fill`` once, just before this tick's write, so that it can add the commands of its owner."""
        self._write_tick.join(fill)

    def flush_if_idle(self) -> None:
        """Write now instead of at the end of the tick, if the server owes no reply.

        For callers that expect no other command in this tick. It saved 8 % of the time of a single request, but under
        load two writes instead of one cost 7 %.
        """
        if self._session is None or self._session.is_idle:
            self._write_tick.end()

    # -- sending

    def _enqueue(self, command: Command) -> None:
        session = self._session
        if session is None or self._waiting:
            if self._closed:
                self._fail(command)
                return
            if session is None or command.patient:
                self._waiting.add_unsent(command)
                return
        # Four commands are sent for a request, so this is not a call of the session.
        session.unanswered.append(command)
        session.outgoing.append(command.packed)
        if command.bulky_reply or type(command.packed) is not bytes:
            session.expect_bulky(command)
        if not self._write_tick.is_scheduled:
            self._write_tick.schedule()

    def _send_waiting(self) -> None:
        for command in self._waiting.pop_all():
            if command.pack_whole is not None:
                command.packed = command.pack_whole()  # this server may not have its script
            self._enqueue(command)

    # -- error replies

    def _on_error_reply(self, command: Command, reply: ErrorReply) -> None:
        """Send the command again, keep it until the server accepts it, or fail it."""
        if reply.lacks_script and command.pack_whole is not None:
            # The scripts were flushed. The commands sent behind this one are carried out before it.
            command.packed = command.pack_whole()
            self._enqueue(command)
            return
        code = reply.code
        if code in NOT_PRIMARY:
            self._write_probe.cancel()
            if self._session is not None:
                self._session.abort(reply.message)
            self._waiting.add_sent([command])
        elif code in TEMPORARY and (code != MEMORY or (command.patient and not command.needs_memory)):
            self._begin_refusal(reply.message)
            if command.prompt:
                self._fail(command)
            else:
                self._waiting.add_sent([command])
        else:
            error = error_of(reply.message, head_of(command.packed), self.url)
            if type(error) is StringTooLong:
                self._string_limit.refused(max(map(len, pieces_of(command.packed))))
            command.complete(error)

    def _begin_refusal(self, message: str) -> None:
        """Keep refused commands until a probe finds that the server accepts writes again."""
        if not self._write_probe.refusal:
            problem = (
                f"the broker at {self._shown_url} refuses writes: {message} "
                "(accepted requests and replies are kept and sent again)"
            )
            outages.report_began(self._shown_url, self, problem)
            self._waiting.begin_outage(self.patience_s)
        self._reason = f"it refuses writes: {message}"
        self._write_probe.refused(message)

    def _on_writes_accepted(self) -> None:
        self._write_probe.accepted()
        self._waiting.end_outage()
        outages.report_ended(self._shown_url, self)
        self._send_waiting()

    def _fail(self, command: Command) -> None:
        command.complete(self._unavailable())

    def _unavailable(self) -> BrokerUnavailable:
        return BrokerUnavailable(self._shown_url, self._reason)

    # -- staying connected

    async def _run(self, opened: asyncio.Future[None]) -> None:
        try:
            await self._stay_connected(opened)
        except GeneratorExit:
            raise  # the loop is gone, so nothing can be awaited
        except BaseException:
            # Also without a call of `close`: `asyncio.run` cancels the remaining tasks at its end.
            await self._shut_down(opened)
            raise
        await self._shut_down(opened)

    async def _stay_connected(self, opened: asyncio.Future[None]) -> None:
        """Connect whenever there is no connection. Returns if the first attempt fails for a permanent reason."""
        backoff_s = _BACKOFF_S[0]
        while not self._closed:
            try:
                session = await self._connect()
                backoff_s = _BACKOFF_S[0]
                if opened.done():
                    self.reconnects += 1
                    self._hooks.run()
                else:
                    opened.set_result(None)
                await session.ended
                self._reason = "the server closed the connection"
            except hiredis.ProtocolError as e:
                self._reason = f"it does not use the Redis protocol: {e}"
            except (OSError, redis_errors.RedisError, asyncio.TimeoutError, UnicodeError) as e:
                self._reason = reason_of(e)
                if isinstance(e, WrongServer) and not opened.done():
                    opened.set_exception(ConfigError(f"{self._shown_url} cannot be the broker: {e}"))
                    return
                if is_permanent(e) and not opened.done():
                    return  # waiting does not correct a password or a certificate
            except Exception as e:
                log.exception("the connection to the broker failed unexpectedly")
                self._reason = f"{type(e).__name__}: {e}"
            if self._session is not None:
                self._reason = self._session.abort_reason or self._reason
                outages.report_began(self._shown_url, self, f"lost the broker at {self._shown_url}: {self._reason}")
            self._waiting.begin_outage(self.patience_s)
            self._waiting.add_sent(self._end_session())  # behind the commands that were refused before them
            await self._handshake.disconnect(wait=False)
            await asyncio.sleep(backoff_s * _random.uniform(0.5, 1.0))  # jitter: a thousand clients may reconnect
            backoff_s = min(2 * backoff_s, _BACKOFF_S[1])

    async def _connect(self) -> Session:
        transport, refusal = await self._handshake.connect(self._clock)
        self._session = Session(transport, self._on_error_reply, self._on_beat, self._stall_s)
        self._write_tick.write_to(self._session.write)
        self._handshake.watch_primary(self._session.abort)
        if refusal:
            self._begin_refusal(refusal)
            self._send_waiting()
        else:
            self._on_writes_accepted()
        return self._session

    def _on_beat(self) -> None:
        if self._clock.is_stale():
            self.post(partial(self._clock.update, monotonic()), "TIME", repeat=True)
        if self._probes:
            self._write_probe.probe()

    def _end_session(self) -> list[Command]:
        """Return the unanswered commands that may be sent again; fail those that the server may have carried out."""
        self._write_probe.cancel()
        if self._session is None:
            return []
        again, unknown = self._session.end()
        self._session = None
        self._write_tick.write_to(nowhere)
        for command in unknown:
            command.complete(FateUnknown(self._shown_url, self._reason))
        return again

    def _fail_all(self) -> None:
        """End the session, and fail all commands."""
        self._waiting.end_outage()
        again = self._end_session()
        for command in (*self._waiting.pop_all(), *again):
            self._fail(command)

    async def _shut_down(self, opened: asyncio.Future[None]) -> None:
        self._closed = True
        self._fail_all()
        outages.report_ended(self._shown_url, self, closing=True)
        if not opened.done():
            opened.set_exception(self._unavailable())
        await self._handshake.disconnect(wait=True)


def _resolve(future: asyncio.Future[Any], reply: Any) -> None:
    if future.done():
        return  # the caller was cancelled
    if isinstance(reply, Exception):
        future.set_exception(reply)
    else:
        future.set_result(reply)
