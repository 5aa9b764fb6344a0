"""One way to publish and one to receive replies: the core of every handle, every proxy and every batch producer.

A `Caller` belongs to one process and loop. It keeps each request that it published until it is answered, so that after
a broken connection it can find out what became of it, and publish again what Redis lost.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import secrets
import weakref
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Union, cast

from ..broker.address import shown_url
from ..broker.connection import Connection, FateUnknown, user_of
from ..broker.dead import DeadQueue
from ..broker.errors import NoPermissionError, OutOfMemoryError, RedisError
from ..broker.figures import Figures, figures_of
from ..broker.flow import REPEAT_S, WINDOW, tell_taken
from ..broker.jobs import Job, JobReplies
from ..broker.keys import Keys
from ..broker.publishing import Published, Publisher, Refused
from ..broker.registry import BackendRecord, EndpointRecord, Registry, Snapshot, Watcher
from ..broker.replies import ReplyStream
from ..broker.wire import LARGE, PART_VERSION, Entry, Header, Part, Reply, entry_fields
from . import traffic
from .errors import (
    BackendNotFound,
    BrokerUnavailable,
    Overloaded,
    PenstockError,
    RequestCancelled,
    RequestTimeout,
    StreamBroken,
    WireError,
)
from .incoming import Incoming

log = logging.getLogger(__name__)

Outcome = Union[Reply, BaseException, Incoming]  # noqa: UP007 - it is evaluated, also on Python 3.10
"""A reply, which may carry an error of the backend; or why there is none.

Whoever asked for it by ``Header.window`` may hear of an answer in parts instead, as soon as it has begun.
"""

_SWEEP_S = 0.05
_GIVE_UP_S = 60.0
"""A broker that is away for this long fails even accepted calls: they are durable, but nobody should wait for ever."""
_RETRY_S = 1.0
_BODY_TTL_MS = 24 * 3600 * 1000
_BODY_SLACK_MS = 60_000
_SHADOW_BODY_TTL_MS = 600_000
_MAX_QUEUED = 10_000
_UNLIMITED = 2**53
_SLACK_MS = 60_000
"""The clock that numbers entries may have been another server's."""


