"""The multiplexed connection: all commands of one process and loop over one socket.

It uses redis-py's ``Connection`` to connect (`dial`: URL, TLS, AUTH, client name), and reads (`resp_reader`) and writes
by itself. Replies are matched to commands by order: a caller that is cancelled drops
its future and never the read, so its reply cannot reach the next caller. Commands of one tick of the loop leave in one
write.

A blocking read (``XREAD BLOCK``) stops every command behind it, so it goes over a `RedisConnection` of its own.
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
from .dial import CONNECT_S, ErrorReply, error_of, link_to, reason_of, turned_away
from .refusals import MEMORY, NOT_PRIMARY, TEMPORARY, WRITE_PROBE, code_of
from .resp_reader import RespReader
from .url import shown_url
from .waiting_commands import WaitingCommands

T = TypeVar("T")

log = logging.getLogger(__name__)

BLOCK_MS = 2_000
"""How long a blocking read waits at the server. Shorter than `STALL_S`, so that silence means a dead server."""
STALL_S = 6.0
"""A server that owes an answer and says nothing for this long counts as dead."""
_BEAT_S = 1.0
"""How often the server is probed for whether it takes writes, which also shows whether it answers."""
_BACKOFF_S = (0.02, 1.0)
_REFUSED_BACKOFF_S = (0.05, 0.5)
_SETTLED_S = 1.0
"""A refusal sooner than this after the last one belongs to the same outage: the pauses go on growing."""
_HOOK_RETRY_S = 0.5
_REMEMBERED_S = 60.0
_chance = random.Random()
"""Of its own: processes that seed Python's alike would all come back at once."""
assert STALL_S > BLOCK_MS / 1000 + 2 * _BEAT_S, "a quiet blocking read must not look like a dead server"


class FateUnknown(BrokerUnavailable):
    """The connection broke between a command and its reply: the server may have carried it out, or not."""


