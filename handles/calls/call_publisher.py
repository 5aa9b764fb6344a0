"""Publishing of calls: stores a large body, for which it may have to reserve room, then appends the request.

A call whose request the broker refuses ends here. A call whose connection broke before the broker answered stays in
flight with ``fate_unknown`` set, until `Recovery` finds out whether its request is on the stream.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ...broker.errors import StringTooLong
from ...broker.queue.dead_letter_limits import BODY_TTL_MS
from ...broker.queue.publisher import Published, Publisher, QueueFull
from ...broker.queue.queued_bytes import NO_LIMIT
from ...broker.transport.connection import FateUnknown, RedisConnection
from ...broker.transport.url import shown_url
from ..errors import BrokerFull, BrokerRefused, BrokerUnavailable, NotPermitted, Overloaded, PenstockError
from .call import Call, CallsInFlight, QueueLimits
from .large_bodies import RESERVED, LargeBodies, too_long

_BODY_SLACK_MS = 60_000
"""A stored body outlives the deadline of its request by this much."""

_UNLIMITED = QueueLimits(NO_LIMIT, NO_LIMIT)


class CallPublisher:
    """Publishes the calls of one client, over ``connection``."""

    def __init__(
        self, connection: RedisConnection, publisher: Publisher, in_flight: CallsInFlight, bodies: LargeBodies
    ) -> None:
        self._connection, self._publisher = connection, publisher
        self._in_flight, self._bodies = in_flight, bodies

    def publish(self, call: Call) -> None:
        """Publish a call within the limits of its backend's queue."""
        if not call.body:
            self._append(call, call.limits)
            return
        if len(call.body) <= RESERVED:
            self._store_body(call)
            self._append(call, call.limits)
            return
        on_reserved = partial(self._on_reserved, call)
        requests, size = call.limits
        self._publisher.reserve(call.backend, call.raw, requests, on_reserved, batch=call.batch, limit_bytes=size)
        self._send_soon()

    def publish_again(self, call: Call, *, was_accepted: bool) -> None:
        """Publish a call that the broker has lost. A request that was accepted before is not refused now."""
        if not was_accepted:
            self.publish(call)
            return
        if call.body:
            self._store_body(call, patient=True)
        self._append(call, _UNLIMITED)

    def on_published(self, call: Call, result: Published) -> None:
        """Record the result of publishing a call."""
        if type(result) is bytes:
            self._in_flight.record_entry(call, result)
        elif isinstance(result, FateUnknown) and not self._in_flight.is_closed:
            call.fate_unknown = True
        else:
            self._in_flight.withdrawn.pop(call.id, None)
            self._in_flight.drop_body(call)
            self._in_flight.finish(call, self._refusal(call, result))

    def unavailable(self, reason: str) -> BrokerUnavailable:
        """Return the error for a broker that cannot take the request."""
        return BrokerUnavailable(shown_url(self._connection.url), reason)

    def _on_reserved(self, call: Call, result: QueueFull | Exception | None) -> None:
        if call.id not in self._in_flight.by_id:  # withdrawn meanwhile
            self._in_flight.withdrawn.pop(call.id, None)
            if result is None:
                self._publisher.forget_reservation(call.backend, call.raw)
        elif result is None:
            self._store_body(call)
            self._append(call, call.limits)
        else:
            self._in_flight.finish(call, self._refusal(call, result))

    def _append(self, call: Call, limits: QueueLimits) -> None:
        on_published = partial(self.on_published, call)
        requests, size = limits
        self._publisher.publish(call.backend, call.raw, requests, on_published, batch=call.batch, limit_bytes=size)
        self._send_soon()

    def _send_soon(self) -> None:
        # The latency of a single call matters most. Several calls share a write at the end of the loop tick.
        if len(self._in_flight.by_id) == 1:
            self._connection.flush_if_idle()

    def _store_body(self, call: Call, *, patient: bool = False) -> None:
        ttl_ms = int(call.timeout_s * 1000) + _BODY_SLACK_MS if call.timeout_s else BODY_TTL_MS
        on_stored = partial(self._on_body_stored, call)
        self._bodies.store_request_body(call.backend, call.id, call.body, ttl_ms, on_stored, patient=patient)

    def _on_body_stored(self, call: Call, result: Any) -> None:
        if isinstance(result, Exception):
            self._in_flight.abort(call, self._refusal(call, result))

    def _refusal(self, call: Call, result: object) -> PenstockError:
        """Return the caller's error for a request that was not published."""
        if isinstance(result, QueueFull | BrokerFull) and not call.batch:  # batch producers wait for room
            self._in_flight.count(call, "refused")
        if isinstance(result, QueueFull):
            if result.in_bytes:
                size = call.raw.size_bytes
                return Overloaded(call.backend, result.depth, call.limits.bytes, result.retry_after_s, size)
            return Overloaded(call.backend, result.depth, call.limits.requests, result.retry_after_s)
        if isinstance(result, BrokerFull):
            return Overloaded(call.backend, 0, call.limits.requests)
        if isinstance(result, StringTooLong):
            return too_long(call.body, len(call.body) - 1)
        if isinstance(result, BrokerRefused) and not isinstance(result, NotPermitted):
            # The script stopped for another reason than a lack of memory, such as a stream that has no ids left.
            return self.unavailable(f"it refused the request: {result.message}")
        assert isinstance(result, PenstockError)
        return result
