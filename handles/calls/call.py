"""Calls in flight: each is answered once, cancelled once, or failed with a reason."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Union, cast

from ...broker.registry.records import BackendRecord
from ...broker.wire.call_ids import shown_id
from ...broker.wire.replies import Reply
from ...broker.wire.requests import Header, RawEntry
from ..errors import PenstockError
from .incoming_stream import IncomingStream

log = logging.getLogger(__name__)

CallOutcome = Union[Reply, BaseException, IncomingStream]  # noqa: UP007 - it is evaluated, also on Python 3.10
"""A reply, which may carry an error of the backend; or why there is none.

Whoever asked for it by ``Header.window`` may hear of an answer in parts instead, as soon as it has begun.
"""

MAX_QUEUED = 10_000
"""Where a backend's configuration does not say how many unsettled requests it may have."""


MAX_QUEUED_BYTES = 1024 * 1024 * 1024
"""Where it does not say how many bytes they may take."""


def batch_limit(max_queued: int) -> int:
    """Return how many unsettled requests, or how many bytes of them, may stand in the way of a batch item.

    The rest is kept for interactive requests, which a batch must not have refused.
    """
    return max(1, max_queued * 4 // 5)


class Call:
    """One request on its way."""

    __slots__ = (
        "_in_flight",
        "acceptance",
        "answered",
        "backend",
        "batch",
        "body",
        "deadline",
        "entry",
        "id",
        "incoming",
        "limit",
        "limit_bytes",
        "outcome",
        "raw",
        "record",
        "since_ms",
        "then",
        "timeout_s",
        "unsure",
    )

    def __init__(self, in_flight: CallsInFlight, id_: str, raw: RawEntry, then: Callable[[CallOutcome], None]) -> None:
        self._in_flight, self.id, self.raw, self.then = in_flight, id_, raw, then
        self.backend = ""
        self.record: BackendRecord | None = None
        """Of the backend, as it was when the call was made."""
        self.limit = 0
        """Of unsettled requests: with more in its way, it is refused."""
        self.limit_bytes = 0
        """Of what they and it may take."""
        self.batch = False
        """It lies on the batch stream."""
        self.body = b""
        """A large one, which is not in the entry but in a key of its own."""
        self.entry: bytes | None = None
        """Its id on the stream, once it is durably there."""
        self.unsure = False
        """The connection broke before we heard whether it is on its stream."""
        self.answered = False
        """Its reply has come, and the body of that is still on its way."""
        self.incoming: IncomingStream | None = None
        """Its answer, once that has begun to come in parts."""
        self.outcome: Reply | BaseException | None = None
        self.since_ms = 0.0
        self.deadline = 0.0
        self.timeout_s = 0.0
        self.acceptance: asyncio.Future[None] | None = None

    @property
    def shown_id(self) -> str:
        """The id for logs and messages."""
        return shown_id(Header.load(self.raw.header).request_id, self.id)

    def accepted(self) -> Awaitable[None]:
        """Return a future that is done once the request is durably on its stream; it raises why it never will be."""
        if self.acceptance is None:
            self.acceptance = self._in_flight.loop.create_future()
            if self.entry is not None:
                self.acceptance.set_result(None)
            elif self.outcome is not None:
                self._settle_acceptance(self.acceptance, self.outcome)
        return self.acceptance

    def cancel(self) -> bool:
        """Give the request up: never started if it is still waiting, cancelled if it runs and can be.

        Returns whether it was in flight; then its outcome will not be heard. Otherwise it has been.
        """
        was_in_flight = self._in_flight.give_up(self)
        if was_in_flight and self.acceptance is not None:
            self.acceptance.cancel()
        return was_in_flight

    def accept(self, entry: bytes) -> None:
        self.entry, self.unsure = entry, False
        if self.acceptance is not None and not self.acceptance.done():
            self.acceptance.set_result(None)

    def conclude(self, outcome: Reply | BaseException) -> None:
        self.outcome = outcome
        if self.acceptance is not None and not self.acceptance.done():
            self._settle_acceptance(self.acceptance, outcome)
        if self.incoming is not None:
            self.incoming.end(outcome)
            return
        self.hand_over(outcome)

    def hand_over(self, outcome: CallOutcome) -> None:
        try:
            self.then(outcome)
        except Exception:
            log.exception("cannot hand over the outcome of request %s", self.shown_id)

    def _settle_acceptance(self, acceptance: asyncio.Future[None], outcome: Reply | BaseException) -> None:
        if isinstance(outcome, Reply):
            acceptance.set_result(None)  # who answers it has read it
        else:
            acceptance.set_exception(outcome)
            acceptance.exception()  # whoever waited for it may be gone


class CallsInFlight:
    """The calls of one caller that have no outcome yet. Whoever ends one does it here, so that it ends once."""

    def __init__(self, take_back: Callable[[Call, bytes], None]) -> None:
        """``take_back`` withdraws a call that has been given up from its stream, by its entry there."""
        self._take_back = take_back
        self.loop: asyncio.AbstractEventLoop = cast(Any, None)
        """That of the caller, once it is open."""
        self.calls: dict[str, Call] = {}
        self.timed: dict[str, Call] = {}
        """Those of them that have a deadline to meet."""
        self.doomed: dict[str, Call] = {}
        """Given up before we heard their ids on the stream: they are withdrawn as soon as we do."""
        self.streaming: dict[str, IncomingStream] = {}
        """The answers that have begun to come in parts and have not ended."""

    def finish(self, call: Call, outcome: Reply | BaseException) -> None:
        if self.calls.pop(call.id, None) is not None:
            self.timed.pop(call.id, None)
            if call.incoming is not None:
                self.streaming.pop(call.id, None)
            call.conclude(outcome)

    def give_up(self, call: Call) -> bool:
        """Want no outcome any more, and take the request back; False if it has its outcome."""
        if self.calls.pop(call.id, None) is None:
            return False
        self.timed.pop(call.id, None)
        self.streaming.pop(call.id, None)
        if call.entry is None:
            self.doomed[call.id] = call
        else:
            self._take_back(call, call.entry)
        return True

    def break_off(self, call: Call, error: PenstockError) -> None:
        """Give a call up for a reason that it is told."""
        if self.give_up(call):
            call.conclude(error)

    def stream(self, call: Call, incoming: IncomingStream) -> None:
        """Hand over an answer that has begun: it has met its deadline, and must not be published again."""
        call.incoming = self.streaming[call.id] = incoming
        self.timed.pop(call.id, None)
        call.hand_over(incoming)
