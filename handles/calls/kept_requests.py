"""Kept requests of one caller: accept them, wait for their results, read and cancel them.

The result of a kept request stays in Redis. Its record names the callers that wait for it, and the replica sends the
result to the reply stream of each. So waiting needs no command but the first. One command for each backend every few
seconds finds the results whose replica died between storing and sending them.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Union

import orjson

from ...broker.errors import StringTooLong
from ...broker.queue.publisher import Publisher, QueueFull
from ...broker.queue.queued_bytes import NO_LIMIT, SMALL, most_bytes
from ...broker.registry.records import DEFAULTS, BackendRecord, EndpointRecord
from ...broker.registry.watcher import Watcher
from ...broker.results.accepting import Accepted, KeptAdmission, KeptEntry, KeyConflict, SpaceFull
from ...broker.results.reading import KeptReader
from ...broker.results.space import PENDING_S
from ...broker.transport.connection import RedisConnection
from ...broker.wire import exact_json
from ...broker.wire._fields import LARGE
from ...broker.wire.call_ids import shown_id
from ...broker.wire.kept import (
    CANCELLED,
    FAILED,
    FINAL,
    IN_REDIS,
    RequestStatus,
    Result,
    backend_mark,
    fingerprint,
    key_digest,
    mark_of,
    new_id,
)
from ...broker.wire.keys import Keys
from ...broker.wire.replies import Reply
from ...broker.wire.requests import Header, RawEntry
from ..errors import (
    BackendNotFound,
    BrokerFull,
    BrokerRefused,
    BrokerUnavailable,
    IdempotencyConflict,
    Overloaded,
    PayloadTooLarge,
    RequestCancelled,
    RequestNotFound,
    RequestTimeout,
    ResultExpired,
    ResultsFull,
    WireError,
)
from ..options import check_call_method
from .call import queue_limits
from .large_bodies import LargeBodies, check_size, too_long

log = logging.getLogger(__name__)

_CHECK_EVERY_S = 2.0
"""How often to look for results that were stored and never sent."""

_HASHED_HERE_BYTES = 256 * 1024
"""A longer body is hashed on a thread, so that the loop goes on."""

_CHOICE_SLACK_S = 60.0
"""How much longer than a result the choice of a key's backend is kept, from before the request is accepted."""

_backend_mark = lru_cache(4096)(backend_mark)


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """A key, and whose it is."""

    value: str
    credentials: bytes = b""
    """The ``Authorization`` of an HTTP request: clients with different ones never share a key."""


@dataclass(slots=True)
class Ticket:
    """A kept request that was accepted."""

    id: str
    backend: str
    state: str
    is_replayed: bool
    """Whether another request with the same idempotency key was accepted before."""
    waiter: _Waiter | None = None


_Outcome = Union[Result, BaseException, None]  # noqa: UP007 - it is evaluated, also on Python 3.10
"""A result, an error, or None: the result lies in Redis."""


class _Waiter:
    """One wait for the result of a kept request."""

    __slots__ = ("again", "backend", "call", "id", "outcome", "raw", "since_s")

    def __init__(self, loop: asyncio.AbstractEventLoop, caller: bytes, call: str, backend: str, id_: str) -> None:
        self.call, self.backend, self.id = call, backend, id_
        self.raw = caller + b" " + call.encode()
        """As the record of the request names it."""
        self.outcome: asyncio.Future[_Outcome] = loop.create_future()
        self.since_s = math.inf
        """Since when the record of the request names it, by the loop's clock; before, there may be no record."""
        self.again: KeptEntry | None = None
        """The request, if this caller submitted it: Redis may have lost it."""

    def resolve(self, outcome: Reply | BaseException) -> None:
        """End the wait with the reply that the replica sent, or with an error."""
        if self.outcome.done():
            return
        if isinstance(outcome, Reply):
            self.outcome.set_result(None if outcome.codec == IN_REDIS else Result(outcome))
        else:
            self.outcome.set_result(outcome)

    def begin(self) -> None:
        """Note that the record of the request names the waiter."""
        self.since_s = self.outcome.get_loop().time()

    def begin_again(self) -> None:
        """Wait once more: the outcome came before there was a result."""
        self.outcome = self.outcome.get_loop().create_future()
        self.begin()

    def fetch(self) -> None:
        """End the wait: the result lies in Redis."""
        if not self.outcome.done():
            self.outcome.set_result(None)


