"""Calls of user code: on the loop or on a thread, for one request or a batch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator, Sequence
from time import monotonic, perf_counter
from types import AsyncGeneratorType, GeneratorType
from typing import Any, Union

from starlette.responses import Response

from ...broker.wire.entry_ref import queued_ms
from ...broker.wire.replies import Reply
from ...handles.calls import tracing
from ...handles.errors import PenstockError
from ...handles.log_context import work_on
from ..claim import Claim, RunningCall
from .errors import failed_reply
from .executor import CallResult, Executor, OnReply, ms_since
from .request import Request
from .stream_writer import Values
from .streamed_calls import GeneratorOnThread, LoopStreamCall, ResponseCall, ThreadStreamCall
from .threads import ThreadJob
from .user_code import Method

log = logging.getLogger(__name__)

_After = Union[ThreadStreamCall, LoopStreamCall, ResponseCall]  # noqa: UP007 - it is evaluated, also on Python 3.10
"""A part of a call that goes on after its code has returned: a stream, or a response to send."""


class RefusedCall:
    """Claims that user code never receives: each gets the same error."""

    began_s = 0.0

    def __init__(self, executor: Executor, claims: Sequence[Claim], error: PenstockError, done: OnReply) -> None:
        for claim in claims:
            executor.loop.call_soon(done, claim, executor.refusal(claim.entry, error))

    def cancel(self, claim: Claim) -> None:
        pass

    def recall(self, claim: Claim) -> bool:
        return False


class CallGroup:
    """Calls that were started together."""

    def __init__(self, calls: Sequence[RunningCall]) -> None:
        self._calls = calls

    @property
    def began_s(self) -> float:
        return min((call.began_s for call in self._calls if call.began_s), default=0.0)

    def cancel(self, claim: Claim) -> None:
        for call in self._calls:
            call.cancel(claim)

    def recall(self, claim: Claim) -> bool:
        return any(call.recall(claim) for call in self._calls)


class _Call:
    """One call of user code: for one request or, if its method takes them, a batch."""

    began_s = 0.0

    def __init__(self, executor: Executor, method: Method, claims: Sequence[Claim], done: OnReply) -> None:
        self._executor, self._method, self._claims, self._done = executor, method, claims, done
        self._started = False
        self._requests: Sequence[Request] = ()
        self._late: list[Claim] = []
        """Claims whose deadlines had passed when the call began. They are not part of it."""
        self._span_token: object = None
        """The token that leaves the call's span again, if it was entered in the context of its code."""
        self._after: list[_After] = []
        """The parts that go on after the code has returned."""

    def cancel(self, claim: Claim) -> None:
        if not self.recall(claim) and self._started:
            self._interrupt(claim)
            for after in self._after:
                after.cancel(claim)

    def recall(self, claim: Claim) -> bool:
        with self._executor.starting:
            if self._started or claim not in self._claims:
                return False
            self._claims = [other for other in self._claims if other is not claim]
        self._executor.loop.call_soon(self._done, claim, self._executor.cancelled(claim.entry))
        return True

    def _interrupt(self, claim: Claim) -> None:
        """Cancel a claim that user code has received. Code on a thread cannot be stopped."""

    def _start(self) -> Any:
        """Return the argument of the method. From here on, no claim is recalled.

        Claims whose deadline has passed are dropped now. If none is left, the method must not be called.
        """
        executor = self._executor
        with executor.starting:
            self._started = True
        for claim in self._claims:
            if (deadline_ms := claim.entry.header.deadline_ms) and deadline_ms <= executor.now_ms():
                self._late.append(claim)
        if self._late:
            self._claims = [claim for claim in self._claims if claim not in self._late]
        if not self._method.accepts_batch and self._claims:  # for the one there is, without a list comprehension
            entry = self._claims[0].entry
            on_progress = None if entry.keep_bytes is None else executor.progress_of(self._claims[0])
            request = Request(entry, executor.allow_pickle, on_progress)
            self._requests = (request,)
            work_on((entry,))
            if tracing.spans is not None:
                self._begin_spans(tracing.spans)
            return request
        entries = [claim.entry for claim in self._claims]
        if tracing.spans is not None:
            self._begin_spans(tracing.spans)
        work_on(entries)
        self._requests = [
            Request(
                claim.entry,
                executor.allow_pickle,
                None if claim.entry.keep_bytes is None else executor.progress_of(claim),
            )
            for claim in self._claims
        ]
        return self._requests if entries else None

    def _begin_spans(self, spans: tracing.Spans) -> None:
        now_ms = self._executor.now_ms()
        for claim in self._claims:
            waited_ms = queued_ms(claim.ref, now_ms)
            claim.spans = run = spans.begin_run(self._executor.backend, claim.entry.header, waited_ms)
            if len(self._claims) == 1:
                self._span_token = spans.enter(run)

    def _deliver(self, outcomes: Sequence[CallResult]) -> None:
        claims = self._claims
        # For one request with a whole reply, as most calls are, without the loops below.
        if len(claims) == len(outcomes) == 1 and not self._late and isinstance(outcomes[0], Reply):
            self._done(claims[0], outcomes[0])
            return
        for claim in self._late:
            self._done(claim, self._executor.cancelled(claim.entry))
        # There is no outcome if all claims were dropped.
        for index, (claim, outcome) in enumerate(zip(self._claims, outcomes, strict=False)):
            if isinstance(outcome, Reply):
                self._done(claim, outcome)
                continue
            try:
                self._after.append(self._go_on(index, claim, outcome))
            except Exception as e:  # such as a thread that the system does not start
                log.exception("cannot go on with a reply of backend %r", self._executor.backend)
                self._done(claim, failed_reply(claim.entry, e, self._executor.replica))
        for claim in self._claims[len(outcomes) :] if len(outcomes) < len(self._claims) else ():
            error = RuntimeError(f"backend {self._executor.backend!r} made no reply to this request")
            self._done(claim, failed_reply(claim.entry, error, self._executor.replica))

    def _go_on(self, index: int, claim: Claim, outcome: Response | Values) -> _After:
        if isinstance(outcome, Response):
            streams = not self._method.accepts_batch and self._executor.streams(claim.entry)
            return ResponseCall(self._executor, claim, self._requests[index], outcome, self._done, streams)
        if isinstance(outcome, GeneratorType):
            return ThreadStreamCall(self._executor, claim, outcome, self._done)
        assert isinstance(outcome, AsyncGeneratorType)
        return LoopStreamCall(self._executor, claim, outcome, self._done)


