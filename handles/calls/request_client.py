"""Request client: publishes requests and receives their replies, for handles, proxies and batch producers.

The way of a call: `RequestClient.dispatch` selects the backend, `CallPublisher` appends the request to the backend's
stream, `ReplyReceiver` matches the reply to the call, and `CallsInFlight` ends the call and calls its ``on_outcome``.
After a broken connection `Recovery` finds the outcome of each call, and publishes again the calls that Redis lost.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from ...broker.queue.dead_letters import DeadLetterStream
from ...broker.queue.flow_control import grant_credit
from ...broker.queue.publisher import Publisher
from ...broker.queue.queued_bytes import SMALL, most_bytes
from ...broker.queue.reply_stream import ReplyStream
from ...broker.queue.stats import BackendStats, read_stats
from ...broker.registry.records import BackendRecord, EndpointRecord, Snapshot
from ...broker.registry.store import Registry
from ...broker.registry.watcher import Watcher
from ...broker.transport.connection import RedisConnection
from ...broker.transport.dial import user_of
from ...broker.transport.url import shown_url
from ...broker.wire.call_ids import new_ids
from ...broker.wire.keys import Keys
from ...broker.wire.requests import Header, RawEntry
from ..errors import BackendNotFound, PayloadTooLarge, RequestCancelled
from ..options import check_call_method
from . import tracing, traffic
from .call import Call, CallOutcome, CallsInFlight, queue_limits
from .call_publisher import CallPublisher
from .kept.kept_requests import KeptRequests
from .large_bodies import LEAST_LARGE, LargeBodies, check_size, is_large
from .pickle_policy import PicklePolicy
from .recovery import Recovery
from .reply_receiver import FindReceiver, ReplyReceiver
from .shadowing import ShadowTraffic
from .sweep import Sweep


class OpenReplyStream(Protocol):
    """Creates the reply stream of a client; see `ReplyStream`."""

    def __call__(
        self,
        commands: RedisConnection,
        keys: Keys,
        caller: str,
        on_reply: Callable[[list[bytes]], None],
        on_loss: Callable[[], Awaitable[None]],
    ) -> ReplyStream: ...


class Links(NamedTuple):
    """The parts that connect a request client with a broker. ``penstock.testing`` replaces all of them."""

    connection: RedisConnection
    watcher: Watcher
    publisher: Publisher
    reply_stream: OpenReplyStream
    send_credit: Callable[[str, int], None]
    """Reports how many bytes of the streamed reply to a call have been read, by the id of the call."""


class RequestClient:
    """Publishes requests to the backends of one instance and receives their replies.

    It belongs to the event loop in which it is created, and ends with that loop. Calls can be made from the end of
    `open` to `close`.
    """

    def __init__(
        self,
        url: str,
        instance: str,
        *,
        name: str | None = None,
        reply_stream: OpenReplyStream = ReplyStream,
        find_receiver: FindReceiver | None = None,
        keep_calls: bool = False,
        links: Links | None = None,
    ) -> None:
        """Create a client that is not connected yet.

        Args:
            url: the Redis URL.
            instance: name of the instance.
            name: the name by which replicas address the client; by default a random one.
            reply_stream: creates the reply stream.
            find_receiver: finds the receiver of a reply to a call that is not in flight; by default that of a kept
                request (`kept`).
            keep_calls: requests and replies outlive the client, because another client of the same name continues.
            links: what connects it instead of Redis; then ``reply_stream`` is theirs.
        """
        self.url, self.keys = url, Keys(instance)
        self.loop = asyncio.get_running_loop()
        self.id = self.keys.caller(user_of(url), secrets.token_hex(6) if name is None else name)
        """Id of this caller: it names the reply stream, and entries carry it."""
        self.wire_id = self.id.encode()
        """The id as entries hold it."""
        self._keep_calls = keep_calls
        self._links = links
        if links is None:
            self._connection = RedisConnection(url, name=f"penstock-caller-{secrets.token_hex(4)}")
        else:
            self._connection, reply_stream = links.connection, links.reply_stream
        self.registry = Registry(self._connection, self.keys)
        self.watcher = Watcher(url, self.registry, self.keys) if links is None else links.watcher
        self.next_id = new_ids().__next__
        """Returns the id of the next request."""
        # An own generator: processes that seed Python's global one alike would all select the same backends.
        self._random = random.Random().random
        self.pickles = PicklePolicy(self.watcher)
        self._publisher = Publisher(self._connection, self.keys) if links is None else links.publisher
        self._bodies = LargeBodies(self._connection, self.keys, self.id)
        self.shadows = ShadowTraffic(self.watcher, self._publisher, self._bodies, self.next_id)
        self.in_flight = CallsInFlight(self.loop, self._publisher, self._bodies)
        self._call_publisher = CallPublisher(self._connection, self._publisher, self.in_flight, self._bodies)
        self.kept = KeptRequests(
            self._connection,
            self.keys,
            self.wire_id,
            self.watcher,
            self._publisher,
            self._bodies,
            self.next_id,
            self.select_backend,
            self.shadows.publish,
            self._on_idle,
        )
        """The kept requests that this client submits or waits for."""
        self._receiver = ReplyReceiver(
            self.in_flight,
            self._bodies,
            self.pickles,
            shown_url(url),
            self._send_credit,
            find_receiver=find_receiver or self.kept.waiter_of,
            keep_bodies=keep_calls,
        )
        self._replies = reply_stream(self._connection, self.keys, self.id, self._receiver.on_entry, self._recover)
        self._recovery = Recovery(
            self._connection, self.in_flight, self._publisher, self._call_publisher, self._replies
        )
        self._sweep = Sweep(self._connection, self.in_flight, self._on_idle)
        self._opening: asyncio.Task[None] | None = None
        self._life: asyncio.Task[None] | None = None

    @property
    def snapshot(self) -> Snapshot:
        """The registry as this client last saw it."""
        return self.watcher.snapshot

    @property
    def connection(self) -> RedisConnection:
        """The connection for commands other than those of calls."""
        return self._connection

    @property
    def connected(self) -> bool:
        return self._connection.connected

    @property
    def closed(self) -> bool:
        return self.in_flight.is_closed

    @property
    def takes_writes(self) -> bool:
        """Whether the broker is connected and accepts writes, so that new requests can be accepted."""
        return self._connection.connected and not self._connection.refuses_writes

    @property
    def outage_s(self) -> float:
        """Seconds for which the broker has been away or has refused writes; 0 while new requests can be accepted."""
        return self._connection.outage_s

    @property
    def longest(self) -> int:
        """The most bytes of a body that the broker takes, as far as is known."""
        return self._connection.max_string_bytes

    # -- lifetime

    @property
    def is_open(self) -> bool:
        """Whether `open` has succeeded."""
        return self._life is not None

    async def open(self) -> None:
        """Connect, create the reply stream and follow the registry.

        Concurrent calls wait for the same connection attempt. Cancelling one of them does not cancel the attempt.

        Raises:
            BrokerUnavailable: Redis cannot be reached, or rejected the login.
            BrokerRefused: Redis answered with an error, such as a missing permission.
        """
        if self._opening is None:
            self._opening = self.loop.create_task(self._open(), name="request client opening")
            self._opening.add_done_callback(_retrieve_exception)
        await asyncio.shield(self._opening)

    async def _open(self) -> None:
        try:
            await self._connection.open()
            await self._replies.open()
            await self.watcher.start()
        except BaseException:
            await self._disconnect()
            raise
        self._connection.on_reconnect(self._recovery.on_reconnect)
        self._connection.on_reconnect(self.kept.watch_again)
        self._life = self.loop.create_task(self._live(), name="request client")

    async def _live(self) -> None:
        """Mark the client closed when its loop ends without `close`: ``asyncio.run`` cancels the remaining tasks."""
        try:
            await self.loop.create_future()
        finally:
            self._mark_closed()

    async def close(self) -> None:
        """End the calls in flight with `RequestCancelled`, delete the reply stream and disconnect. Idempotent."""
        if self.closed:
            return
        self.in_flight.is_closed = True
        if self._opening is not None and not self._opening.done():
            self._opening.cancel()
            await asyncio.wait([self._opening])
        for call in list(self.in_flight.by_id.values()):
            error = RequestCancelled(call.shown_id)
            if self._keep_calls:
                self.in_flight.finish(call, error)
            else:
                self.in_flight.abort(call, error)
        await self._disconnect()

    async def _disconnect(self) -> None:
        self._mark_closed()
        if self._life is not None:
            self._life.cancel()
        await self.watcher.close()
        await self._replies.close()
        await self._connection.close()

    def _mark_closed(self) -> None:
        """Stop everything that can be stopped without waiting."""
        self.in_flight.is_closed = True
        self._sweep.stop()
        self._publisher.counts.close()
        self._receiver.close()
        self.kept.close()

    def _on_idle(self) -> None:
        """Called when the last call in flight has ended."""

    # -- calls

    def dispatch(
        self,
        endpoint: EndpointRecord,
        header: Header,
        body: bytes,
        on_outcome: Callable[[CallOutcome], None],
        *,
        shard_key: str | None = None,
        timeout_s: float | None = None,
    ) -> Call:
        """Publish a request to one of the endpoint's backends, and copies to its shadow backends. Never blocks.

        Args:
            endpoint: the endpoint, by whose traffic the backend is selected.
            header: head of the request; its deadline is set from ``timeout_s``.
            body: body of the request.
            on_outcome: called once with the outcome, on the event loop, unless the call is cancelled first.
            shard_key: requests with the same key go to the same backend; None selects by the weights alone.
            timeout_s: seconds until the request expires; None for never.

        Raises:
            BackendNotFound: the endpoint has no backend.
            CallMethodRefused: the endpoint does not offer the method.
            PayloadTooLarge: the body is larger than Redis takes, or than may be queued.
        """
        if endpoint.call_methods is not None:
            check_call_method(endpoint, header.call)
        backend = self.select_backend(endpoint, shard_key)
        if tracing.spans is None:
            call = self.send(backend, header, body, on_outcome, timeout_s=timeout_s)
        else:
            traced, spans = tracing.spans.begin_call(endpoint.name, backend.tag, header)
            with spans.ended_by_error():
                call = self.send(backend, traced, body, spans.then(on_outcome), timeout_s=timeout_s)
            call.spans = spans
            call.accepted().add_done_callback(spans.accepted)
        if endpoint.shadows:
            self.shadows.publish(endpoint, header, body)
        return call

    def select_backend(self, endpoint: EndpointRecord, shard_key: str | None) -> BackendRecord:
        """Return the backend of the next request, by the endpoint's traffic.

        Raises:
            BackendNotFound: the endpoint has no backend.
        """
        backends = self.watcher.snapshot.backends
        tag = traffic.choose(endpoint.traffic, shard_key, self._random())
        backend = None if tag is None else backends.get(tag)
        if backend is None:
            raise BackendNotFound(tag or "", backends)
        return backend

    def send(
        self,
        backend: BackendRecord,
        header: Header,
        body: bytes,
        on_outcome: Callable[[CallOutcome], None],
        *,
        timeout_s: float | None = None,
        batch: bool = False,
    ) -> Call:
        """Publish a request to ``backend``; see `dispatch`. With ``batch`` it goes to the batch stream.

        Raises:
            PayloadTooLarge: the body is larger than Redis takes, or than may be queued.
            TypeError: the header holds a value that JSON cannot represent.
        """
        large = len(body) > LEAST_LARGE and is_large(len(body), len(self.in_flight.by_id))
        if large:
            check_size(body, self.longest)
        id_ = self.next_id()
        if timeout_s is not None:
            header.deadline_ms = self.deadline_ms(timeout_s)
        raw = RawEntry(id_.encode(), self.wire_id, header.dump(), None if large else body, len(body) if large else 0)
        call = Call(self.in_flight, id_, raw, on_outcome, body=body if large else b"", batch=batch)
        self.start(call, backend, timeout_s)
        return call

    def deadline_ms(self, timeout_s: float) -> int:
        """Return the time ``timeout_s`` seconds from now, by the broker's clock, in milliseconds."""
        return int(self._connection.now_ms() + timeout_s * 1000)

    def start(
        self, call: Call, backend: BackendRecord, timeout_s: float | None = None, entry: bytes | None = None
    ) -> None:
        """Publish a call, for the first time or again after a refusal.

        Args:
            call: the call.
            backend: where to publish it.
            timeout_s: seconds until it expires.
            entry: id of its entry, if an earlier client of the same name has published it. Then this client only waits
                for the reply.

        Raises:
            PayloadTooLarge: the request alone has more bytes than may be queued.
        """
        call.limits = limits = queue_limits(backend, batch=call.batch)
        raw = call.raw
        if (raw.body is None or len(raw.body) > SMALL) and raw.size_bytes > most_bytes(limits.bytes):
            raise PayloadTooLarge(raw.size_bytes, limits.bytes, f"max_queued_bytes of {backend.tag!r}")
        call.backend, call.record = backend.tag, backend
        call.entry, call.fate_unknown, call.has_reply = entry, False, False
        call.started_ms = self._connection.now_ms()
        in_flight = self.in_flight
        in_flight.by_id[call.id] = call
        if in_flight.is_closed:
            error = self._call_publisher.unavailable("the connection was closed")
            self.loop.call_soon(in_flight.finish, call, error)
            return
        if timeout_s is not None:
            call.timeout_s = timeout_s
            call.deadline_s = self.loop.time() + timeout_s
            in_flight.timed[call.id] = call
        self._sweep.ensure_running()
        if entry is None:
            self._call_publisher.publish(call)

    async def wait_until_queued(self, timeout_s: float) -> int:
        """Wait until each call in flight is durably queued or refused. Return the number of calls that are neither."""
        waiting = [call.accepted() for call in self.in_flight.by_id.values() if call.entry is None]
        if not waiting:
            return 0
        _, late = await asyncio.wait([asyncio.ensure_future(one) for one in waiting], timeout=timeout_s)
        return len(late)

    async def drain_replies(self) -> None:
        """Return once all replies that have been written by now are passed on.

        Raises:
            BrokerUnavailable: Redis cannot be reached.
        """
        await self._replies.drain()
        await self._receiver.drain()

    # -- what else the connection serves

    async def backend_stats(self) -> dict[str, BackendStats]:
        """Return the stats of each backend, by tag.

        Raises:
            BrokerUnavailable: Redis cannot be reached.
        """
        tags = sorted(self.watcher.snapshot.backends)
        found = await asyncio.gather(*[read_stats(self._connection, self.keys, tag) for tag in tags])
        return dict(zip(tags, found, strict=True))

    def dead_letter_stream(self, backend: str) -> DeadLetterStream:
        """Return the dead letters of a backend."""
        return DeadLetterStream(self._connection, self.keys, backend)

    def _send_credit(self, call: Call, read_bytes: int) -> None:
        if self._links is not None:
            self._links.send_credit(call.id, read_bytes)
            return
        grant_credit(self._connection, self.keys, call.backend, call.id, read_bytes)
        self._replies.trim()  # the reply stream trims itself 5 times a second, too seldom for a fast stream

    async def _recover(self) -> None:
        # A method, as the reply stream is given it before the recovery, which needs the reply stream, exists.
        await self._recovery.recover()
        await self.kept.watch_again()


def _retrieve_exception(task: asyncio.Task[None]) -> None:
    """Keep asyncio from logging the exception as never retrieved, when everything that waited was cancelled."""
    if not task.cancelled():
        task.exception()