class KeptRequests:
    """The kept requests that one caller submits, and those that it waits for. Only for the loop of the caller.

    Args:
        connection: of the caller.
        keys: of the instance.
        caller: its id, as entries have it.
        watcher: of the registry.
        publisher: of the caller, for reservations.
        bodies: of the caller.
        new_call: returns the id of another call, which is its secret.
        choose: returns the backend for the next request of an endpoint, with a shard key or None.
        shadow: publishes copies of a request to the shadow backends of its endpoint.
        on_idle: called when nothing is in progress any more.
    """

    def __init__(
        self,
        connection: RedisConnection,
        keys: Keys,
        caller: bytes,
        watcher: Watcher,
        publisher: Publisher,
        bodies: LargeBodies,
        new_call: Callable[[], str],
        choose: Callable[[EndpointRecord, str | None], BackendRecord],
        shadow: Callable[[EndpointRecord, Header, bytes], None],
        on_idle: Callable[[], None],
    ) -> None:
        self._connection, self._keys, self._caller, self._watcher = connection, keys, caller, watcher
        self._publisher, self._bodies = publisher, bodies
        self._new_call, self._choose, self._shadow, self._on_idle = new_call, choose, shadow, on_idle
        self._admission = KeptAdmission(connection, keys)
        self._reader = KeptReader(connection, keys)
        self._waiters: dict[str, _Waiter] = {}
        """By the ids of their calls."""
        self._in_progress = 0
        self._checker: asyncio.TimerHandle | None = None
        self._check: asyncio.Task[None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether anything is in progress."""
        return self._in_progress > 0

    def waiter_of(self, call: str) -> Callable[[Reply | BaseException], None] | None:
        """Return the function that receives the reply to a call; None if no waiter has that id."""
        waiter = self._waiters.get(call)
        return None if waiter is None else waiter.resolve

    def close(self) -> None:
        """End all waits with `RequestCancelled`. The requests go on."""
        if self._checker is not None:
            self._checker.cancel()
        if self._check is not None:
            self._check.cancel()
        for waiter in self._waiters.values():
            waiter.resolve(RequestCancelled(shown_id("", waiter.id)))

    # -- submitting

    async def submit(
        self,
        endpoint: EndpointRecord,
        header: Header,
        body: bytes,
        *,
        key: IdempotencyKey | None = None,
        shard_key: str | None = None,
        timeout_s: float | None = None,
        max_stream_bytes: int,
        waits: bool,
    ) -> Ticket:
        """Return once the request is durably queued, or was by an earlier one with the same key.

        With ``waits``, `result` must be called with the ticket.

        Raises:
            BackendNotFound: the endpoint routes to no backend.
            CallMethodRefused: the endpoint does not offer the method.
            IdempotencyConflict: the key was used for another request.
            Overloaded, ResultsFull: there is no room.
            PayloadTooLarge: the body is larger than Redis takes, or than may be queued.
            BrokerUnavailable: the broker cannot be reached. The request may have been accepted nevertheless.
        """
        check_call_method(endpoint, header.call)
        with self._progress():
            digest, print_ = "", ""
            if key is not None:
                digest = key_digest(endpoint.name, key.credentials, key.value)
                print_ = await _fingerprint(header, body)
                backend = await self._backend_of_key(endpoint, digest, shard_key)
            else:
                backend = self._choose(endpoint, shard_key)
            if timeout_s is not None:
                header.deadline_ms = int(self._connection.now_ms() + timeout_s * 1000)
            id_ = new_id(backend.tag)
            is_large = len(body) > LARGE
            check_size(body, self._connection.max_string_bytes if is_large else None)
            raw = RawEntry(id_.encode(), b"", header.dump(), None if is_large else body, len(body) if is_large else 0)
            kept = KeptEntry(raw, endpoint.name, header.request_id, max_stream_bytes, digest, print_)
            waiter = self._new_waiter(backend.tag, id_) if waits else None
            if waiter is not None and not is_large:
                waiter.again = kept
            try:
                ticket = await self._accept(backend, kept, body if is_large else b"", waiter)
            except BaseException:
                if waiter is not None:
                    self._forget(waiter, unwatch=True)
                raise
            if endpoint.shadows and not ticket.is_replayed:
                self._shadow(endpoint, header, body)
            return ticket

    async def _accept(self, backend: BackendRecord, kept: KeptEntry, large: bytes, waiter: _Waiter | None) -> Ticket:
        raw, (limit, limit_bytes) = kept.raw, queue_limits(backend)
        limit_space: int = backend.config.max_result_bytes
        if max(raw.size_bytes, SMALL) > most_bytes(limit_bytes):
            raise PayloadTooLarge(raw.size_bytes, limit_bytes, f"max_queued_bytes of {backend.tag!r}")
        if large:
            await self._store_body(backend, raw, large, limit, limit_bytes)
        try:
            accepted = await self._admission.accept(
                backend.tag, kept, b"" if waiter is None else waiter.raw, limit, limit_bytes, limit_space
            )
        except BrokerFull:
            raise Overloaded(backend.tag, 0, limit) from None
        if large and not (isinstance(accepted, Accepted) and not accepted.is_replayed):
            self._bodies.drop_request_body(backend.tag, raw.id.decode())
            self._publisher.forget_reservation(backend.tag, raw)
        if isinstance(accepted, QueueFull):
            raise _overloaded(backend.tag, accepted, limit, limit_bytes, raw.size_bytes)
        if isinstance(accepted, SpaceFull):
            raise ResultsFull(backend.tag, accepted.used_bytes, limit_space)
        if isinstance(accepted, KeyConflict):
            raise IdempotencyConflict(kept.endpoint)
        if waiter is not None:
            waiter.id = accepted.id
            waiter.begin()
            if accepted.is_replayed:
                waiter.again = None
        if kept.key and not accepted.is_replayed:
            self._admission.prolong_choice(kept.key)
        return Ticket(accepted.id, backend.tag, accepted.state, accepted.is_replayed, waiter)

    async def _store_body(
        self, backend: BackendRecord, raw: RawEntry, body: bytes, limit: int, limit_bytes: int
    ) -> None:
        loop = asyncio.get_running_loop()
        reserved: asyncio.Future[Any] = loop.create_future()
        self._publisher.reserve(backend.tag, raw, limit, partial(_resolve, reserved), limit_bytes=limit_bytes)
        refused = await reserved
        if isinstance(refused, QueueFull):
            raise _overloaded(backend.tag, refused, limit, limit_bytes, raw.size_bytes)
        if isinstance(refused, BrokerFull):
            raise Overloaded(backend.tag, 0, limit)
        if isinstance(refused, Exception):
            raise refused
        stored: asyncio.Future[Any] = loop.create_future()
        on_stored = partial(_resolve, stored)
        self._bodies.store_request_body(backend.tag, raw.id.decode(), body, PENDING_S * 1000, on_stored)
        result = await stored
        if isinstance(result, Exception):
            self._publisher.forget_reservation(backend.tag, raw)
            if isinstance(result, BrokerFull):
                raise Overloaded(backend.tag, 0, limit)
            raise too_long(body, len(body) - 1) if isinstance(result, StringTooLong) else result

    async def _backend_of_key(self, endpoint: EndpointRecord, digest: str, shard_key: str | None) -> BackendRecord:
        backend = self._choose(endpoint, digest if shard_key is None else shard_key)
        ttl_ms = int((_ttl_s(backend) + _CHOICE_SLACK_S) * 1000)
        chosen = await self._admission.choose_backend(digest, backend.tag, ttl_ms)
        if chosen == backend.tag:
            return backend
        if chosen not in self._watcher.snapshot.backends:
            await self._watcher.refresh()
        if (record := self._watcher.snapshot.backends.get(chosen)) is not None:
            return record
        chosen = await self._admission.choose_backend(digest, backend.tag, ttl_ms, gone=chosen)
        if (record := self._watcher.snapshot.backends.get(chosen)) is None:
            raise BackendNotFound(chosen, self._watcher.snapshot.backends)
        return record

    # -- waiting

    async def result(self, ticket: Ticket, timeout_s: float | None) -> Result:
        """Return the result of a request that was submitted with ``waits``.

        Raises:
            RequestTimeout: there was none after ``timeout_s`` seconds.
            RequestCancelled: it was cancelled.
            ResultExpired, RequestNotFound: its result is gone.
        """
        waiter = ticket.waiter
        assert waiter is not None, "the request was submitted without waits"
        with self._progress():
            return await self._wait(waiter, ticket.state, timeout_s)

    async def wait(self, backend: str, id_: str, timeout_s: float | None) -> Result:
        """Return the result of any kept request. Raises what `result` does."""
        with self._progress():
            waiter = self._new_waiter(backend, id_)
            try:
                state = await self._reader.watch(backend, id_, waiter.raw)
                if state is None:
                    raise RequestNotFound
                waiter.begin()
            except BaseException:
                self._forget(waiter, unwatch=True)
                raise
            return await self._wait(waiter, state, timeout_s)

    async def _wait(self, waiter: _Waiter, state: str, timeout_s: float | None) -> Result:
        loop = asyncio.get_running_loop()
        ends_s = math.inf if timeout_s is None else loop.time() + timeout_s
        result: Result | None = None
        try:
            while result is None:
                if state not in FINAL:
                    left_s = None if ends_s == math.inf else max(0.0, ends_s - loop.time())
                    await asyncio.wait([waiter.outcome], timeout=left_s)
                    if not waiter.outcome.done():
                        raise RequestTimeout(f"backend {waiter.backend!r}", timeout_s or 0.0)
                    outcome = waiter.outcome.result()
                    if isinstance(outcome, BaseException):
                        raise outcome
                    result = outcome
                if result is None and (result := await self._fetch(waiter.backend, waiter.id)) is None:
                    waiter.begin_again()
                    state = await self._reader.watch(waiter.backend, waiter.id, waiter.raw) or FAILED
            return self._checked(waiter.backend, result)
        finally:
            self._forget(waiter, unwatch=result is None)

    async def _fetch(self, backend: str, id_: str) -> Result | None:
        """Return the result of a request; None if it is not final yet.

        Raises:
            RequestCancelled: it was cancelled.
            ResultExpired, RequestNotFound, BackendNotFound: its result is gone.
        """
        if (result := await self._reader.result(backend, id_)) is not None:
            return result
        status, _ = await self._reader.status(backend, id_)
        if status is None:
            if backend not in (known := self._watcher.snapshot.backends):
                raise BackendNotFound(backend, known)
            raise RequestNotFound
        if not status.is_final:
            return None
        if status.status == CANCELLED:
            raise RequestCancelled(status.request_id)
        # It may have ended between the two.
        if (result := await self._reader.result(backend, id_)) is None:
            raise ResultExpired(status.request_id)
        return result

    def _checked(self, backend: str, result: Result) -> Result:
        pickled = result.reply.codec == "pickle" or any(codec == "pickle" for codec, _, _ in result.pieces)
        record = self._watcher.snapshot.backends.get(backend)
        if pickled and not (record is not None and record.config.allow_pickle):
            raise WireError(
                f"the result of backend {backend!r} is pickled, and was not read: "
                "the backend was not created with config={'allow_pickle': True}"
            )
        return result

    def _new_waiter(self, backend: str, id_: str) -> _Waiter:
        loop = asyncio.get_running_loop()
        waiter = _Waiter(loop, self._caller, self._new_call(), backend, id_)
        self._waiters[waiter.call] = waiter
        if self._checker is None:
            self._checker = loop.call_later(_CHECK_EVERY_S, self._begin_check)
        return waiter

    def forget(self, ticket: Ticket) -> None:
        """Stop waiting for the result of a request."""
        if ticket.waiter is not None:
            self._forget(ticket.waiter, unwatch=True)

    def _forget(self, waiter: _Waiter, *, unwatch: bool) -> None:
        if self._waiters.pop(waiter.call, None) is not None and unwatch and self._connection.connected:
            self._reader.unwatch(waiter.backend, waiter.id, waiter.raw)

    # -- results that were not sent

    def _begin_check(self) -> None:
        self._checker = None
        if not self._waiters:
            return
        loop = asyncio.get_running_loop()
        self._checker = loop.call_later(_CHECK_EVERY_S, self._begin_check)
        if self._connection.connected and (self._check is None or self._check.done()):
            self._check = loop.create_task(self._fetch_unsent(loop.time() - _CHECK_EVERY_S))

    async def _fetch_unsent(self, since_s: float) -> None:
        by_backend: defaultdict[str, dict[str, list[_Waiter]]] = defaultdict(lambda: defaultdict(list))
        for waiter in self._waiters.values():
            if waiter.since_s <= since_s:
                by_backend[waiter.backend][waiter.id].append(waiter)
        try:
            for backend, waiters in by_backend.items():
                for id_ in await self._reader.finished(backend, list(waiters)):
                    for waiter in waiters[id_]:
                        waiter.fetch()
        except (BrokerUnavailable, BrokerRefused) as e:
            log.debug("cannot look for results that were not sent: %s", e)

    async def watch_again(self) -> None:
        """Name all waiters again, after the reply stream or the connection was lost, and what Redis has lost too.

        Raises:
            BrokerUnavailable, BrokerRefused: it is to be called again.
        """
        begun = [waiter for waiter in self._waiters.values() if waiter.since_s < math.inf]
        for waiter in begun:
            state = await self._reader.watch(waiter.backend, waiter.id, waiter.raw)
            if state is None and waiter.again is not None:
                # It was accepted, and the broker has lost it: nothing may refuse it now.
                await self._admission.accept(waiter.backend, waiter.again, waiter.raw, NO_LIMIT, NO_LIMIT, NO_LIMIT)
            elif state is None or state in FINAL:
                waiter.fetch()

    # -- by id

    def backend_of(self, id_: str) -> str:
        """Return the backend that has a kept request.

        Raises:
            RequestNotFound: no backend of this instance can have given out that id.
        """
        mark = mark_of(id_)
        for tag in self._watcher.snapshot.backends if mark is not None else ():
            if _backend_mark(tag) == mark:
                return tag
        raise RequestNotFound

    async def find_backend(self, id_: str) -> str:
        """Return what `backend_of` does, also for a backend that is newer than the last snapshot of the registry."""
        try:
            return self.backend_of(id_)
        except RequestNotFound:
            if mark_of(id_) is None:
                raise
        await self._watcher.refresh()
        return self.backend_of(id_)

    async def status(self, backend: str, id_: str) -> RequestStatus:
        """Return the status of a kept request. Raises `RequestNotFound`, or `ResultExpired` when its result has."""
        with self._progress():
            status, is_expired = await self._reader.status(backend, id_)
        if status is None:
            raise RequestNotFound
        if is_expired:
            raise ResultExpired(status.request_id)
        return status

    async def find_result(self, backend: str, id_: str) -> Result | None:
        """Return the result of a kept request without waiting; None if there is none yet.

        Raises:
            RequestCancelled: it was cancelled.
            ResultExpired, RequestNotFound: its result is gone.
        """
        with self._progress():
            result = await self._fetch(backend, id_)
        return None if result is None else self._checked(backend, result)

    async def cancel(self, backend: str, id_: str) -> str:
        """Cancel a kept request and return its state before. One that is final stays as it is.

        Raises:
            RequestNotFound: there is no such request.
        """
        with self._progress():
            record = self._watcher.snapshot.backends.get(backend)
            state = await self._reader.cancel(backend, id_, int(_ttl_s(record) * 1000))
        if state is None:
            raise RequestNotFound
        return state

    async def statuses(self, backend: str) -> list[RequestStatus]:
        """Return the statuses of all kept requests of a backend."""
        with self._progress():
            return [status async for status in self._reader.statuses(backend)]

    @contextmanager
    def _progress(self) -> Generator[None]:
        self._in_progress += 1
        try:
            yield
        finally:
            self._in_progress -= 1
            if not self._in_progress:
                self._on_idle()


def _ttl_s(backend: BackendRecord | None) -> float:
    return (DEFAULTS if backend is None else backend.config).result_ttl_s


async def _fingerprint(header: Header, body: bytes) -> str:
    query = header.query
    content_type = next((value for name, value in header.headers if name == "content-type"), "")
    if len(body) > _HASHED_HERE_BYTES:
        body_hash = await asyncio.get_running_loop().run_in_executor(None, _sha256, body)
    else:
        body_hash = _sha256(body)
    return fingerprint(
        header.method.encode(),
        header.path.encode("utf-8", "surrogatepass"),
        query.encode("utf-8", "surrogatepass") if isinstance(query, str) else _sorted_json(query),
        content_type.encode("utf-8", "surrogatepass"),
        header.codec.encode(),
        header.call.encode(),
        body_hash,
    )


def _sha256(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()


def _sorted_json(query: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(query, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # long integers or lone surrogates
        return exact_json.dumps({name: query[name] for name in sorted(query)})


def _overloaded(backend: str, full: QueueFull, limit: int, limit_bytes: int, size_bytes: int) -> Overloaded:
    if full.in_bytes:
        return Overloaded(backend, full.depth, limit_bytes, full.retry_after_s, size_bytes)
    return Overloaded(backend, full.depth, limit, full.retry_after_s)


def _resolve(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)
