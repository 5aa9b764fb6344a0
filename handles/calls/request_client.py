"""The request client: one way to publish requests and to receive replies, for handles, proxies and producers.

A `RequestClient` belongs to one process and loop. It keeps each published request among its `CallsInFlight` until its
`ReplyReceiver` has the reply. So after a broken connection its `Recovery` can find out what became of each request, and
publish again what Redis lost.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast

from ...broker.errors import StringTooLong
from ...broker.queue.batch_jobs import BatchJob, BatchJobReplies
from ...broker.queue.dead_letters import DeadLetterStream
from ...broker.queue.flow_control import REPEAT_S, tell_taken
from ...broker.queue.publisher import Published, Publisher, QueueFull
from ...broker.queue.queued_bytes import NO_LIMIT, SMALL, most_bytes
from ...broker.queue.reply_stream import ReplyStream
from ...broker.queue.stats import BackendStats, read_stats
from ...broker.registry.records import BackendRecord, EndpointRecord, Snapshot
from ...broker.registry.store import Registry
from ...broker.registry.watcher import Watcher
from ...broker.transport.connection import FateUnknown, RedisConnection
from ...broker.transport.dial import user_of
from ...broker.transport.url import shown_url
from ...broker.wire._fields import LARGE
from ...broker.wire.call_ids import new_ids
from ...broker.wire.keys import Keys
from ...broker.wire.requests import Header, RawEntry
from ..errors import (
    BackendNotFound,
    BrokerFull,
    BrokerRefused,
    BrokerUnavailable,
    NotPermitted,
    Overloaded,
    PayloadTooLarge,
    PenstockError,
    RequestCancelled,
    RequestTimeout,
)
from ..options import check_call_method
from ..pickle_policy import PicklePolicy
from . import traffic
from .call import MAX_QUEUED, MAX_QUEUED_BYTES, Call, CallOutcome, CallsInFlight, batch_limit
from .large_bodies import LargeBodies, check_size, too_long
from .recovery import Recovery
from .reply_receiver import ReplyReceiver
from .shadowing import ShadowTraffic
from .starting import tasks_that_start

log = logging.getLogger(__name__)

_SWEEP_S = 0.05
_GIVE_UP_S = 60.0
"""A broker that is away for this long fails even accepted calls: they are durable, but nobody should wait for ever."""
_RETRY_S = 1.0
_BODY_TTL_MS = 24 * 3600 * 1000
_BODY_SLACK_MS = 60_000


class RequestClient:
    """Publishes requests to every backend of an instance and receives their replies.

    Only for the loop that opened it, and it ends with that loop. `get` shares one among all who ask in the same loop.
    """

    def __init__(self, url: str, instance: str, *, job: str | None = None, job_ttl_s: float = 0.0) -> None:
        """``job`` is the name of a batch job, whose results are kept for ``job_ttl_s`` when this caller is gone."""
        self.url, self.keys = url, Keys(instance)
        self.id = self.keys.caller(user_of(url), secrets.token_hex(6) if job is None else self.keys.job_name(job))
        self.name = self.id.encode()
        """The id, as entries have it."""
        self._connection = RedisConnection(url, name=f"penstock-caller-{secrets.token_hex(4)}")
        self.registry = Registry(self._connection, self.keys)
        self.watcher = Watcher(url, self.registry, self.keys)
        self._publisher = Publisher(self._connection, self.keys)
        self._bodies = LargeBodies(self._connection)
        self.next_id = new_ids().__next__
        """Makes the id of another call."""
        # Of its own: processes that seed Python's alike would all choose alike.
        self._chance = random.Random().random
        self.shadows = ShadowTraffic(self.watcher, self._publisher, self._bodies, self.keys, self.next_id)
        self.in_flight = CallsInFlight(self._take_back)
        # The same dictionaries, so that a request costs no look-up more.
        self._calls, self._timed, self._doomed = self.in_flight.calls, self.in_flight.timed, self.in_flight.doomed
        self.pickles = PicklePolicy(self.watcher)
        self.receiver = ReplyReceiver(
            self.in_flight,
            self._bodies,
            self.keys,
            self.id,
            shown_url(url),
            self._grant,
            self.pickles,
            keeps_bodies=job is not None,
        )
        self.results: BatchJobReplies | None = None
        self.job: BatchJob | None = None
        if job is None:
            self._replies = ReplyStream(self._connection, self.keys, self.id, self.receiver.on_reply, self._reconcile)
        else:
            self.results = self._replies = BatchJobReplies(
                self._connection, self.keys, self.id, self.receiver.on_reply, self._reconcile, ttl_s=job_ttl_s
            )
            self.job = BatchJob(self._connection, self.keys, job, self.id, job_ttl_s)
        self._reconciler = Recovery(
            self.in_flight, self._publisher, self._replies, self._on_published, self._send_again
        )
        self.loop: asyncio.AbstractEventLoop = cast(Any, None)
        self._sweeper: asyncio.TimerHandle | None = None
        self._gone_since: float | None = None
        self._opening: asyncio.Task[None] | None = None
        self._life: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._users = 0
        self._close_when_idle = False
        self.closed = False

    @classmethod
    @asynccontextmanager
    async def using(cls, url: str, instance: str) -> AsyncGenerator[RequestClient]:
        """Return what `get` does; until the end of the block `leave` does not close it."""
        caller = await cls.get(url, instance)
        caller.use()
        try:
            yield caller
        finally:
            caller.release()

    @classmethod
    async def get(cls, url: str, instance: str) -> RequestClient:
        """Return the open caller that the running loop shares for this instance.

        Raises:
            BrokerUnavailable: Redis cannot be reached.
            ConfigError: ``url`` is not a Redis URL, or ``instance`` cannot be a name.
        """
        while True:
            caller = cls.shared(url, instance)
            if caller is None:
                caller = _shared.setdefault(asyncio.get_running_loop(), {})[url, instance] = cls(url, instance)
            if caller._life is None:
                await caller.open()
            if not caller.closed:  # else its last user has left meanwhile
                return caller

    @classmethod
    def shared(cls, url: str, instance: str) -> RequestClient | None:
        """Return the caller that the running loop has for this instance, if there is one that is not closed."""
        caller = _shared.get(asyncio.get_running_loop(), {}).get((url, instance))
        return None if caller is None or caller.closed else caller

    @property
    def snapshot(self) -> Snapshot:
        return self.watcher.snapshot

    @property
    def connected(self) -> bool:
        return self._connection.connected

    @property
    def takes_writes(self) -> bool:
        """Whether new requests can be accepted, as far as the broker is concerned."""
        return self._connection.connected and not self._connection.refuses_writes

    @property
    def longest(self) -> int:
        """How many bytes a body may have, as far as is known of this broker."""
        return self._connection.longest

    async def open(self) -> None:
        """Connect, create the reply stream and follow the registry.

        Idempotent; all who ask at once wait for the same, and one that is cancelled leaves the others waiting.
        """
        if self._opening is None:
            self.loop = self.in_flight.loop = asyncio.get_running_loop()
            self._opening = self.loop.create_task(self._open(), name="caller opening")
            self._opening.add_done_callback(_retrieve)
        await asyncio.shield(self._opening)

    async def _open(self) -> None:
        try:
            await self._connection.open()
            await self._replies.open()
            await self.watcher.start()
        except BaseException:
            await self._shut()
            raise
        self._connection.on_reconnect(self._on_reconnect)
        self._life = self.loop.create_task(self._live(), name="caller")

    async def _live(self) -> None:
        """Notice the end of the loop, where nobody called `close`: `asyncio.run` cancels what is left."""
        try:
            await self.loop.create_future()
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
        for call in list(self._calls.values()):
            if self.results is None:
                self.in_flight.give_up(call)
            else:  # what a job has on its stream outlives us
                del self._calls[call.id]
            call.conclude(RequestCancelled(call.shown_id))
        await self._shut()

    # -- the end of those who share it

    def use(self) -> None:
        """Keep `leave` from closing this caller, until `release`."""
        self._users += 1

    def release(self) -> None:
        self._users -= 1
        self._close_if_idle()

    async def all_queued(self, timeout_s: float) -> int:
        """Wait until each call made so far is durably queued or refused; return how many are neither in time."""
        unsure = [call.accepted() for call in self._calls.values() if call.entry is None]
        if not unsure:
            return 0
        _, late = await asyncio.wait([asyncio.ensure_future(one) for one in unsure], timeout=timeout_s)
        return len(late)

    async def leave(self) -> None:
        """Close it once it has neither users nor calls in flight. Nobody's call is given up."""
        self._close_when_idle = True
        self._close_if_idle()
        if self._closing is not None:
            await asyncio.shield(self._closing)

    def _close_if_idle(self) -> None:
        if not self._close_when_idle or self._users or self._calls or self.closed:
            return
        if self._opening is not None and not self._opening.done():
            return  # whoever opens it has a use for it
        if tasks_that_start(self.url, self.keys.instance):
            return  # the end of their calls comes here again
        self._end()  # at once: what is called from now on connects anew
        self._closing = self.loop.create_task(self._shut(), name="caller closing")

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
        self.receiver.close()
        # By hand, as the dictionary's weak keys are loops that their callers keep alive.
        shared = _shared.get(self.loop, {})
        if shared.get((self.url, self.keys.instance)) is self:
            del shared[self.url, self.keys.instance]
            if not shared:
                del _shared[self.loop]

    # -- asking

    def dispatch(
        self,
        endpoint: EndpointRecord,
        header: Header,
        body: bytes,
        then: Callable[[CallOutcome], None],
        *,
        shard_key: str | None = None,
        timeout_s: float | None = None,
    ) -> Call:
        """Send a request to one of the endpoint's backends, by its traffic, and copies to its shadows.

        ``then`` hears the outcome exactly once, in the loop, unless the call is cancelled first.

        Raises:
            BackendNotFound: the endpoint sends to nobody.
            CallMethodRefused: the endpoint does not offer the method.
            PayloadTooLarge: the body is larger than Redis takes.
        """
        if endpoint.call_methods is not None:
            check_call_method(endpoint, header.call)
        backend = self.choose(endpoint, shard_key)
        call = self.submit(backend, header, body, then, timeout_s=timeout_s)
        if endpoint.shadows:
            self.shadows.send(endpoint, header, body)
        return call

    def choose(self, endpoint: EndpointRecord, shard_key: str | None) -> BackendRecord:
        """Return the backend that gets the next request, by the endpoint's traffic.

        Raises:
            BackendNotFound: the endpoint sends to nobody.
        """
        backends = self.watcher.snapshot.backends
        tag = traffic.choose(endpoint.traffic, shard_key, self._chance())
        backend = None if tag is None else backends.get(tag)
        if backend is None:
            raise BackendNotFound(str(tag), backends)
        return backend

    def submit(
        self,
        backend: BackendRecord,
        header: Header,
        body: bytes,
        then: Callable[[CallOutcome], None],
        *,
        timeout_s: float | None = None,
        batch: bool = False,
    ) -> Call:
        """Send a request to ``backend``; see `dispatch`. Never blocks.

        With ``batch`` it lies on the batch stream: replicas take interactive requests first, and some of the queue's
        places are kept for them.

        Raises:
            PayloadTooLarge: the body is larger than Redis takes, or than may be queued.
            TypeError: the header holds what JSON cannot.
        """
        large = len(body) > LARGE
        check_size(body, self.longest if large else None)
        id_ = self.next_id()
        if timeout_s is not None:
            header.deadline_ms = self.deadline_ms(timeout_s)
        raw = RawEntry(id_.encode(), self.name, header.dump(), None if large else body, len(body) if large else 0)
        call = Call(self.in_flight, id_, raw, then)
        call.batch = batch
        if large:
            call.body = body
        self.begin(call, backend, timeout_s)
        return call

    def deadline_ms(self, timeout_s: float) -> int:
        """Return when, by the broker's clock, what begins now has taken ``timeout_s``."""
        return int(self._connection.now_ms() + timeout_s * 1000)

    def begin(
        self, call: Call, backend: BackendRecord, timeout_s: float | None = None, entry: bytes | None = None
    ) -> None:
        """Send a call that is made, for the first time or again. With an ``entry`` it lies on its stream already.

        Raises:
            PayloadTooLarge: the request alone has more bytes than may be queued.
        """
        config = backend.config
        limit: int = config.get("max_queued_requests", MAX_QUEUED)
        limit_bytes: int = config.get("max_queued_bytes", MAX_QUEUED_BYTES)
        if call.batch:
            limit, limit_bytes = batch_limit(limit), batch_limit(limit_bytes)
        call.backend, call.record = backend.tag, backend
        call.limit, call.limit_bytes = limit, limit_bytes
        raw = call.raw
        if (raw.body is None or len(raw.body) > SMALL) and raw.size_bytes > most_bytes(limit_bytes):
            raise PayloadTooLarge(raw.size_bytes, limit_bytes, f"max_queued_bytes of {backend.tag!r}")
        call.entry, call.unsure, call.answered = entry, False, False
        call.since_ms = self._connection.now_ms()
        self._calls[call.id] = call
        if self.closed:
            self.loop.call_soon(self.in_flight.finish, call, self._unavailable("the connection was closed"))
            return
        if timeout_s is not None:
            call.timeout_s = timeout_s
            call.deadline = self.loop.time() + timeout_s
            self._timed[call.id] = call
        if self._sweeper is None:
            self._sweeper = self.loop.call_later(_SWEEP_S, self._sweep)
        if entry is None:
            self._send(call)

    async def accepted_before(self, backends: Iterable[str]) -> dict[str, tuple[str, bytes]]:
        """Return what lies on batch streams in the name of this job: backend and entry, by the id of the call."""
        found: dict[str, tuple[str, bytes]] = {}
        for backend in backends:
            try:
                entries = await self._publisher.find_of(backend, self.id)
            except NotPermitted:
                assert self.job is not None
                log.warning(
                    "cannot read which items of job %r are queued for %r: they are sent again", self.job.name, backend
                )
                continue
            for id_, entry in entries.items():
                found[id_.decode()] = backend, entry
        return found

    def withdraw(self, backend: str, entry: bytes) -> None:
        """Take an item of the job back from a batch stream."""
        self._publisher.withdraw(backend, entry, batch=True)

    def dead_queue(self, backend: str) -> DeadLetterStream:
        return DeadLetterStream(self._connection, self.keys, backend)

    async def drain(self) -> None:
        """Return when all replies that have been written by now have been heard."""
        await self._replies.drain()
        await self.receiver.drain()

    def _take_back(self, call: Call, entry: bytes) -> None:
        self._publisher.withdraw(call.backend, entry, batch=call.batch)
        self._drop_body(call)

    def _send(self, call: Call) -> None:
        if call.body:
            # Its body is stored only if there is room for it.
            then = partial(self._on_reserved, call)
            self._publisher.reserve(
                call.backend, call.raw, call.limit, then, batch=call.batch, limit_bytes=call.limit_bytes
            )
            if len(self._calls) == 1:
                self._connection.hurry()
        else:
            self._publish(call, call.limit, call.limit_bytes)

    def _on_reserved(self, call: Call, result: QueueFull | Exception | None) -> None:
        if call.id not in self._calls:  # given up meanwhile
            self._doomed.pop(call.id, None)
            if result is None:
                self._publisher.forget_reservation(call.backend, call.raw)
        elif result is None:
            self._put_body(call)
            self._publish(call, call.limit, call.limit_bytes)
        else:
            self.in_flight.finish(call, self._refusal(call, result))

    def _publish(self, call: Call, limit: int, limit_bytes: int) -> None:
        then = partial(self._on_published, call)
        self._publisher.publish(call.backend, call.raw, limit, then, batch=call.batch, limit_bytes=limit_bytes)
        if len(self._calls) == 1:
            self._connection.hurry()

    def _send_again(self, call: Call, accepted: bool) -> None:
        if not accepted:
            self._send(call)
            return
        if call.body:
            self._put_body(call, patient=True)
        self._publish(call, NO_LIMIT, NO_LIMIT)

    def _put_body(self, call: Call, *, patient: bool = False) -> None:
        ttl_ms = int(call.timeout_s * 1000) + _BODY_SLACK_MS if call.timeout_s else _BODY_TTL_MS
        key, then = self.keys.body(call.backend, call.id), partial(self._on_body_put, call)
        self._bodies.put(key, call.body, ttl_ms, then, patient=patient)

    def _on_body_put(self, call: Call, result: Any) -> None:
        if isinstance(result, Exception):
            self.in_flight.break_off(call, self._refusal(call, result))

    def _drop_body(self, call: Call) -> None:
        if call.body:
            self._bodies.drop(self.keys.body(call.backend, call.id))

    # -- looking

    async def backend_stats(self) -> dict[str, BackendStats]:
        """Return what each backend has to do and has done, by tag. Raises `BrokerUnavailable`."""
        tags = sorted(self.watcher.snapshot.backends)
        found = await asyncio.gather(*[read_stats(self._connection, self.keys, tag) for tag in tags])
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
            self.in_flight.finish(call, self._refusal(call, result))

    def _refusal(self, call: Call, result: object) -> PenstockError:
        if isinstance(result, QueueFull):
            if result.in_bytes:
                return Overloaded(
                    call.backend, result.depth, call.limit_bytes, result.retry_after_s, call.raw.size_bytes
                )
            return Overloaded(call.backend, result.depth, call.limit, result.retry_after_s)
        if isinstance(result, BrokerFull):
            return Overloaded(call.backend, 0, call.limit)
        if isinstance(result, StringTooLong):
            return too_long(call.body, len(call.body) - 1)
        if isinstance(result, BrokerRefused) and not isinstance(result, NotPermitted):
            # By a script of the request stream that something else than a lack of memory has ended.
            return self._unavailable(f"it refused the request: {result.said}")
        assert isinstance(result, PenstockError)
        return result

    def _unavailable(self, reason: str) -> BrokerUnavailable:
        return BrokerUnavailable(shown_url(self.url), reason)

    def _grant(self, call: Call, taken: int) -> None:
        tell_taken(self._connection, self.keys, call.backend, call.id, taken)
        self._replies.trim()  # or what a fast stream has sent in a fifth of a second would still lie there

    def _sweep(self) -> None:
        # One sweep for all deadlines instead of a timer for each request.
        self._sweeper = None
        now = self.loop.time()
        for call in [call for call in self._timed.values() if call.deadline <= now]:
            self.in_flight.break_off(call, RequestTimeout(f"backend {call.backend!r}", call.timeout_s))
        for incoming in self.in_flight.streaming.values():
            if now - incoming.granted_at > REPEAT_S:
                incoming.grant()
        if self._connection.connected:
            self._gone_since = None
        elif self._gone_since is None:
            self._gone_since = now
        elif now - self._gone_since > _GIVE_UP_S:
            for call in list(self._calls.values()):
                self.in_flight.finish(call, self._unavailable(f"it has been away for {_GIVE_UP_S:g} s"))
        if self._calls:
            self._sweeper = self.loop.call_later(_SWEEP_S, self._sweep)
        else:
            self._gone_since = None
            self._close_if_idle()

    # -- after the connection or Redis's memory was lost

    async def _on_reconnect(self) -> None:
        while self._connection.connected:
            try:
                await self._replies.renew()
                await self._reconcile()
                return
            except BrokerRefused as e:
                log.error("cannot look for what was in flight: %s", e)
            except BrokerUnavailable as e:
                # Of a server that has come back and refuses writes. If the connection broke again, the loop ends.
                log.debug("cannot look for what was in flight: %s", e)
            await asyncio.sleep(_RETRY_S)

    async def _reconcile(self) -> None:
        await self._reconciler.reconcile()


_shared: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str], RequestClient]] = (
    weakref.WeakKeyDictionary()
)


def _retrieve(task: asyncio.Task[None]) -> None:
    """Whoever waited for it may be gone: what it raised is not to be reported as never retrieved."""
    if not task.cancelled():
        task.exception()
