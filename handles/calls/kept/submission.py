"""Submission of kept requests: durably queued once, with or without an idempotency key."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from ....broker.errors import StringTooLong
from ....broker.queue.publisher import Publisher, QueueFull
from ....broker.queue.queued_bytes import SMALL, most_bytes
from ....broker.registry.records import BackendRecord, EndpointRecord
from ....broker.registry.watcher import Watcher
from ....broker.results.accepting import Accepted, KeptAdmission, KeptEntry, KeyConflict, SpaceFull
from ....broker.transport.connection import RedisConnection
from ....broker.wire._fields import LARGE
from ....broker.wire.kept import PENDING_S, NewIds, key_digest
from ....broker.wire.requests import Header, RawEntry
from ...errors import BackendNotFound, BrokerFull, IdempotencyConflict, Overloaded, PayloadTooLarge, ResultsFull
from ...options import check_call_method
from ..call import queue_limits
from ..large_bodies import LargeBodies, check_size, too_long
from .fingerprint import fingerprint_of
from .waiters import Waiter, Waiters

_CHOICE_SLACK_S = 60.0
"""How much longer than a result the choice of a key's backend is kept whose request was refused."""


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
    waiter: Waiter | None = None


class Submission:
    """The way of kept requests onto the streams of their backends.

    Args:
        connection: of the caller.
        admission: accepts requests.
        waiters: of the caller.
        watcher: of the registry.
        publisher: of the caller, for reservations.
        bodies: of the caller.
        choose: returns the backend for the next request of an endpoint, with a shard key or None.
        shadow: publishes copies of a request to the shadow backends of its endpoint.
        in_progress: returns the context in which a request is submitted.
    """

    def __init__(
        self,
        connection: RedisConnection,
        admission: KeptAdmission,
        waiters: Waiters,
        watcher: Watcher,
        publisher: Publisher,
        bodies: LargeBodies,
        choose: Callable[[EndpointRecord, str | None], BackendRecord],
        shadow: Callable[[EndpointRecord, Header, bytes], None],
        in_progress: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._connection, self._admission, self._waiters = connection, admission, waiters
        self._watcher, self._publisher, self._bodies = watcher, publisher, bodies
        self._choose, self._shadow, self._in_progress = choose, shadow, in_progress
        self._new_ids = NewIds()

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

        With ``waits``, `KeptRequests.result` must be called with the ticket.

        Raises:
            BackendNotFound: the endpoint routes to no backend.
            CallMethodRefused: the endpoint does not offer the method.
            IdempotencyConflict: the key was used for another request.
            Overloaded, ResultsFull: there is no room.
            PayloadTooLarge: the body is larger than Redis takes, or than may be queued.
            BrokerUnavailable: the broker cannot be reached. The request may have been accepted nevertheless.
        """
        with self._in_progress():
            check_call_method(endpoint, header.call)
            digest, print_, is_new = "", "", True
            if key is not None:
                digest = key_digest(endpoint.name, key.credentials, key.value)
                print_ = await fingerprint_of(header, body)
                backend, is_new = await self._backend_of_key(endpoint, digest, shard_key)
            else:
                backend = self._choose(endpoint, shard_key)
            if timeout_s is not None:
                header.deadline_ms = int(self._connection.now_ms() + timeout_s * 1000)
            id_ = self._new_ids.next(backend.tag)
            is_large = len(body) > LARGE
            check_size(body, self._connection.max_string_bytes if is_large else None)
            raw = RawEntry(id_.encode(), b"", header.dump(), None if is_large else body, len(body) if is_large else 0)
            kept = KeptEntry(raw, endpoint.name, header.request_id, max_stream_bytes, digest, print_)
            waiter = self._waiters.new(backend.tag, id_) if waits else None
            if waiter is not None and not is_large:
                waiter.again = kept
            try:
                ticket = await self._accept(backend, kept, body if is_large else b"", waiter)
            except BaseException:
                if waiter is not None:
                    self._waiters.forget(waiter, unwatch=True)
                raise
            if not is_new and not ticket.is_replayed:
                self._admission.keep_choice(digest)  # that of a request that was refused, or whose result has expired
            if endpoint.shadows and not ticket.is_replayed:
                self._shadow(endpoint, header, body)
            return ticket

    async def _accept(self, backend: BackendRecord, kept: KeptEntry, large: bytes, waiter: Waiter | None) -> Ticket:
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
        if kept.key and isinstance(accepted, QueueFull | SpaceFull):
            self._admission.keep_choice(kept.key, int((backend.config.result_ttl_s + _CHOICE_SLACK_S) * 1000))
        if isinstance(accepted, QueueFull):
            self._publisher.counts.add(backend.tag, "refused")
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
        return Ticket(accepted.id, backend.tag, accepted.state, accepted.is_replayed, waiter)

    async def _store_body(
        self, backend: BackendRecord, raw: RawEntry, body: bytes, limit: int, limit_bytes: int
    ) -> None:
        loop = asyncio.get_running_loop()
        reserved: asyncio.Future[Any] = loop.create_future()
        self._publisher.reserve(backend.tag, raw, limit, partial(_resolve, reserved), limit_bytes=limit_bytes)
        refused = await reserved
        if isinstance(refused, QueueFull):
            self._publisher.counts.add(backend.tag, "refused")
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

    async def _backend_of_key(
        self, endpoint: EndpointRecord, digest: str, shard_key: str | None
    ) -> tuple[BackendRecord, bool]:
        """Return the backend that holds a key, and whether that was chosen now."""
        backend = self._choose(endpoint, digest if shard_key is None else shard_key)
        chosen, is_new = await self._admission.choose_backend(digest, backend.tag)
        if chosen == backend.tag:
            return backend, is_new
        if chosen not in self._watcher.snapshot.backends:
            await self._watcher.refresh()
        if (record := self._watcher.snapshot.backends.get(chosen)) is not None:
            return record, False
        chosen, _ = await self._admission.choose_backend(digest, backend.tag, gone=chosen)
        if (record := self._watcher.snapshot.backends.get(chosen)) is None:
            raise BackendNotFound(chosen, self._watcher.snapshot.backends)
        return record, False


def _overloaded(backend: str, full: QueueFull, limit: int, limit_bytes: int, size_bytes: int) -> Overloaded:
    if full.in_bytes:
        return Overloaded(backend, full.depth, limit_bytes, full.retry_after_s, size_bytes)
    return Overloaded(backend, full.depth, limit, full.retry_after_s)


def _resolve(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)
