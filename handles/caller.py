"""One way to publish and one to receive replies: the core of every handle, every proxy and every batch producer.

A `Caller` belongs to one process and loop. It keeps each request that it published until it is answered, so that after a
broken connection it can find out what became of it, and publish again what Redis lost.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import secrets
import weakref
from collections import defaultdict
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Union

from redis.exceptions import OutOfMemoryError, RedisError

from ..broker.connection import Connection, FateUnknown
from ..broker.keys import Keys
from ..broker.publishing import Published, Publisher
from ..broker.registry import BackendRecord, EndpointRecord, Registry, Snapshot, Watcher
from ..broker.replies import ReplyStream
from ..broker.wire import LARGE, Entry, Header, Reply
from . import traffic
from .errors import (
    BackendNotFound,
    BrokerUnavailable,
    Overloaded,
    PenstockError,
    RequestCancelled,
    RequestTimeout,
    WireError,
)

log = logging.getLogger(__name__)

Outcome = Union[Reply, BaseException]
"""A reply, which may carry an error of the backend; or why there is none."""

_SWEEP_S = 0.05
_GIVE_UP_S = 60.0
"""A broker that is away for this long fails even accepted calls: they are durable, but nobody should wait for ever."""
_BODY_TTL_MS = 24 * 3600 * 1000
_UNLIMITED = 2**53


class Call:
    """One request on its way."""

    __slots__ = (
        "_accepted",
        "_caller",
        "backend",
        "deadline",
        "entry",
        "fields",
        "id",
        "limit",
        "since_ms",
        "then",
        "timeout_s",
        "unsure",
        "withdrawn",
    )

    def __init__(
        self, caller: Caller, id: str, backend: str, fields: list[bytes], limit: int, then: Callable[[Outcome], None]
    ) -> None:
        self._caller, self.id, self.backend, self.fields, self.limit, self.then = (
            caller,
            id,
            backend,
            fields,
            limit,
            then,
        )
        self.entry: bytes | None = None
        """Its id on the stream, once it is durably there."""
        self.since_ms = 0.0
        self.deadline = 0.0
        self.timeout_s = 0.0
        self.unsure = False
        self.withdrawn = False
        self._accepted: asyncio.Future[None] | None = None

    def accepted(self) -> Awaitable[None]:
        """Return a future that is done once the request is durably on its stream, or that raises why it never will be."""
        if self._accepted is None:
            self._accepted = asyncio.get_running_loop().create_future()
            if self.entry is not None:
                self._accepted.set_result(None)
        return self._accepted

    def cancel(self) -> None:
        """Give the request up: never started if it is still waiting, cancelled if it runs and can be. Idempotent."""
        self._caller.withdraw(self)


class Caller:
    """Publishes requests to every backend of an instance and receives their replies.

    Only for the loop that opened it. `get` shares one among all who ask in the same loop.
    """

    def __init__(self, url: str, instance: str) -> None:
        self.url, self.keys = url, Keys(instance)
        self.id = secrets.token_hex(6)
        self._connection = Connection(url, name=f"penstock-caller-{self.id}")
        self.registry = Registry(self._connection, self.keys)
        self.watcher = Watcher(url, self.registry, self.keys)
        self._replies = ReplyStream(self._connection, self.keys, self.id, self._on_reply, self._reconcile)
        self._in_flight: dict[str, Call] = {}
        self._timed: dict[str, Call] = {}
        self._numbers = itertools.count(1)
        self._sweeper: asyncio.TimerHandle | None = None
        self._reconciling = asyncio.Lock()
        self._gone_since: float | None = None
        self._fetches: set[asyncio.Task[None]] = set()
        self._opening: asyncio.Task[None] | None = None
        self.closed = False

    @classmethod
    async def get(cls, url: str, instance: str) -> Caller:
        """Return the open caller that the running loop shares for this instance.

        Raises:
            BrokerUnavailable: Redis cannot be reached.
            ConfigError: ``url`` is not a Redis URL, or ``instance`` cannot be a name.
        """
        shared = _shared.setdefault(asyncio.get_running_loop(), {})
        # A forked child has its parent's objects but not its loop's threads and tasks.
        key = (url, instance, os.getpid())
        caller = shared.get(key)
        if caller is None or caller.closed:
            caller = shared[key] = cls(url, instance)
        try:
            await caller.open()
        except BaseException:
            if shared.get(key) is caller and not caller._in_flight:
                del shared[key]
            raise
        return caller

    @property
    def snapshot(self) -> Snapshot:
        return self.watcher.snapshot

    @property
    def connected(self) -> bool:
        return self._connection.connected

    async def open(self) -> None:
        """Connect, create the reply stream and follow the registry. Idempotent; all who ask at once wait for the same."""
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_task(self._open(), name="caller opening")
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

    async def close(self) -> None:
        """Fail what is in flight with `RequestCancelled`, delete the reply stream and disconnect."""
        if self.closed:
            return
        for call in list(self._in_flight.values()):
            self.withdraw(call)
            call.then(RequestCancelled(call.id))
        await self._shut()

    async def _shut(self) -> None:
        self.closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for fetch in self._fetches:
            fetch.cancel()
        await self.watcher.close()
        await self._replies.close()
        await self._connection.close()

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
        backends = self.watcher.snapshot.backends
        tag = traffic.choose(endpoint.traffic, shard_key, random.random())
        backend = None if tag is None else backends.get(tag)
        if backend is None:
            raise BackendNotFound(str(tag), backends)
        call = self.submit(backend, header, body, then, timeout_s=timeout_s)
        if endpoint.shadows:
            self._shadow(endpoint, header, body)
        return call

    def submit(
        self,
        backend: BackendRecord,
        header: Header,
        body: bytes,
        then: Callable[[Outcome], None],
        *,
        timeout_s: float | None = None,
    ) -> Call:
        """Send a request to ``backend``; see `dispatch`. Never blocks, and raises nothing."""
        id = f"{self.id}-{next(self._numbers)}"
        connection = self._connection
        now_ms = connection.now_ms()
        if timeout_s is not None:
            header.deadline_ms = int(now_ms + timeout_s * 1000)
        large = len(body) > LARGE
        fields = Entry(id, self.id, header, b"" if large else body, large).fields()
        call = Call(self, id, backend.tag, fields, backend.config["max_queued_requests"], then)
        call.since_ms = now_ms
        self._in_flight[id] = call
        if timeout_s is not None:
            call.timeout_s = timeout_s
            call.deadline = asyncio.get_running_loop().time() + timeout_s
            self._timed[id] = call
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)
        if large:
            self._put_body(backend.tag, id, body, timeout_s)
        self._publish(call, call.limit)
        return call

    def withdraw(self, call: Call) -> None:
        """Give a call up; see `Call.cancel`."""
        if self._in_flight.pop(call.id, None) is None:
            return
        self._timed.pop(call.id, None)
        if call.entry is not None:
            self._publisher.withdraw(call.backend, call.entry)
        else:
            call.withdrawn = True  # its id on the stream is not known yet
        if call._accepted is not None and not call._accepted.done():
            call._accepted.cancel()

    def _publish(self, call: Call, limit: int) -> None:
        self._publisher.publish(call.backend, call.fields, limit, partial(self._on_published, call))

    def _put_body(self, backend: str, id: str, body: bytes, timeout_s: float | None) -> None:
        # Ahead of its entry on the same connection, so that no replica can look for it too early. If there is no memory
        # for it there is none for the entry either.
        ttl_ms = _BODY_TTL_MS if timeout_s is None else int(timeout_s * 1000) + 60_000
        self._connection.post(_ignore, "SET", self.keys.body(backend, id), body, "PX", ttl_ms, repeat=True)

    def _shadow(self, endpoint: EndpointRecord, header: Header, body: bytes) -> None:
        for tag, proportion in endpoint.shadows.items():
            backend = self.watcher.snapshot.backends.get(tag)
            if backend is None or random.random() >= proportion:
                continue
            id = f"{self.id}-s{next(self._numbers)}"
            large = len(body) > LARGE
            if large:
                self._put_body(tag, id, body, 600.0)
            fields = Entry(id, "", header, b"" if large else body, large).fields()
            # What becomes of a copy never touches the caller, least of all a refusal.
            self._publisher.publish(tag, fields, backend.config["max_queued_requests"], _ignore)

    # -- hearing

    def _on_published(self, call: Call, result: Published) -> None:
        if type(result) is bytes:
            call.entry, call.unsure = result, False
            if call.withdrawn:
                self._publisher.withdraw(call.backend, result)
            elif call._accepted is not None and not call._accepted.done():
                call._accepted.set_result(None)
        elif type(result) is int:
            self._refuse(call, Overloaded(call.backend, result, call.limit))
        elif isinstance(result, FateUnknown) and not self.closed:
            call.unsure = True  # until we are connected again, and can look
        elif isinstance(result, OutOfMemoryError):
            self._refuse(call, Overloaded(call.backend, 0, call.limit))
        elif isinstance(result, PenstockError):
            self._refuse(call, result)
        else:
            self._refuse(call, BrokerUnavailable(self.url, f"it refused the request: {result}"))

    def _refuse(self, call: Call, error: PenstockError) -> None:
        if call.fields[-2] == b"large":
            self._connection.post(_ignore, "UNLINK", self.keys.body(call.backend, call.id), repeat=True)
        if call._accepted is not None and not call._accepted.done():
            call._accepted.set_exception(error)
        self._finish(call, error)

    def _finish(self, call: Call, outcome: Outcome) -> None:
        if self._in_flight.pop(call.id, None) is not None:
            self._timed.pop(call.id, None)
            call.then(outcome)

    def _on_reply(self, fields: list[bytes]) -> None:
        try:
            reply = Reply.of(fields)
        except WireError as e:
            log.error("dropped a reply that cannot be read: %s", e)
            call = self._in_flight.get(_id_of(fields))
            if call is not None:
                self._finish(call, e)
            return
        call = self._in_flight.get(reply.id)
        if call is None:
            return  # cancelled, too late, or a second answer after a take-over
        if reply.large:
            task = asyncio.get_running_loop().create_task(self._fetch(call, reply))
            self._fetches.add(task)
            task.add_done_callback(self._fetches.discard)
        else:
            self._finish(call, reply)

    async def _fetch(self, call: Call, reply: Reply) -> None:
        try:
            body = await self._connection.send("GETDEL", self.keys.reply_body(self.id, reply.id))
        except (BrokerUnavailable, RedisError) as e:
            self._finish(call, BrokerUnavailable(self.url, f"cannot fetch the body of a reply: {e}"))
            return
        if body is None:
            self._finish(call, WireError(f"the body of the reply to {reply.id!r} has expired"))
            return
        reply.body, reply.large = body, False
        self._finish(call, reply)

    def _sweep(self) -> None:
        # One sweep for all deadlines instead of a timer for each request.
        self._sweeper = None
        now = asyncio.get_running_loop().time()
        for call in [call for call in self._timed.values() if call.deadline <= now]:
            self.withdraw(call)
            call.then(RequestTimeout(f"backend {call.backend!r}", call.timeout_s))
        if self._connection.connected:
            self._gone_since = None
        elif self._gone_since is None:
            self._gone_since = now
        elif now - self._gone_since > _GIVE_UP_S:
            for call in list(self._in_flight.values()):
                self._refuse(call, BrokerUnavailable(self.url, f"it has been away for {_GIVE_UP_S:g} s"))
        if self._in_flight:
            self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    # -- after the connection or Redis's memory was lost

    async def _on_reconnect(self) -> None:
        await self._replies.renew()
        await self._reconcile()

    async def _reconcile(self) -> None:
        """Find out what became of every call that was sent, and publish again what Redis no longer has."""
        async with self._reconciling:
            # Calls that were never sent are sent by the connection; those sent since it is back are none of our business.
            sent = [call for call in self._in_flight.values() if call.unsure or call.entry is not None]
            if not sent:
                return
            by_backend: defaultdict[str, list[Call]] = defaultdict(list)
            for call in sent:
                by_backend[call.backend].append(call)
            missing: list[Call] = []
            for backend, calls in by_backend.items():
                # A minute of slack, as the clock that numbers entries may have been another server's.
                since_ms = min(call.since_ms for call in calls) - 60_000
                found = await self._publisher.find(backend, b"id", [call.id for call in calls], since_ms)
                for call, entry in zip(calls, found):
                    if entry is None:
                        missing.append(call)
                    else:
                        self._on_published(call, entry)
            # What is not on its stream was answered just now, or is lost; its answer would be on ours.
            await self._replies.drain()
            for call in missing:
                if call.id in self._in_flight:
                    limit = call.limit if call.unsure else _UNLIMITED  # accepted is accepted
                    call.entry, call.unsure = None, False
                    self._publish(call, limit)


_shared: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str, int], Caller]] = (
    weakref.WeakKeyDictionary()
)


def _id_of(fields: list[bytes]) -> str:
    for name, value in zip(fields[::2], fields[1::2]):
        if name == b"id":
            return value.decode(errors="replace")
    return ""


def _ignore(outcome: Any) -> None:
    """Nobody waits for this."""