class RedisConnection:
    """One multiplexed connection of one event loop.

    It reconnects by itself, with backoff, for as long as it is open. A command that was sent and not answered when the
    connection broke is sent again if it was given ``repeat=True``, and fails with `FateUnknown` otherwise. A command
    that the server refuses for a reason that passes (`refusals`) is sent again with backoff. A server that turns out to
    be no primary is left: the address is resolved anew.

    In the first ``patience_s`` seconds of an outage, whether the server is away or refuses writes, commands wait. After
    that those that wait fail with `BrokerUnavailable`, and so does at once what comes later, until the outage is over.
    With ``patient=True`` a command waits until `close`, and keeps its order among others that do. With ``prompt=True``
    it does not wait for a server that refuses it.

    Every method must be called from the loop that called ``open``. When that loop ends, so does the connection.
    """

    def __init__(self, url: str, *, name: str = "penstock", patience_s: float = 5.0) -> None:
        self.url, self.patience_s = url, patience_s
        self._name = name
        self._redis = link_to(url, name)
        self._shown_url = shown_url(url)
        self._loop: asyncio.AbstractEventLoop = cast(Any, None)
        self._writer: asyncio.StreamWriter | None = None
        self._intake: RespReader | None = None
        self._task: asyncio.Task[None] | None = None
        self._first: asyncio.Future[None] | None = None
        self._known: set[str] = set()
        """The scripts that this server has by now."""
        self._outgoing: list[Packed] = []
        self._in_pieces = False
        """Some of them are."""
        self._fills: list[Callable[[], None]] = []
        self._flush_due = False
        self._sent: deque[Command] = deque()
        self._waiting = WaitingCommands(self._fail)
        self._refusal = ""
        """What the server says against writes at present."""
        self._accepted_at = -math.inf
        self._refused_backoff_s = _REFUSED_BACKOFF_S[0]
        self._is_probing = False
        self._probe_timer: asyncio.TimerHandle | None = None
        self._hooks: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self._hook_tasks: set[asyncio.Task[None]] = set()
        self._pulse: asyncio.TimerHandle | None = None
        self._pulse_due = 0.0
        self._left_for = ""
        """Why this side ended the link that it has, or had last; empty if the server did."""
        self._heard = 0.0
        self._clock = Clock()
        self.now_ms = self._clock.now_ms
        """As of `Clock`: any thread may ask."""
        self._found_too_long, self._found_at = 0, -math.inf
        self._closed = False
        self._reason = "it does not answer"

    @property
    def connected(self) -> bool:
        return self._writer is not None

    @property
    def refuses_writes(self) -> bool:
        """Whether the server answers and takes no writes."""
        return bool(self._refusal)

    @property
    def keeps_commands(self) -> bool:
        """Whether commands wait: refused, lost with the connection, or not sent for want of one."""
        return self._waiting.any

    @property
    def longest(self) -> int:
        """How many bytes a string may have, as far as is known.

        A server that was told to take less (``proto-max-bulk-len``) refuses a longer one and hangs up. What is under
        way then survives, as whenever a connection breaks, but it need not come to that again and again. After a minute
        it may, as the server may have been told otherwise.
        """
        known = self._loop.time() - self._found_at < _REMEMBERED_S
        return self._found_too_long - 1 if known else LARGEST

    def on_reconnect(self, hook: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run ``hook`` in a task after each connecting but the first."""
        self._hooks.append(hook)

    async def open(self) -> RedisConnection:
        """Connect, and stay connected until `close`.

        Raises:
            BrokerUnavailable: the server did not answer within ``patience_s``, or turned us away; the reason is in the
                message.
        """
        self._loop = asyncio.get_running_loop()
        self._first = self._loop.create_future()
        self._waiting.begin_outage(self.patience_s)
        self._task = self._loop.create_task(self._run(), name=f"broker connection {self._name}")
        try:
            await _within(self.patience_s, self._first)
        except asyncio.TimeoutError:
            error = self._unavailable()
            await self.close()
            raise error from None
        except BaseException:
            await self.close()
            raise
        return self

    async def close(self) -> None:
        """Drop the connection; what is unanswered fails with `BrokerUnavailable`."""
        if not self._closed:
            self._flush()
            self._closed, self._reason = True, "the connection was closed"
            if self._task is not None:
                self._task.cancel()
        if self._task is not None:
            await asyncio.wait([self._task])
        self._lose(final=True)  # for a task that was cancelled before it began
        hooks = self._hook_tasks - {asyncio.current_task()}
        for task in hooks:
            task.cancel()
        if hooks:
            await asyncio.wait(hooks)

    async def wait_for_patient(self, timeout_s: float) -> None:
        """Return when the server has taken the patient commands that wait, or after ``timeout_s`` seconds."""
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
        """Send a command in this tick's write; ``then`` gets its reply, or the exception, as soon as it is read.

        A ``bulky`` one has an argument of more than ``COPIED_BYTES``, which is not copied then; a ``bulky_reply`` may
        be such a string. One that ``needs_memory`` fails with `BrokerFull` where a patient one would wait for memory.
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
        """Send a command in this tick's write and return the future of its reply.

        Raises (through the future):
            BrokerUnavailable: see the class.
            BrokerRefused: what the server said against it.
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
        """Run ``script``, as `post` sends a command."""
        operands: tuple[Arg, ...] = (len(keys), *keys, *args)
        packing = pack_in_pieces if bulky else pack

        def whole() -> Packed:
            return packing(("EVAL", script.text, *operands))

        if script.digest in self._known:
            packed = packing(("EVALSHA", script.digest, *operands))
        else:
            packed = whole()
            if self._writer is not None:
                self._known.add(script.digest)
        self._enqueue(Command(packed, then, repeat, whole, patient, prompt))

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
        """Run ``script``, as `send` sends a command."""
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
            self._in_pieces = True
        if command.bulky_reply:
            assert self._intake is not None
            self._intake.bulky += 1
        if not self._flush_due:
            self._schedule_flush()

    def join_write(self, fill: Callable[[], None]) -> None:
        """Call ``fill`` once, just before this tick's write, to post what it has gathered by then."""
        self._fills.append(fill)
        if not self._flush_due:
            self._schedule_flush()

    def hurry(self) -> None:
        """Write what there is now and not at the end of the tick, if nothing is under way that it could wait for.

        For who knows that nobody else is about to write: it took 8 % off the time of a request that is alone, but under
        load two writes instead of one cost 7 %.
        """
        if len(self._sent) == len(self._outgoing):
            self._flush()

    def _schedule_flush(self) -> None:
        # One write per tick instead of one per command: 46 instead of 58 us of CPU per request in a proxy.
        self._flush_due = True
        self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        if self._fills:
            fills, self._fills = self._fills, []
            for fill in fills:
                try:
                    fill()
                except Exception:
                    log.exception("cannot send what was gathered")
        self._flush_due = False
        if self._writer is not None and self._outgoing:
            if self._in_pieces:
                self._in_pieces = False
                # uvloop hands the pieces to the kernel as they are.
                self._writer.writelines([one for each in self._outgoing for one in pieces_of(each)])
            else:
                self._writer.write(b"".join(cast("list[bytes]", self._outgoing)))
            self._outgoing.clear()

    # -- connecting and reading

    async def _run(self) -> None:
        try:
            await self._stay_connected()
        except GeneratorExit:
            raise  # the loop is gone, and cannot wait for a farewell
        except BaseException:
            # Also where nobody called `close`: `asyncio.run` cancels what is left at its end.
            await self._end()
            raise
        await self._end()

    async def _end(self) -> None:
        self._closed = True
        self._lose(final=True)
        outages.report_ended(self._shown_url, self, closing=True)
        if self._first is not None and not self._first.done():
            self._first.set_exception(self._unavailable())
        await self._disconnect(wait=True)

    async def _stay_connected(self) -> None:
        backoff_s = _BACKOFF_S[0]
        while not self._closed:
            self._left_for = ""
            try:
                intake = await self._connect()
                backoff_s = _BACKOFF_S[0]
                await intake.ended
                self._reason = self._left_for or "the server closed the connection"
            except hiredis.ProtocolError as e:
                self._reason = f"it does not speak Redis's protocol: {e}"
            except (OSError, redis_errors.RedisError, asyncio.TimeoutError, UnicodeError) as e:
                self._reason = self._left_for or reason_of(e)
                if turned_away(e) and self._first is not None and not self._first.done():
                    return  # waiting does not mend a password or a certificate
            except Exception as e:
                log.exception("the connection to the broker failed in a way of its own")
                self._reason = f"{type(e).__name__}: {e}"
            if self._writer is not None:
                outages.report_began(self._shown_url, self, f"lost the broker at {self._shown_url}: {self._reason}")
            self._lose()
            await self._disconnect()
            await asyncio.sleep(backoff_s * _chance.uniform(0.5, 1.0))  # apart, when a thousand clients come back
            backoff_s = min(2 * backoff_s, _BACKOFF_S[1])

    async def _connect(self) -> RespReader:
        await _within(CONNECT_S, cast("Coroutine[Any, Any, None]", self._redis.connect()))  # type: ignore[no-untyped-call]
        # While it loads its append-only file a server answers TIME, but not PING.
        await self._ask("PING")
        refusal = await self._refusal_of_writes()
        await self._clock.read(partial(self._ask, "TIME"))
        writer = self._redis._writer  # pyright: ignore[reportPrivateUsage]
        assert writer is not None
        self._writer = writer
        transport = cast(asyncio.Transport, writer.transport)
        self._intake = RespReader(transport, self._on_data, self._on_reply, self._is_bulky_next, ErrorReply)
        self._heard = self._loop.time()
        self._known.clear()
        if refusal:
            self._begin_refusal(refusal)
        else:
            self._accept_writes()
        self._send_waiting()
        self._schedule_beat()
        if self._first is not None and not self._first.done():
            self._first.set_result(None)
        else:
            for hook in self._hooks:
                self._run_hook(hook)
        return self._intake

    async def _refusal_of_writes(self) -> str:
        """Return what the server says against writes, if that passes. Raises what it says if it is no primary."""
        try:
            await self._ask("EVAL", WRITE_PROBE.text, "0")
        except redis_errors.ResponseError as e:
            code = code_of(e)
            if code in NOT_PRIMARY:
                raise
            if code in TEMPORARY:
                return str(e)
        return ""  # whoever may not run scripts meets that where one is needed

    def _run_hook(self, hook: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self._closed or self._writer is None:
            return  # it is run after the next connecting
        task = self._loop.create_task(hook(), name=f"after reconnecting {self._name}")
        self._hook_tasks.add(task)
        task.add_done_callback(partial(self._hook_done, hook))

    def _hook_done(self, hook: Callable[[], Coroutine[Any, Any, None]], task: asyncio.Task[None]) -> None:
        self._hook_tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, BrokerUnavailable):
            # The server went away again, or refuses what the hook needs.
            log.debug("after reconnecting: %s", error)
            self._loop.call_later(_HOOK_RETRY_S, self._run_hook, hook)
        else:
            log.error("after reconnecting: %s", error, exc_info=error)

    async def _ask(self, *args: str) -> Any:
        await _within(CONNECT_S, self._redis.send_command(*args))
        return await _within(CONNECT_S, self._redis.read_response())  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]

    def _on_data(self) -> None:
        self._heard = self._loop.time()

    def _is_bulky_next(self) -> bool:
        return self._sent[0].bulky_reply

    def _on_reply(self, reply: Any) -> None:
        command = self._sent.popleft()
        if command.bulky_reply:
            assert self._intake is not None
            self._intake.bulky -= 1
        if type(reply) is ErrorReply:
            reply = self._judge(command, reply)
            if reply is None:
                return
        try:
            command.then(reply)
        except Exception:
            log.exception("a reply's continuation failed")

    def _judge(self, command: Command, refusal: ErrorReply) -> Exception | None:
        """Return the error that a refused command ends with; None for a command that is sent again."""
        if refusal.lacks_script and command.retry is not None:
            # Somebody has flushed the scripts. It is late now: what was sent behind it has overtaken it.
            command.packed = command.retry()
            self._enqueue(command)
            return None
        code = refusal.code
        if code in NOT_PRIMARY:
            self._leave(refusal.said)
            self._waiting.add_sent([command])
            return None
        if code in TEMPORARY and (code != MEMORY or (command.patient and not command.needs_memory)):
            self._begin_refusal(refusal.said)
            if command.prompt:
                return self._unavailable()
            self._waiting.add_sent([command])
            return None
        error = error_of(refusal.said, head_of(command.packed), self.url)
        if type(error) is StringTooLong:
            self._found_too_long = max(map(len, pieces_of(command.packed)))
            self._found_at = self._loop.time()
        return error

    def _leave(self, reason: str) -> None:
        """End the link from this side."""
        if self._writer is not None and not self._left_for:
            self._left_for = reason
            self._writer.transport.abort()  # ends the read, and with it this link

    async def _disconnect(self, *, wait: bool = False) -> None:
        self._writer = None
        if self._intake is not None:
            self._intake.close()
        if self._pulse is not None:
            self._pulse.cancel()
            self._pulse = None
        # The socket is closed all the same; how the farewell failed is of no use to anyone.
        with contextlib.suppress(OSError, redis_errors.RedisError, asyncio.TimeoutError):
            await _within(1.0, self._redis.disconnect(nowait=not wait))

    def _lose(self, *, final: bool = False) -> None:
        """Sort what is unanswered into what may be sent again and what may have been carried out."""
        unsent = len(self._outgoing)
        self._outgoing.clear()
        self._writer = None
        self._stop_probing()
        lost, self._sent = self._sent, deque()
        again: list[Command] = []
        unknown: list[Command] = []
        for left, command in zip(range(len(lost), 0, -1), lost, strict=True):
            (again if command.repeat or left <= unsent else unknown).append(command)
        if final:
            self._waiting.end_outage()
            for command in (*self._waiting.take(), *again):
                self._fail(command)
        else:
            self._waiting.begin_outage(self.patience_s)
            self._waiting.add_sent(again)  # behind what was refused before them
        for command in unknown:
            _tell(command, FateUnknown(self._shown_url, self._reason))

    # -- commands that wait for a connection, or for a server that takes writes

    def _send_waiting(self) -> None:
        for command in self._waiting.take():
            if command.retry is not None:
                command.packed = command.retry()  # this server may not have its script
            self._enqueue(command)

    def _fail(self, command: Command) -> None:
        _tell(command, self._unavailable())

    def _unavailable(self) -> BrokerUnavailable:
        return BrokerUnavailable(self._shown_url, self._reason)

    def _begin_refusal(self, said: str) -> None:
        """Keep what is refused until the server takes a write again, which a probe finds out."""
        now = self._loop.time()
        if not self._refusal:
            lately = now - self._accepted_at < _SETTLED_S
            self._refused_backoff_s = self._refused_backoff_s if lately else _REFUSED_BACKOFF_S[0]
            problem = (
                f"the broker at {self._shown_url} refuses writes: {said} (what was accepted is kept and sent again)"
            )
            outages.report_began(self._shown_url, self, problem)
            self._waiting.begin_outage(self.patience_s)
        self._refusal = said
        self._reason = f"it refuses writes: {said}"
        if self._probe_timer is None and not self._is_probing:
            self._probe_timer = self._loop.call_later(self._refused_backoff_s, self._probe)
            self._refused_backoff_s = min(2 * self._refused_backoff_s, _REFUSED_BACKOFF_S[1])

    def _accept_writes(self) -> None:
        self._refusal = ""
        self._accepted_at = self._loop.time()
        self._waiting.end_outage()
        outages.report_ended(self._shown_url, self)

    def _probe(self) -> None:
        self._probe_timer = None
        self._is_probing = True
        packed = pack(("EVAL", WRITE_PROBE.text, 0))
        self._enqueue(Command(packed, self._on_probed, repeat=False, retry=None, prompt=True))

    def _on_probed(self, result: Any) -> None:
        self._is_probing = False
        if self._writer is None or self._left_for:
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

    # -- noticing silence, and a server that was demoted

    def _beat(self) -> None:
        now = self._loop.time()
        if now - self._pulse_due > _BEAT_S:
            self._heard = now  # the loop was held up: the silence was ours
        if self._sent and now - self._heard > STALL_S:
            self._leave(f"no answer for {STALL_S:g} s")
            return
        if self._clock.is_stale():
            self.post(partial(self._clock.take, monotonic()), "TIME", repeat=True)
        if self._probe_timer is None and not self._is_probing:
            self._probe()
        self._schedule_beat()

    def _schedule_beat(self) -> None:
        self._pulse_due = self._loop.time() + _BEAT_S
        self._pulse = self._loop.call_at(self._pulse_due, self._beat)


async def _within(seconds: float, awaitable: Awaitable[T]) -> T:
    """Like ``asyncio.wait_for``, but a cancellation that comes together with the result counts (Python < 3.12)."""
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


def _tell(command: Command, error: Exception) -> None:
    try:
        command.then(error)
    except Exception:
        log.exception("a reply's continuation failed")


def _resolve(future: asyncio.Future[Any], reply: Any) -> None:
    if future.done():
        return  # its caller was cancelled; the reply is nobody's
    if isinstance(reply, Exception):
        future.set_exception(reply)
    else:
        future.set_result(reply)
