"""The multiplexed connection: all commands of one process and loop over one socket.

redis-py's ``Connection`` connects (`dial`: URL, TLS, AUTH, client name); reading (`resp_reader`) and writing are done
here. Replies are matched to commands by order. Cancelling a command drops its future and never its read, so that its
reply cannot reach another command. Commands of one tick of the loop leave in one write.

A blocking read (``XREAD BLOCK``) delays every command behind it, so it needs a `RedisConnection` of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from time import monotonic
from typing import Any, TypeVar, cast

import hiredis
from redis import exceptions as redis_errors

from ..errors import BrokerUnavailable, StringTooLong
from ..wire._fields import LARGEST
from . import outages
from .clock import Clock
from .commands import Arg, Command, Packed, Script, Then, head_of, pack, pack_in_pieces, pieces_of
from .dial import CONNECT_S, ErrorReply, error_of, is_permanent, new_connection, reason_of
from .refusals import MEMORY, NOT_PRIMARY, TEMPORARY, WRITE_PROBE, code_of
from .resp_reader import RespReader
from .url import shown_url
from .waiting_commands import WaitingCommands

T = TypeVar("T")

log = logging.getLogger(__name__)

BLOCK_MS = 2_000
"""How long a blocking read waits at the server. Shorter than `STALL_S`, so that silence means a dead server."""
STALL_S = 6.0
"""A server that owes a reply and sends nothing for this long counts as dead."""
_BEAT_S = 1.0
"""Seconds between probes for whether the server accepts writes, which also show whether it answers at all."""
_BACKOFF_S = (0.02, 1.0)
"""First and longest pause between attempts to connect."""
_REFUSED_BACKOFF_S = (0.05, 0.5)
"""First and longest pause between probes of a server that refuses writes."""
_SAME_REFUSAL_S = 1.0
"""Writes that are refused sooner than this after they were accepted again continue the backoff of the last refusal."""
_HOOK_RETRY_S = 0.5
_TOO_LONG_TTL_S = 60.0
"""How long the length of a string that the server refused counts as too long."""
_random = random.Random()
"""A generator apart from Python's global one: processes that seed that one alike would all reconnect at once."""
assert STALL_S > BLOCK_MS / 1000 + 2 * _BEAT_S, "a quiet blocking read must not look like a dead server"


class FateUnknown(BrokerUnavailable):
    """The connection broke between a command and its reply: the server may have carried it out, or not."""


