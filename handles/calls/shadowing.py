"""Shadow traffic: copies of requests that never affect the original request or its caller."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ...broker.queue.dead_letter_limits import BODY_TTL_MS
from ...broker.queue.publisher import Published, Publisher, QueueFull
from ...broker.registry.records import EndpointRecord
from ...broker.registry.watcher import Watcher
from ...broker.wire.requests import Header, RawEntry
from .call import QueueLimits, queue_limits
from .large_bodies import LEAST_LARGE, RESERVED, LargeBodies


@dataclass(slots=True)
class ShadowStats:
    """Counters of the copies for one shadow backend, since the client was created."""

    queued: int = 0
    refused: int = 0
    """Copies that the broker refused, or of which it is not known whether they were queued."""


class ShadowTraffic:
    """Publishes the copies of one client's requests. A copy has no caller, so nobody receives its reply."""

    def __init__(self, watcher: Watcher, publisher: Publisher, bodies: LargeBodies, next_id: Callable[[], str]) -> None:
        """``next_id`` returns the id of the next request."""
        self._watcher, self._publisher, self._bodies, self._next_id = watcher, publisher, bodies, next_id
        self._random = random.Random().random
        self.stats: dict[str, ShadowStats] = {}
        """By tag of the shadow backend."""

    def publish(self, endpoint: EndpointRecord, header: Header, body: bytes, *, batch: bool = False) -> None:
        """Publish copies of a request to the endpoint's shadow backends, in their proportions."""
        for tag, proportion in endpoint.shadows.items():
            backend = self._watcher.snapshot.backends.get(tag)
            if backend is None or self._random() >= proportion:
                continue
            id_ = self._next_id()
            limits = queue_limits(backend, batch=batch)
            if len(body) <= LEAST_LARGE:  # a copy has no caller that waits
                raw = RawEntry(id_.encode(), b"", header.dump(), body)
                on_published = partial(self._on_published, tag, None)
                self._publisher.publish(tag, raw, limits.requests, on_published, batch=batch, limit_bytes=limits.bytes)
                continue
            raw = RawEntry(id_.encode(), b"", header.dump(), None, len(body))
            if len(body) <= RESERVED:
                self._store_and_publish(tag, raw, body, limits, batch)
                continue
            on_reserved = partial(self._on_reserved, tag, raw, body, limits, batch)
            self._publisher.reserve(tag, raw, limits.requests, on_reserved, batch=batch, limit_bytes=limits.bytes)

    def _on_reserved(
        self,
        tag: str,
        raw: RawEntry,
        body: bytes,
        limits: QueueLimits,
        batch: bool,
        result: QueueFull | Exception | None,
    ) -> None:
        if result is not None:
            self._stats_of(tag).refused += 1
        else:
            self._store_and_publish(tag, raw, body, limits, batch)

    def _store_and_publish(self, tag: str, raw: RawEntry, body: bytes, limits: QueueLimits, batch: bool) -> None:
        request = raw.id.decode()
        self._bodies.store_request_body(tag, request, body, BODY_TTL_MS)
        on_published = partial(self._on_published, tag, request)
        self._publisher.publish(tag, raw, limits.requests, on_published, batch=batch, limit_bytes=limits.bytes)

    def _on_published(self, tag: str, stored: str | None, result: Published) -> None:
        """Count a copy. ``stored`` is the id of a request whose body is stored."""
        stats = self._stats_of(tag)
        if type(result) is bytes:
            stats.queued += 1
            return
        stats.refused += 1
        if stored is not None:
            self._bodies.drop_request_body(tag, stored)

    def _stats_of(self, tag: str) -> ShadowStats:
        return self.stats.setdefault(tag, ShadowStats())