class ThreadCall(_Call, ThreadJob):
    """A call of code that blocks."""

    def __init__(self, executor: Executor, method: Method, claims: Sequence[Claim], done: OnReply) -> None:
        super().__init__(executor, method, claims, done)
        self._outcomes: Sequence[CallResult] = ()
        self._stream: GeneratorOnThread | None = None
        self._is_cancelled = False
        executor.threads.submit(self)

    def _interrupt(self, claim: Claim) -> None:
        with self._executor.starting:
            self._is_cancelled = True
            stream = self._stream
        if stream is not None:
            stream.writer.stop()

    def run(self) -> None:
        self.began_s, began_at = monotonic(), perf_counter()
        try:
            argument = self._start()
            if not self._claims:
                return
            result = self._method.function(argument)
        except BaseException as e:
            self._outcomes = self._executor.failures(self._claims, e, ms_since(began_at))
        else:
            self._outcomes = self._executor.outcomes(self._method, self._claims, result, ms_since(began_at))
            if isinstance(values := self._outcomes[0], GeneratorType):
                self._stream_here(values, began_at)
        work_on(())  # a health check may be next on this thread
        if tracing.spans is not None and self._span_token is not None:
            tracing.spans.leave(self._span_token)

    def _stream_here(self, values: Generator[Any, Any, Any], began_at: float) -> None:
        """Run a generator to its end, so that no other request of one that is alone on its thread comes between."""
        with self._executor.starting:
            stream = self._stream = GeneratorOnThread(self._executor, self._claims[0], values)
            is_cancelled = self._is_cancelled
        if is_cancelled:
            stream.writer.stop()
        stream.run(began_at)

    def finish(self) -> None:
        if self._stream is not None:
            self._done(self._claims[0], self._stream.reply())
        else:
            self._deliver(self._outcomes)


class LoopCall(_Call):
    """A call of ``async def`` code."""

    def __init__(self, executor: Executor, method: Method, claims: Sequence[Claim], done: OnReply) -> None:
        super().__init__(executor, method, claims, done)
        self._cancelled: set[Claim] = set()
        self._task = executor.spawn_brief(self._run())

    def _interrupt(self, claim: Claim) -> None:
        self._cancelled.add(claim)
        if self._cancelled.issuperset(self._claims):
            self._task.cancel()

    async def _run(self) -> None:
        executor, began_at = self._executor, perf_counter()
        outcomes: Sequence[CallResult]
        try:
            argument = self._start()
            if not self._claims:
                executor.tasks.discard(self._task)
                self._deliver(())
                return
            result = await self._method.function(argument)
        except BaseException as e:
            executor.tasks.discard(self._task)
            if executor.abandoned or not executor.loop.is_running():
                return  # cancelled because the replica ends, or thrown away with the loop
            if self._cancelled and isinstance(e, asyncio.CancelledError):
                outcomes = [executor.cancelled(claim.entry) for claim in self._claims]
            else:
                outcomes = executor.failures(self._claims, e, ms_since(began_at))
        else:
            executor.tasks.discard(self._task)
            outcomes = executor.outcomes(self._method, self._claims, result, ms_since(began_at))
        self._deliver(outcomes)