def batch_limit(max_queued_requests: int) -> int:
    """Return how many unsettled requests may stand in the way of a batch item.

    The rest is kept for interactive requests, which a batch must not have refused.
    """
    return max(1, max_queued_requests * 4 // 5)


class Call:
    """One request on its way."""

    __slots__ = (
        "_caller",
        "acceptance",
        "answered",
        "backend",
        "batch",
        "body",
        "deadline",
        "entry",
        "fields",
        "id",
        "incoming",
        "limit",
        "outcome",
        "since_ms",
        "then",
        "timeout_s",
        "unsure",
    )

    def __init__(self, caller: Caller, id_: str, fields: list[bytes], then: Callable[[Outcome], None]) -> None:
        self._caller, self.id, self.fields, self.then = caller, id_, fields, then
        self.backend = ""
        self.limit = 0
        """Of unsettled requests: with more in its way, it is refused."""
        self.batch = False
        """It lies on the batch stream."""
        self.body = b""
        """A large one, which is not among the fields but in a key of its own."""
        self.entry: bytes | None = None
        """Its id on the stream, once it is durably there."""
        self.unsure = False
        """The connection broke before we heard whether it is on its stream."""
        self.answered = False
        """Its reply has come, and the body of that is still on its way."""
        self.incoming: Incoming | None = None
        """Its answer, once that has begun to come in parts."""
        self.outcome: Reply | BaseException | None = None
        self.since_ms = 0.0
        self.deadline = 0.0
        self.timeout_s = 0.0
        self.acceptance: asyncio.Future[None] | None = None

    def accepted(self) -> Awaitable[None]:
        """Return a future that is done once the request is durably on its stream; it raises why it never will be."""
        if self.acceptance is None:
            self.acceptance = asyncio.get_running_loop().create_future()
            if self.entry is not None:
                self.acceptance.set_result(None)
            elif self.outcome is not None:
                self._settle_acceptance(self.outcome)
        return self.acceptance

    def cancel(self) -> bool:
        """Give the request up: never started if it is still waiting, cancelled if it runs and can be.

        Returns whether it was in flight; then its outcome will not be heard. Otherwise it has been.
        """
        return self._caller.withdraw(self)

    def accept(self, entry: bytes) -> None:
        self.entry, self.unsure = entry, False
        if self.acceptance is not None and not self.acceptance.done():
            self.acceptance.set_result(None)

    def conclude(self, outcome: Reply | BaseException) -> None:
        self.outcome = outcome
        if self.acceptance is not None:
            self._settle_acceptance(outcome)
        if self.incoming is not None:
            self.incoming.end(outcome)
            return
        self.hand_over(outcome)

    def hand_over(self, outcome: Outcome) -> None:
        try:
            self.then(outcome)
        except Exception:
            log.exception("cannot hand over the outcome of request %s", self.id)

    def _settle_acceptance(self, outcome: Reply | BaseException) -> None:
        acceptance = self.acceptance
        if acceptance is None or acceptance.done():
            return
        if isinstance(outcome, Reply):
            acceptance.set_result(None)  # who answers it has read it
        else:
            acceptance.set_exception(outcome)
            acceptance.exception()  # whoever waited for it may be gone


@dataclass(slots=True)
class Copies:
    """Of one shadow backend, and of one process since it started."""

    queued: int = 0
    refused: int = 0
    """Its queue was full, or the broker did not take them or could not say so."""


class Caller:
    """Publishes requests to every backend of an instance and receives their replies.

    Only for the loop that opened it, and it ends with that loop. `get` shares one among all who ask in the same loop.
    """

    def __init__(self, url: str, instance: str, *, job: str | None = None, job_ttl_s: float = 0.0) -> None:
        """``job`` is the name of a batch job, whose results are kept for ``job_ttl_s`` when this caller is gone."""
        self.url, self.keys = url, Keys(instance)
        self.id = self.keys.caller(user_of(url), secrets.token_hex(6) if job is None else self.keys.job_name(job))
        self._connection = Connection(url, name=f"penstock-caller-{self.id}")
        self.registry = Registry(self._connection, self.keys)
        self.watcher = Watcher(url, self.registry, self.keys)
        self.results: JobReplies | None = None
        self.job: Job | None = None
        if job is None:
            self._replies = ReplyStream(self._connection, self.keys, self.id, self._on_reply, self._reconcile)
        else:
            self.results = self._replies = JobReplies(
                self._connection, self.keys, self.id, self._on_reply, self._reconcile, ttl_s=job_ttl_s
            )
            self.job = Job(self._connection, self.keys, job, self.id, job_ttl_s)
        self.on_stray: Callable[[str, Reply | BaseException], None] | None = None
        """Hears, by the request's id, what else comes: results that a job's former producer has left."""
        self._loop: asyncio.AbstractEventLoop = cast(Any, None)
        self._in_flight: dict[str, Call] = {}
        self._timed: dict[str, Call] = {}
        self._doomed: dict[str, Call] = {}
        """Given up before we heard their ids on the stream: they are withdrawn as soon as we do."""
        self.copies: dict[str, Copies] = {}
        """What became of the copies for shadows, by backend."""
        self._streaming: dict[str, Incoming] = {}
        """The answers that have begun to come in parts and have not ended."""
        self._numbers = itertools.count(1)
        self._sweeper: asyncio.TimerHandle | None = None
        self._reconciling = asyncio.Lock()
        self._gone_since: float | None = None
        self._fetches: set[asyncio.Task[None]] = set()
        self._opening: asyncio.Task[None] | None = None
        self._life: asyncio.Task[None] | None = None
        self.closed = False

    @classmethod
    async def get(cls, url: str, instance: str) -> Caller:
        """Return the open caller that the running loop shares for this instance.

        Raises:
            BrokerUnavailable: Redis cannot be reached.
            ConfigError: ``url`` is not a Redis URL, or ``instance`` cannot be a name.
        """
        caller = cls.shared(url, instance)
        if caller is None:
            caller = _shared.setdefault(asyncio.get_running_loop(), {})[url, instance] = cls(url, instance)
        if caller._life is None:
            await caller.open()
        return caller

    @classmethod
    def shared(cls, url: str, instance: str) -> Caller | None:
        """Return the caller that the running loop has for this instance, if there is one that is not closed."""
        caller = _shared.get(asyncio.get_running_loop(), {}).get((url, instance))
        return None if caller is None or caller.closed else caller

    @property
    def snapshot(self) -> Snapshot:
        return self.watcher.snapshot

    @property
    def connected(self) -> bool:
        return self._connection.connected

    async def open(self) -> None:
        """Connect, create the reply stream and follow the registry.

        Idempotent; all who ask at once wait for the same, and one that is cancelled leaves the others waiting.
        """
        if self._opening is None:
            self._loop = asyncio.get_running_loop()
            self._opening = self._loop.create_task(self._open(), name="caller opening")
            self._opening.add_done_callback(_retrieve)
        await asyncio.shield(self._opening)

    async def _open(self) -> None:
        try:
            await self._connection.open()
            self._publisher = Publisher(self._connection, self.keys)
            await self._replies.open()
            await self.watcher.start()
        except BaseException:
            await self._shut()
            raise
        self._connection.on_reconnect(self._on_reconnect)
        self._life = self._loop.create_task(self._live(), name="caller")

    async def _live(self) -> None:
        """Notice the end of the loop, where nobody called `close`: `asyncio.run` cancels what is left."""
        try:
            await self._loop.create_future()
        finally:
            self._end()

    async def close(self) -> None:
        """Fail what is in flight with `RequestCancelled`, delete the reply stream and disconnect."""
        if self.closed:
            return
        self.closed = True
        if self._opening is not None and not self._opening.done():
            self._opening.cancel()
            await asyncio.wait([self._opening])
        for call in list(self._in_flight.values()):
            if self.results is None:
                self._give_up(call)
            else:  # what a job has on its stream outlives us
                del self._in_flight[call.id]
            call.conclude(RequestCancelled(call.id))
        await self._shut()

    async def _shut(self) -> None:
        self._end()
        if self._life is not None:
            self._life.cancel()
        await self.watcher.close()
        await self._replies.close()
        await self._connection.close()

    def _end(self) -> None:
        self.closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for fetch in self._fetches:
            fetch.cancel()
        # By hand, as the dictionary's weak keys are loops that their callers keep alive.
        shared = _shared.get(self._loop, {})
        if shared.get((self.url, self.keys.instance)) is self:
            del shared[self.url, self.keys.instance]
            if not shared:
                del _shared[self._loop]

    # -- asking

    def dispatch(
        self,
        endpoint: EndpointRecord,
        header: Header,
        body: bytes,
        then: Callable[[Outcome], None],
        *,
        shard_key: str | None = None,
        timeout_s: float | None = None,
    ) -> Call:
        """Send a request to one of the endpoint's backends, by its traffic, and copies to its shadows.

        ``then`` hears the outcome exactly once, in the loop, unless the call is cancelled first.

        Raises:
            BackendNotFound: the endpoint sends to nobody.
        """
        backend = self.choose(endpoint, shard_key)
        call = self.submit(backend, header, body, then, timeout_s=timeout_s)
        if endpoint.shadows:
            self.shadow(endpoint, header, body)
        return call

    def choose(self, endpoint: EndpointRecord, shard_key: str | None) -> BackendRecord:
        """Return the backend that gets the next request, by the endpoint's traffic.

        Raises:
            BackendNotFound: the endpoint sends to nobody.
        """
        backends = self.watcher.snapshot.backends
        tag = traffic.choose(endpoint.traffic, shard_key, random.random())
        backend = None if tag is None else backends.get(tag)
        if backend is None:
            raise BackendNotFound(str(tag), backends)
        return backend

    def submit(
        self,
        backend: BackendRecord,
        header: Header,
        body: bytes,
        then: Callable[[Outcome], None],
        *,
        timeout_s: float | None = None,
        batch: bool = False,
    ) -> Call:
        """Send a request to ``backend``; see `dispatch`. Never blocks.

        With ``batch`` it lies on the batch stream: replicas take interactive requests first, and some of the queue's
        places are kept for them.

        Raises:
            TypeError: the header holds what JSON cannot.
        """
        id_ = self.next_id()
        if timeout_s is not None:
            header.deadline_ms = self.deadline_ms(timeout_s)
        large = len(body) > LARGE
        call = Call(self, id_, entry_fields(id_, self.id, header.dump(), None if large else body), then)
        call.batch = batch
        if large:
            call.body = body
        self.begin(call, backend, timeout_s)
        return call

    def next_id(self) -> str:
        return f"{self.id}-{next(self._numbers)}"

    def deadline_ms(self, timeout_s: float) -> int:
        """Return when, by the broker's clock, what begins now has taken ``timeout_s``."""
        return int(self._connection.now_ms() + timeout_s * 1000)

    def begin(
        self, call: Call, backend: BackendRecord, timeout_s: float | None = None, entry: bytes | None = None
    ) -> None:
        """Send a call that is made, for the first time or again. With an ``entry`` it lies on its stream already."""
        limit: int = backend.config.get("max_queued_requests", _MAX_QUEUED)
        call.backend, call.limit = backend.tag, batch_limit(limit) if call.batch else limit
        call.entry, call.unsure, call.answered = entry, False, False
        call.since_ms = self._connection.now_ms()
        self._in_flight[call.id] = call
        if self.closed:
            self._loop.call_soon(self._finish, call, self._unavailable("the connection was closed"))
            return
        if timeout_s is not None:
            call.timeout_s = timeout_s
            call.deadline = self._loop.time() + timeout_s
            self._timed[call.id] = call
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(_SWEEP_S, self._sweep)
        if entry is None:
            if call.body:
                self._put_body(call)
            self._publish(call, call.limit)

    async def accepted_before(self, backends: Iterable[str]) -> dict[str, tuple[str, bytes]]:
        """Return what lies on batch streams in this caller's name: backend and entry, by the request's id."""
        found: dict[str, tuple[str, bytes]] = {}
        for backend in backends:
            names = {"caller_field": b"by", "id_field": b"id"}
            try:
                entries = await self._publisher.find_of(backend, self.id, **names)
            except NoPermissionError:
                log.warning("may not look for what of %s is queued for %r: that is sent again", self.id, backend)
                continue
            for id_, entry in entries.items():
                found[id_.decode()] = backend, entry
        return found

    def dead_queue(self, backend: str) -> DeadQueue:
        return DeadQueue(self._connection, self.keys, backend)

    async def drain(self) -> None:
        """Return when all replies that have been written by now have been heard."""
        await self._replies.drain()
        if self._fetches:
            await asyncio.wait(self._fetches)

    def withdraw(self, call: Call) -> bool:
        """Give a call up; see `Call.cancel`."""
        was_in_flight = self._give_up(call)
        if was_in_flight and call.acceptance is not None:
            call.acceptance.cancel()
        return was_in_flight

    def _give_up(self, call: Call) -> bool:
        if self._in_flight.pop(call.id, None) is None:
            return False
        self._timed.pop(call.id, None)
        self._streaming.pop(call.id, None)
        if call.entry is None:
            self._doomed[call.id] = call
        else:
            self._take_back(call, call.entry)
        return True

    def _take_back(self, call: Call, entry: bytes) -> None:
        self._publisher.withdraw(call.backend, entry, batch=call.batch)
        self._drop_body(call)

    def _publish(self, call: Call, limit: int) -> None:
        then = partial(self._on_published, call)
        self._publisher.publish(call.backend, call.fields, limit, then, batch=call.batch)
        if len(self._in_flight) == 1:
            self._connection.hurry()

    def _put_body(self, call: Call) -> None:
        # Ahead of its entry on the same connection, so that no replica can look for it too early.
        ttl_ms = int(call.timeout_s * 1000) + _BODY_SLACK_MS if call.timeout_s else _BODY_TTL_MS
        key = self.keys.body(call.backend, call.id)
        then = partial(self._on_body_put, call)
        self._connection.post(then, "SET", key, call.body, "PX", ttl_ms, repeat=True, bulky=True)

    def _on_body_put(self, call: Call, result: Any) -> None:
        if isinstance(result, Exception) and self._give_up(call):
            call.conclude(self._refusal(call, result))

    def _drop_body(self, call: Call) -> None:
        if call.body:
            self._connection.post(_ignore, "UNLINK", self.keys.body(call.backend, call.id), repeat=True)

    def shadow(self, endpoint: EndpointRecord, header: Header, body: bytes, *, batch: bool = False) -> None:
        """Send copies to the endpoint's shadows, in their proportions."""
        for tag, proportion in endpoint.shadows.items():
            backend = self.watcher.snapshot.backends.get(tag)
            if backend is None or random.random() >= proportion:
                continue
            id_ = f"{self.id}-s{next(self._numbers)}"
            large = len(body) > LARGE
            fields = Entry(id_, "", header, b"" if large else body, large).fields()
            key = self.keys.body(tag, id_) if large else None
            if key is not None:
                self._connection.post(_ignore, "SET", key, body, "PX", _SHADOW_BODY_TTL_MS, repeat=True, bulky=True)
            then = partial(self._on_shadowed, tag, key)
            limit: int = backend.config.get("max_queued_requests", _MAX_QUEUED)
            self._publisher.publish(tag, fields, batch_limit(limit) if batch else limit, then, batch=batch)

    def _on_shadowed(self, tag: str, body: str | None, result: Published) -> None:
        # What becomes of a copy never touches the caller, least of all a refusal.
        copies = self.copies.setdefault(tag, Copies())
        if type(result) is bytes:
            copies.queued += 1
            return
        copies.refused += 1
        if body is not None:
            self._connection.post(_ignore, "UNLINK", body, repeat=True)

    # -- looking

    async def figures(self) -> dict[str, Figures]:
        """Return what each backend has to do and has done, by tag. Raises `BrokerUnavailable`."""
        tags = sorted(self.watcher.snapshot.backends)
        found = await asyncio.gather(*[figures_of(self._connection, self.keys, tag) for tag in tags])
        return dict(zip(tags, found, strict=True))

    # -- hearing

    def _on_published(self, call: Call, result: Published) -> None:
        if type(result) is bytes:
            call.accept(result)
            if self._doomed and self._doomed.pop(call.id, None) is not None:
                self._take_back(call, result)
        elif isinstance(result, FateUnknown) and not self.closed:
            call.unsure = True  # until we are connected again, and can look
        else:
            self._doomed.pop(call.id, None)
            self._drop_body(call)
            self._finish(call, self._refusal(call, result))

    def _refusal(self, call: Call, result: object) -> PenstockError:
        if isinstance(result, Refused):
            return Overloaded(call.backend, result.depth, call.limit, result.retry_after_s)
        if isinstance(result, OutOfMemoryError):
            return Overloaded(call.backend, 0, call.limit)
        if isinstance(result, PenstockError):
            return result
        return self._unavailable(f"it refused the request: {result}")

    def _unavailable(self, reason: str) -> BrokerUnavailable:
        return BrokerUnavailable(shown_url(self.url), reason)

    def _finish(self, call: Call, outcome: Reply | BaseException) -> None:
        if self._in_flight.pop(call.id, None) is not None:
            self._timed.pop(call.id, None)
            if call.incoming is not None:
                self._streaming.pop(call.id, None)
            call.conclude(outcome)

    def _on_reply(self, fields: list[bytes]) -> None:
        if fields[1] == PART_VERSION:
            self._hear_part(fields)
            return
        try:
            replies = Reply.all_of(fields)
        except WireError as e:
            log.error("dropped a reply that cannot be read: %s", e)
            for id_ in Reply.ids_of(fields):
                if (call := self._in_flight.get(id_)) is not None:
                    self._finish(call, e)
            return
        for reply in replies:
            self._hear(reply)

    def _hear(self, reply: Reply) -> None:
        call = self._in_flight.get(reply.id)
        if reply.large:
            self._hear_large(reply, call)
        elif call is not None:
            if not call.answered:  # else a second answer, while the body of the first is on its way
                self._finish(call, reply)
        elif self.on_stray is not None:
            self.on_stray(reply.id, reply)

    def _hear_large(self, reply: Reply, call: Call | None) -> None:
        then: Callable[[Reply | BaseException], None]
        if call is not None:
            if call.answered:
                return
            call.answered = True
            then = partial(self._finish, call)
        elif self.on_stray is not None:
            then = partial(self.on_stray, reply.id)
        else:  # cancelled, too late, or a second answer after a take-over
            self._connection.post(_ignore, "UNLINK", self.keys.reply_body(self.id, reply.id), repeat=True)
            return
        task = self._loop.create_task(self._fetch(reply, then))
        self._fetches.add(task)
        task.add_done_callback(self._fetches.discard)

    def _hear_part(self, fields: list[bytes]) -> None:
        try:
            part = Part.of(fields)
        except WireError as e:
            log.error("dropped a part of an answer that cannot be read: %s", e)
            for id_ in Reply.ids_of(fields):
                self._break_off(self._in_flight.get(id_), e)
            return
        call = self._in_flight.get(part.id)
        if call is None:
            return  # cancelled, or broken off
        incoming = call.incoming
        if incoming is None:
            incoming = Incoming(part, call.backend, WINDOW, partial(self._grant, call), call.cancel)
        try:
            incoming.take(part)
        except StreamBroken as e:
            self._break_off(call, e)
            return
        if call.incoming is None:
            # From here on it has met its deadline, and must not be published again.
            call.incoming = self._streaming[call.id] = incoming
            self._timed.pop(call.id, None)
            call.hand_over(incoming)

    def _grant(self, call: Call, taken: int) -> None:
        tell_taken(self._connection, self.keys, call.backend, call.id, taken)
        self._replies.trim()  # or what a fast stream has sent in a fifth of a second would still lie there

    def _break_off(self, call: Call | None, error: PenstockError) -> None:
        if call is not None and self._give_up(call):
            call.conclude(error)

    async def _fetch(self, reply: Reply, then: Callable[[Reply | BaseException], None]) -> None:
        key = self.keys.reply_body(self.id, reply.id)
        try:
            # Not GETDEL: it could not be repeated if the connection broke.
            body = await self._connection.send("GET", key, repeat=True, patient=True)
        except (BrokerUnavailable, RedisError) as e:
            then(self._unavailable(f"cannot fetch the body of a reply: {e}"))
            return
        if self.results is None:  # else the job's next producer may need it
            self._connection.post(_ignore, "UNLINK", key, repeat=True)
        if body is None:
            then(WireError(f"the body of the reply to {reply.id!r} has expired"))
            return
        reply.body, reply.large = body, False
        then(reply)

    def _sweep(self) -> None:
        # One sweep for all deadlines instead of a timer for each request.
        self._sweeper = None
        now = self._loop.time()
        for call in [call for call in self._timed.values() if call.deadline <= now]:
            if self._give_up(call):
                call.conclude(RequestTimeout(f"backend {call.backend!r}", call.timeout_s))
        for incoming in self._streaming.values():
            if now - incoming.granted_at > REPEAT_S:
                incoming.grant()
        if self._connection.connected:
            self._gone_since = None
        elif self._gone_since is None:
            self._gone_since = now
        elif now - self._gone_since > _GIVE_UP_S:
            for call in list(self._in_flight.values()):
                self._finish(call, self._unavailable(f"it has been away for {_GIVE_UP_S:g} s"))
        if self._in_flight:
            self._sweeper = self._loop.call_later(_SWEEP_S, self._sweep)
        else:
            self._gone_since = None

    # -- after the connection or Redis's memory was lost

    async def _on_reconnect(self) -> None:
        while self._connection.connected:
            try:
                await self._replies.renew()
                await self._reconcile()
                return
            except RedisError as e:
                log.error("cannot look for what was in flight: %s", e)
                await asyncio.sleep(_RETRY_S)

    async def _reconcile(self) -> None:
        """Find out what became of every call that was sent, and publish again what Redis no longer has.

        A user that may not read the request streams cannot find out: what it has there is taken back and published
        again. If that was running it runs twice; what waited loses its place in the queue.
        """
        async with self._reconciling:
            # Calls that were never sent are sent by the connection; those sent since it is back are not our business.
            sent = [call for call in self._in_flight.values() if call.unsure or call.entry is not None]
            sent += [call for call in self._doomed.values() if call.unsure]
            by_stream: defaultdict[tuple[str, bool], list[Call]] = defaultdict(list)
            for call in sent:
                by_stream[call.backend, call.batch].append(call)
            missing: list[Call] = []
            for (backend, batch), calls in by_stream.items():
                since_ms = min(call.since_ms for call in calls) - _SLACK_MS
                known = [(call.id, call.entry) for call in calls]
                try:
                    found = await self._publisher.find(backend, b"id", known, since_ms, batch=batch)
                except NoPermissionError:
                    found = [None] * len(calls)
                    for call in calls:
                        if call.entry is not None:
                            self._publisher.withdraw(backend, call.entry, batch=batch)
                for call, entry in zip(calls, found, strict=True):
                    if entry is None:
                        missing.append(call)
                    else:
                        self._on_published(call, entry)
            if not missing:
                return
            # What is not on its stream was answered just now, or is lost; its answer would be on ours.
            await self._replies.drain()
            for call in missing:
                self._doomed.pop(call.id, None)
                if call.incoming is not None:
                    self._break_off(call, StreamBroken(call.backend, call.id, "the broker has lost it"))
                elif call.id in self._in_flight and not call.answered:
                    limit = call.limit if call.unsure else _UNLIMITED  # accepted is accepted
                    call.entry, call.unsure = None, False
                    if call.body:
                        self._put_body(call)
                    self._publish(call, limit)


_shared: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str], Caller]] = (
    weakref.WeakKeyDictionary()
)


def _retrieve(task: asyncio.Task[None]) -> None:
    """Whoever waited for it may be gone: what it raised is not to be reported as never retrieved."""
    if not task.cancelled():
        task.exception()


def _ignore(outcome: Any) -> None:
    """Nobody waits for this."""
