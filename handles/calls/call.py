"""Calls, and the set of calls in flight. Each call ends once: with a reply, with an error, or by its cancellation."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, Union

from ...broker.queue.counts.caller_counts import CallerCount
from ...broker.queue.publisher import Publisher
from ...broker.registry.records import BackendRecord
from ...broker.wire.call_ids import shown_id
from ...broker.wire.replies import Reply
from ...broker.wire.requests import Header, RawEntry
from ..errors import PenstockError, RequestTimeout
from .incoming_stream import IncomingStream
from .large_bodies import LargeBodies
from .tracing import CallSpans

log = logging.getLogger(__name__)

CallOutcome = Union[Reply, BaseException, IncomingStream]  # noqa: UP007 - it is evaluated, also on Python 3.10
"""The outcome of a call: a reply, which may carry an error of the backend, or the reason why there is none.

A call whose ``Header.window`` asks for a streamed reply can have an `IncomingStream` as its outcome, as soon as the
first part has arrived.
"""


class QueueLimits(NamedTuple):
    """Limits by which admission refuses a request."""

    requests: int
    """The most unsettled requests of the backend."""
    bytes: int
    """The most bytes that they take."""


def queue_limits(backend: BackendRecord, *, batch: bool = False) -> QueueLimits:
    """Return the limits of a backend's queue for an interactive request, or for a batch item.

    Batch items may fill four fifths of the queue. The rest is reserved for interactive requests, so that no batch
    causes their refusal.
    """
    config = backend.config
    return _limits(config.max_queued_requests, config.max_queued_bytes, batch)


@lru_cache
def _limits(requests: int, size: int, batch: bool) -> QueueLimits:
    if batch:
        return QueueLimits(max(1, requests * 4 // 5), max(1, size * 4 // 5))
    return QueueLimits(requests, size)


_NO_LIMITS = QueueLimits(0, 0)


class Call:
    """One request, from its publication to its outcome.

    `RequestClient.start` sets ``backend``, ``record``, ``limits`` and the times, each time that the call is published.
    """

    __slots__ = (
        "_in_flight",
        "acceptance",
        "backend",
        "batch",
        "body",
        "deadline_s",
        "entry",
        "fate_unknown",
        "has_reply",
        "id",
        "incoming",
        "limits",
        "on_outcome",
        "outcome",
        "raw",
        "record",
        "spans",
        "started_ms",
        "timeout_s",
    )

    def __init__(
        self,
        in_flight: CallsInFlight,
        id_: str,
        raw: RawEntry,
        on_outcome: Callable[[CallOutcome], None],
        *,
        body: bytes = b"",
        batch: bool = False,
    ) -> None:
        """Create a call that is not published yet.

        Args:
            in_flight: the calls of the client that publishes it.
            id_: id of the request; only its caller and its backend know it.
            raw: the request as the stream holds it.
            on_outcome: called once with the outcome, on the event loop, unless the call is cancelled first.
            body: a large body, which is stored in a key of its own and not in the entry; otherwise empty.
            batch: publish to the batch stream.
        """
        self._in_flight, self.id, self.raw, self.on_outcome = in_flight, id_, raw, on_outcome
        self.body, self.batch = body, batch
        self.backend = ""
        """Tag of the backend."""
        self.record: BackendRecord | None = None
        """The backend's record when the call was made."""
        self.limits = _NO_LIMITS
        self.entry: bytes | None = None
        """Id of the entry on the stream, once the request is accepted."""
        self.fate_unknown = False
        """Whether the connection broke before the client knew if the request is on its stream."""
        self.has_reply = False
        """Whether the reply has arrived, and its large body is still being fetched."""
        self.incoming: IncomingStream | None = None
        """The streamed reply, once its first part has arrived."""
        self.outcome: Reply | BaseException | None = None
        self.started_ms = 0.0
        """Time of the publication by the broker's clock."""
        self.deadline_s = 0.0
        """Deadline by the event loop's clock; meaningless without a timeout."""
        self.timeout_s = 0.0
        """Timeout in seconds; 0 for none."""
        self.acceptance: asyncio.Future[None] | None = None
        """The future of `accepted`, if something waits for it."""
        self.spans: CallSpans | None = None
        """The spans of the call, if this process records spans."""

    @property
    def shown_id(self) -> str:
        """Id for logs and error messages."""
        return shown_id(Header.load(self.raw.header).request_id, self.id)

    def accepted(self) -> asyncio.Future[None]:
        """Return a future that is done once the request is durably on its stream. It raises the error if it fails."""
        if self.acceptance is None:
            self.acceptance = self._in_flight.loop.create_future()
            if self.entry is not None:
                self.acceptance.set_result(None)
            elif self.outcome is not None:
                self._settle_acceptance(self.acceptance, self.outcome)
        return self.acceptance

    def cancel(self) -> bool:
        """Withdraw the request: a waiting one never starts, a running one is cancelled if its code allows that.

        Returns whether the call was in flight. If it was, ``on_outcome`` is never called; otherwise it has been called.
        """
        was_in_flight = self._in_flight.withdraw(self)
        if was_in_flight:
            self._in_flight.count(self, "cancelled")
            if self.spans is not None:
                self.spans.end(None)
            if self.acceptance is not None:
                self.acceptance.cancel()
        return was_in_flight

    def accept(self, entry: bytes) -> None:
        """Record that the request is on its stream, as ``entry``."""
        self.entry, self.fate_unknown = entry, False
        if self.acceptance is not None:
            if not self.acceptance.done():
                self.acceptance.set_result(None)
            self.acceptance = None  # a call may be in flight for long

    def conclude(self, outcome: Reply | BaseException) -> None:
        """End the call. Only `CallsInFlight` calls this, once, after it has removed the call."""
        self.outcome = outcome
        if self.acceptance is not None and not self.acceptance.done():
            self._settle_acceptance(self.acceptance, outcome)
        if self.incoming is not None:
            self.incoming.end(outcome)
            return
        self.pass_on(outcome)

    def pass_on(self, outcome: CallOutcome) -> None:
        """Call ``on_outcome``."""
        try:
            self.on_outcome(outcome)
        except Exception:
            log.exception("cannot pass on the outcome of request %s", self.shown_id)

    def _settle_acceptance(self, acceptance: asyncio.Future[None], outcome: Reply | BaseException) -> None:
        if isinstance(outcome, Reply):
            acceptance.set_result(None)  # a request that was answered was on its stream
        else:
            acceptance.set_exception(outcome)
            acceptance.exception()  # without a waiter, asyncio would log it as never retrieved


