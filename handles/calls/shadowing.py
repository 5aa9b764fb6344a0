"""Shadow traffic: copies of requests that never affect the original or its caller."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ...broker.queue.publisher import Published, Publisher, QueueFull
from ...broker.registry.records import EndpointRecord
from ...broker.registry.watcher import Watcher
from ...broker.wire._fields import LARGE
from ...broker.wire.keys import Keys
from ...broker.wire.requests import Header, RawEntry
from .call import MAX_QUEUED, MAX_QUEUED_BYTES, batch_limit
from .large_bodies import LargeBodies

_BODY_TTL_MS = 600_000


@dataclass(slots=True)
class ShadowCopies:
    """Of one shadow backend, and of one process since it started."""

    queued: int = 0
    refused: int = 0
    """Its queue was full, or the broker did not take them or could not say so."""


class ShadowTraffic:
    """Sends the copies of one caller, and counts them."""

    def __init__(
        self, watcher: Watcher, publisher: Publisher, bodies: LargeBodies, keys: Keys, next_id: Callable[[], str]
    ) -> None:
        """``next_id`` makes the id of another call."""
        self._watcher, self._publisher, self._bodies, self._keys = watcher, publisher, bodies, keys
        self._next_id = next_id
        self._chance = random.Random().random
        self.copies: dict[str, ShadowCopies] = {}
        """What became of them, by backend."""

    def send(self, endpoint: EndpointRecord, header: Header, body: bytes, *, batch: bool = False) -> None:
        """Send copies to the endpoint's shadows, in their proportions."""
        for tag, proportion in endpoint.shadows.items():
            backend = self._watcher.snapshot.backends.get(tag)
            if backend is None or self._chance() >= proportion:
                continue
            id_ = self._next_id()
            limit: int = backend.config.get("max_queued_requests", MAX_QUEUED)
            limit_bytes: int = backend.config.get("max_queued_bytes", MAX_QUEUED_BYTES)
            if batch:
                limit, limit_bytes = batch_limit(limit), batch_limit(limit_bytes)
            if len(body) <= LARGE:
                raw = RawEntry(id_.encode(), b"", header.dump(), body)
                then = partial(self._on_published, tag, None)
                self._publisher.publish(tag, raw, limit, then, batch=batch, limit_bytes=limit_bytes)
                continue
            raw = RawEntry(id_.encode(), b"", header.dump(), None, len(body))
            on_reserved = partial(self._on_reserved, tag, raw, body, limit, limit_bytes, batch)
            self._publisher.reserve(tag, raw, limit, on_reserved, batch=batch, limit_bytes=limit_bytes)

    def _on_reserved(
        self,
        tag: str,
        raw: RawEntry,
        body: bytes,
        limit: int,
        limit_bytes: int,
        batch: bool,
        result: QueueFull | Exception | None,
    ) -> None:
        if result is not None:
            self._count(tag).refused += 1
            return
        key = self._keys.body(tag, raw.id.decode())
        self._bodies.put(key, body, _BODY_TTL_MS)
        then = partial(self._on_published, tag, key)
        self._publisher.publish(tag, raw, limit, then, batch=batch, limit_bytes=limit_bytes)

    def _on_published(self, tag: str, body: str | None, result: Published) -> None:
        copies = self._count(tag)
        if type(result) is bytes:
            copies.queued += 1
            return
        copies.refused += 1
        if body is not None:
            self._bodies.drop(body)

    def _count(self, tag: str) -> ShadowCopies:
        return self.copies.setdefault(tag, ShadowCopies())