class RedisConnection:
    """One multiplexed connection of one event loop.

    While it is open it reconnects by itself, with backoff. A command that was sent and not answered when the connection
    broke is sent again if it was given ``repeat=True``, and fails with `FateUnknown` otherwise. A command that the
    server refuses for a temporary reason (`refusals`) is sent again with backoff. If the server is not the primary, the
    connection closes and resolves the address anew.

    In the first ``patience_s`` seconds of an outage commands wait, whether the server is away or refuses writes. Then
    the waiting commands fail with `BrokerUnavailable`, and later ones fail at once, until the outage ends. A command
    with ``patient=True`` waits until `close`, in order with the other patient ones. A command with ``prompt=True`` does
    not wait for a server that refuses it.

    Args:
        name: the client name that ``CLIENT LIST`` shows.
        patience_s: how long `open`, and commands in an outage, wait.

    Every method must be called from the loop that called ``open``. When that loop ends, so does the connection.
    """

    def __init__(self, url: str, *, name: str = "penstock", patience_s: float = 5.0) -> None:
        self.url, self.patience_s = url, patience_s
        self._name = name
        self._redis = new_connection(url, name)
        self._shown_url = shown_url(url)
        self._loop: asyncio.AbstractEventLoop = cast(Any, None)
        self._writer: asyncio.StreamWriter | None = None
        self._reader: RespReader | None = None
        self._task: asyncio.Task[None] | None = None
        self._opened: asyncio.Future[None] | None = None
        self._loaded_scripts: set[str] = set()
        """Digests of the scripts that this connection has sent whole, for ``EVALSHA``."""
        self._outgoing: list[Packed] = []
        self._has_pieces = False
        """Whether any of ``_outgoing`` is packed in pieces."""
        self._before_flush: list[Callable[[], None]] = []
        self._flush_due = False
        self._sent: deque[Command] = deque()
        self._waiting = WaitingCommands(self._fail)
        self._refusal = ""
        """The error reply with which the server refuses writes; empty while it accepts them."""
        self._accepted_at_s = -math.inf
        self._refused_backoff_s = _REFUSED_BACKOFF_S[0]
        self._is_probing = False
        self._probe_timer: asyncio.TimerHandle | None = None
        self._hooks: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self._hook_tasks: set[asyncio.Task[None]] = set()
        self._beat_timer: asyncio.TimerHandle | None = None
        self._beat_due_s = 0.0
        self._abort_reason = ""
        """Why this side closed the current or last socket; empty if the server closed it."""
        self._last_read_s = 0.0
        self._clock = Clock()
        self.now_ms = self._clock.now_ms
        """`Clock.now_ms`, which any thread may call."""
        self._too_long_bytes, self._too_long_at_s = 0, -math.inf
        self._closed = False
        self._reason = "it does not answer"

    @property
    def connected(self) -> bool:
        return self._writer is not None

    @property
    def refuses_writes(self) -> bool:
        """Whether the server answers but refuses writes."""
        return bool(self._refusal)

    @property
    def keeps_commands(self) -> bool:
        """Whether any command waits: refused, lost with the connection, or not sent because there is none."""
        return self._waiting.any

    @property
    def longest(self) -> int:
        """The largest known number of bytes that the server accepts as one string.

        A server with a lower ``proto-max-bulk-len`` refuses a longer string and closes the connection. Other commands
        survive that, as they survive any lost connection, but it should not happen for each long string. The limit that
        was found is forgotten after a minute, as the server's setting may have changed.
        """
        known = self._loop.time() - self._too_long_at_s < _TOO_LONG_TTL_S
        return self._too_long_bytes - 1 if known else LARGEST

    def on_reconnect(self, hook: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run ``hook`` in a task after each reconnect. A hook that fails with `BrokerUnavailable` runs again."""
        self._hooks.append(hook)

    async def open(self) -> RedisConnection:
        """Connect, and stay connected until `close`.

        Raises:
            BrokerUnavailable: the server did not answer within ``patience_s``, or rejected the login or the TLS
                handshake; the message has the reason.
        """
        self._loop = asyncio.get_running_loop()
        self._opened = self._loop.create_future()
        self._waiting.begin_outage(self.patience_s)
        self._task = self._loop.create_task(self._run(), name=f"broker connection {self._name}")
        try:
            await _wait_for(self.patience_s, self._opened)
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
            self._flush()
            self._closed, self._reason = True, "the connection was closed"
            if self._task is not None:
                self._task.cancel()
        if self._task is not None:
            await asyncio.wait([self._task])
        self._requeue_unanswered(final=True)  # if the task was cancelled before it began
        hooks = self._hook_tasks - {asyncio.current_task()}
        for task in hooks:
            task.cancel()
        if hooks:
            await asyncio.wait(hooks)

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

        if script.digest in self._loaded_scripts:
            packed = packing(("EVALSHA", script.digest, *operands))
        else:
            packed = pack_whole()
            if self._writer is not None:
                self._loaded_scripts.add(script.digest)
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

    # -- writing

    def _enqueue(self, command: Command) -> None:
        if self._writer is None or self._waiting:
            if self._closed:
                command.then(self._unavailable())
                return
            if self._writer is None or command.patient:
                self._waiting.add_unsent(command)
                return
        self._sent.append(command)
        self._outgoing.append(command.packed)
        if type(command.packed) is not bytes:
            self._has_pieces = True
        if command.bulky_reply:
            assert self._reader is not None
            self._reader.bulky += 1
        if not self._flush_due:
            self._schedule_flush()

    def join_write(self, fill: Callable[[], None]) -> None:
        """Call ``fill`` once, just before this tick's write, so that it can post what its owner has gathered."""
        self._before_flush.append(fill)
        if not self._flush_due:
            self._schedule_flush()

    def hurry(self) -> None:
        """Write now instead of at the end of the tick, if no sent command waits for its reply.

        For callers that expect no other command in this tick: it took 8 % off the time of a request that is alone, but
        under load two writes instead of one cost 7 %.
        """
        if len(self._sent) == len(self._outgoing):
            self._flush()

    def _schedule_flush(self) -> None:
        # One write per tick instead of one per command: 46 instead of 58 us of CPU per request in a proxy.
        self._flush_due = True
        self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        if self._before_flush:
            fills, self._before_flush = self._before_flush, []
            for fill in fills:
                try:
                    fill()
                except Exception:
                    log.exception("cannot post the gathered commands")
        self._flush_due = False
        if self._writer is not None and self._outgoing:
            if self._has_pieces:
                self._has_pieces = False
                # uvloop passes the pieces to the kernel without joining them.
                self._writer.writelines([piece for packed in self._outgoing for piece in pieces_of(packed)])
            else:
                self._writer.write(b"".join(cast("list[bytes]", self._outgoing)))
            self._outgoing.clear()

    # -- connecting and reading

    async def _run(self) -> None:
        try:
            await self._stay_connected()
        except GeneratorExit:
            raise  # the loop is gone, so nothing can be awaited
        except BaseException:
            # Also without a call of `close`: `asyncio.run` cancels the remaining tasks at its end.
            await self._shut_down()
            raise
        await self._shut_down()

    async def _shut_down(self) -> None:
        self._closed = True
        self._requeue_unanswered(final=True)
        outages.report_ended(self._shown_url, self, closing=True)
        if self._opened is not None and not self._opened.done():
            self._opened.set_exception(self._unavailable())
        await self._disconnect(wait=True)

    async def _stay_connected(self) -> None:
        backoff_s = _BACKOFF_S[0]
        while not self._closed:
            self._abort_reason = ""
            try:
                reader = await self._connect()
                backoff_s = _BACKOFF_S[0]
                await reader.ended
                self._reason = self._abort_reason or "the server closed the connection"
            except hiredis.ProtocolError as e:
                self._reason = f"it does not use the Redis protocol: {e}"
            except (OSError, redis_errors.RedisError, asyncio.TimeoutError, UnicodeError) as e:
                self._reason = self._abort_reason or reason_of(e)
                if is_permanent(e) and self._opened is not None and not self._opened.done():
                    return  # waiting does not correct a password or a certificate
            except Exception as e:
                log.exception("the connection to the broker failed unexpectedly")
                self._reason = f"{type(e).__name__}: {e}"
            if self._writer is not None:
                outages.report_began(self._shown_url, self, f"lost the broker at {self._shown_url}: {self._reason}")
            self._requeue_unanswered()
            await self._disconnect()
            await asyncio.sleep(backoff_s * _random.uniform(0.5, 1.0))  # jitter: a thousand clients may reconnect
            backoff_s = min(2 * backoff_s, _BACKOFF_S[1])

    async def _connect(self) -> RespReader:
        await _wait_for(CONNECT_S, cast("Coroutine[Any, Any, None]", self._redis.connect()))  # type: ignore[no-untyped-call]
        # A server that loads its append-only file answers TIME, but not PING.
        await self._execute("PING")
        refusal = await self._refusal_of_writes()
        await self._clock.read(partial(self._execute, "TIME"))
        writer = self._redis._writer  # pyright: ignore[reportPrivateUsage]
        assert writer is not None
        self._writer = writer
        transport = cast(asyncio.Transport, writer.transport)
        self._reader = RespReader(transport, self._on_data, self._on_reply, self._is_bulky_next, ErrorReply)
        self._last_read_s = self._loop.time()
        self._loaded_scripts.clear()
        if refusal:
            self._begin_refusal(refusal)
        else:
            self._accept_writes()
        self._send_waiting()
        self._schedule_beat()
        if self._opened is not None and not self._opened.done():
            self._opened.set_result(None)
        else:
            for hook in self._hooks:
                self._run_hook(hook)
        return self._reader

    async def _refusal_of_writes(self) -> str:
        """Return the temporary error with which the server refuses writes, or "". Raises: the server is no primary."""
        try:
            await self._execute("EVAL", WRITE_PROBE.text, "0")
        except redis_errors.ResponseError as e:
            code = code_of(e)
            if code in NOT_PRIMARY:
                raise
            if code in TEMPORARY:
                return str(e)
        return ""  # a user without the right to run scripts gets that error from the first script it needs

    def _run_hook(self, hook: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self._closed or self._writer is None:
            return  # the next reconnect runs it
        task = self._loop.create_task(hook(), name=f"after reconnecting {self._name}")
        self._hook_tasks.add(task)
        task.add_done_callback(partial(self._hook_done, hook))

    def _hook_done(self, hook: Callable[[], Coroutine[Any, Any, None]], task: asyncio.Task[None]) -> None:
        self._hook_tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, BrokerUnavailable):
            # The server is unreachable again, or refuses a command of the hook.
            log.debug("after reconnecting: %s", error)
            self._loop.call_later(_HOOK_RETRY_S, self._run_hook, hook)
        else:
            log.error("after reconnecting: %s", error, exc_info=error)

    async def _execute(self, *args: str) -> Any:
        await _wait_for(CONNECT_S, self._redis.send_command(*args))
        return await _wait_for(CONNECT_S, self._redis.read_response())  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]

    def _on_data(self) -> None:
        self._last_read_s = self._loop.time()

    def _is_bulky_next(self) -> bool:
        return self._sent[0].bulky_reply

    def _on_reply(self, reply: Any) -> None:
        command = self._sent.popleft()
        if command.bulky_reply:
            assert self._reader is not None
            self._reader.bulky -= 1
        if type(reply) is ErrorReply:
            reply = self._handle_error_reply(command, reply)
            if reply is None:
                return
        try:
            command.then(reply)
        except Exception:
            log.exception("a reply's continuation failed")

    def _handle_error_reply(self, command: Command, refusal: ErrorReply) -> Exception | None:
        """Return the error with which the command fails; None if it is sent again."""
        if refusal.lacks_script and command.retry is not None:
            # The scripts were flushed. The commands sent behind this one are carried out before it.
            command.packed = command.retry()
            self._enqueue(command)
            return None
        code = refusal.code
        if code in NOT_PRIMARY:
            self._abort(refusal.message)
            self._waiting.add_sent([command])
            return None
        if code in TEMPORARY and (code != MEMORY or (command.patient and not command.needs_memory)):
            self._begin_refusal(refusal.message)
            if command.prompt:
                return self._unavailable()
            self._waiting.add_sent([command])
            return None
        error = error_of(refusal.message, head_of(command.packed), self.url)
        if type(error) is StringTooLong:
            self._too_long_bytes = max(map(len, pieces_of(command.packed)))
            self._too_long_at_s = self._loop.time()
        return error

    def _abort(self, reason: str) -> None:
        """Close the socket; `_stay_connected` then connects again."""
        if self._writer is not None and not self._abort_reason:
            self._abort_reason = reason
            self._writer.transport.abort()  # ends the read, and with it `RespReader.ended`

    async def _disconnect(self, *, wait: bool = False) -> None:
        self._writer = None
        if self._reader is not None:
            self._reader.close()
        if self._beat_timer is not None:
            self._beat_timer.cancel()
            self._beat_timer = None
        # The socket is closed in any case, so an error here needs no handling.
        with contextlib.suppress(OSError, redis_errors.RedisError, asyncio.TimeoutError):
            await _wait_for(1.0, self._redis.disconnect(nowait=not wait))

    def _requeue_unanswered(self, *, final: bool = False) -> None:
        """Keep the commands that may be sent again; fail those that the server may have carried out."""
        unsent = len(self._outgoing)
        self._outgoing.clear()
        self._writer = None
        self._stop_probing()
        lost, self._sent = self._sent, deque()
        again: list[Command] = []
        unknown: list[Command] = []
        for remaining, command in zip(range(len(lost), 0, -1), lost, strict=True):
            (again if command.repeat or remaining <= unsent else unknown).append(command)
        if final:
            self._waiting.end_outage()
            for command in (*self._waiting.pop_all(), *again):
                self._fail(command)
        else:
            self._waiting.begin_outage(self.patience_s)
            self._waiting.add_sent(again)  # behind the commands that were refused before them
        for command in unknown:
            _complete(command, FateUnknown(self._shown_url, self._reason))

    # -- commands that wait for a connection, or for a server that accepts writes

    def _send_waiting(self) -> None:
        for command in self._waiting.pop_all():
            if command.retry is not None:
                command.packed = command.retry()  # this server may not have its script
            self._enqueue(command)

    def _fail(self, command: Command) -> None:
        _complete(command, self._unavailable())

    def _unavailable(self) -> BrokerUnavailable:
        return BrokerUnavailable(self._shown_url, self._reason)

    def _begin_refusal(self, message: str) -> None:
        """Keep refused commands until a probe finds that the server accepts writes again."""
        now = self._loop.time()
        if not self._refusal:
            is_same = now - self._accepted_at_s < _SAME_REFUSAL_S
            self._refused_backoff_s = self._refused_backoff_s if is_same else _REFUSED_BACKOFF_S[0]
            problem = (
                f"the broker at {self._shown_url} refuses writes: {message} "
                "(accepted requests and replies are kept and sent again)"
            )
            outages.report_began(self._shown_url, self, problem)
            self._waiting.begin_outage(self.patience_s)
        self._refusal = message
        self._reason = f"it refuses writes: {message}"
        if self._probe_timer is None and not self._is_probing:
            self._probe_timer = self._loop.call_later(self._refused_backoff_s, self._probe)
            self._refused_backoff_s = min(2 * self._refused_backoff_s, _REFUSED_BACKOFF_S[1])

    def _accept_writes(self) -> None:
        self._refusal = ""
        self._accepted_at_s = self._loop.time()
        self._waiting.end_outage()
        outages.report_ended(self._shown_url, self)

    def _probe(self) -> None:
        self._probe_timer = None
        self._is_probing = True
        packed = pack(("EVAL", WRITE_PROBE.text, 0))
        self._enqueue(Command(packed, self._on_probe_reply, repeat=False, retry=None, prompt=True))

    def _on_probe_reply(self, result: Any) -> None:
        self._is_probing = False
        if self._writer is None or self._abort_reason:
            return
        if isinstance(result, BrokerUnavailable):
            self._begin_refusal(self._refusal)  # the next probe
        elif self._refusal:
            self._accept_writes()
            self._send_waiting()

    def _stop_probing(self) -> None:
        self._is_probing = False
        if self._probe_timer is not None:
            self._probe_timer.cancel()
            self._probe_timer = None

    # -- detection of silent servers, and of demoted ones

    def _beat(self) -> None:
        now = self._loop.time()
        if now - self._beat_due_s > _BEAT_S:
            self._last_read_s = now  # the loop was blocked: this process did not read
        if self._sent and now - self._last_read_s > STALL_S:
            self._abort(f"no answer for {STALL_S:g} s")
            return
        if self._clock.is_stale():
            self.post(partial(self._clock.update, monotonic()), "TIME", repeat=True)
        if self._probe_timer is None and not self._is_probing:
            self._probe()
        self._schedule_beat()

    def _schedule_beat(self) -> None:
        self._beat_due_s = self._loop.time() + _BEAT_S
        self._beat_timer = self._loop.call_at(self._beat_due_s, self._beat)


async def _wait_for(seconds: float, awaitable: Awaitable[T]) -> T:
    """Like ``asyncio.wait_for``, but a cancellation that coincides with the result is raised (also Python < 3.12)."""
    task = asyncio.ensure_future(awaitable)
    try:
        done, _ = await asyncio.wait([task], timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait([task])
        raise
    if not done:
        task.cancel()
        await asyncio.wait([task])
        if task.cancelled():
            raise asyncio.TimeoutError
    return task.result()


def _complete(command: Command, error: Exception) -> None:
    try:
        command.then(error)
    except Exception:
        log.exception("a reply's continuation failed")


def _resolve(future: asyncio.Future[Any], reply: Any) -> None:
    if future.done():
        return  # the caller was cancelled
    if isinstance(reply, Exception):
        future.set_exception(reply)
    else:
        future.set_result(reply)