class CallsInFlight:
    """The calls of one client that have no outcome yet, and the only place where a call ends."""

    def __init__(self, loop: asyncio.AbstractEventLoop, publisher: Publisher, bodies: LargeBodies) -> None:
        """``publisher`` and ``bodies`` withdraw requests."""
        self.loop = loop
        self._publisher, self._bodies = publisher, bodies
        self.is_closed = False
        """Whether the client is closed, so that no reply can arrive any more."""
        self.by_id: dict[str, Call] = {}
        self.timed: dict[str, Call] = {}
        """The calls that have a deadline and no reply yet, by id."""
        self.withdrawn: dict[str, Call] = {}
        """Calls that were withdrawn before the ids of their entries were known, by id. `record_entry` deletes these."""
        self.streaming: dict[str, IncomingStream] = {}
        """Streamed replies that have begun and not ended, by the ids of their calls."""

    def finish(self, call: Call, outcome: Reply | BaseException) -> None:
        """End a call, unless it has ended already."""
        if self.by_id.pop(call.id, None) is not None:
            self.timed.pop(call.id, None)
            if call.incoming is not None:
                self.streaming.pop(call.id, None)
            call.conclude(outcome)

    def withdraw(self, call: Call) -> bool:
        """End a call without an outcome and delete its request. Return False if it has ended already."""
        if self.by_id.pop(call.id, None) is None:
            return False
        self.timed.pop(call.id, None)
        self.streaming.pop(call.id, None)
        if call.entry is None:
            self.withdrawn[call.id] = call
        else:
            self._delete_request(call, call.entry)
        return True

    def count(self, call: Call, as_: CallerCount) -> None:
        """Count a call among those of its backend that end without a reply."""
        self._publisher.counts.add(call.backend, as_)

    def expire(self, call: Call) -> None:
        """Withdraw a call whose deadline has passed, and end it with `RequestTimeout`."""
        self.count(call, "expired")
        self.abort(call, RequestTimeout(f"backend {call.backend!r}", call.timeout_s))

    def abort(self, call: Call, error: PenstockError) -> None:
        """Withdraw a call, and end it with ``error``."""
        if self.withdraw(call):
            call.conclude(error)

    def record_entry(self, call: Call, entry: bytes) -> None:
        """Record the id of a call's entry. Deletes the request of a call that has been withdrawn meanwhile."""
        call.accept(entry)
        if self.withdrawn and self.withdrawn.pop(call.id, None) is not None:
            self._delete_request(call, entry)

    def begin_stream(self, call: Call, incoming: IncomingStream) -> None:
        """Pass on a streamed reply that has begun: it has met its deadline, and must not be published again."""
        call.incoming = self.streaming[call.id] = incoming
        self.timed.pop(call.id, None)
        call.pass_on(incoming)

    def drop_body(self, call: Call) -> None:
        """Delete the stored body of a request, if it has a large one."""
        if call.body:
            self._bodies.drop_request_body(call.backend, call.id)

    def _delete_request(self, call: Call, entry: bytes) -> None:
        self._publisher.withdraw(call.backend, entry, batch=call.batch)
        self.drop_body(call)
