"""The executor: runs user code on the loop or on threads, and turns its results into replies."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context
from time import perf_counter
from typing import Any, TypeVar, Union, cast

from starlette.responses import Response

from ...broker.wire.replies import Reply
from ...broker.wire.requests import Entry
from ...handles.calls.large_bodies import check_size
from ...handles.errors import PayloadTooLarge, PenstockError, RequestCancelled, StreamBroken, from_wire, to_wire
from ..claim import Claim
from ..error_log import ErrorLog
from ..loop_watch import LoopWatch
from ..retry import RetryPolicy, shown_error
from .errors import failed_reply, raised_reply
from .results import Encoded, encode, is_complete
from .stream_writer import GENERATORS, StreamSink, StreamWriter, Values
from .threads import Threads
from .user_code import Method

T = TypeVar("T")

CallResult = Union[Reply, Response, Values]  # noqa: UP007 - it is evaluated, also on Python 3.10
"""The outcome of a call for one request: its reply, or a response or generator that is still to produce it."""

_PLAIN = frozenset((dict, list, str, int, float, bool, bytes, type(None)))
"""The types of most results. They are neither exceptions nor responses, which saves two checks."""

OnReply = Callable[[Claim, Reply], None]
"""Receives the reply to a claim.

Called on the loop, once for each claim, and never from within the ``run`` or ``cancel`` that causes it.
"""


class Executor:
    """The loop and the threads on which the user code of one replica runs, and the replies that it makes."""

    def __init__(self, backend: str, replica: str, threads: Threads, context: Context) -> None:
        self.backend, self.replica = backend, replica
        self.threads = threads
        self.loop = asyncio.get_running_loop()
        self.error_log = ErrorLog(backend, replica, self.loop)
        self.allow_pickle = False
        self.retries = RetryPolicy(None)
        """Decides which errors of user code are retried."""
        self.stream_sink: StreamSink | None = None
        """Sends the parts of streamed replies; without it, no reply is streamed."""
        self.report_progress: Callable[[Claim, bytes], None] = _drop_progress
        """Records the progress that the code of a kept request reports; called on the loop."""
        self.reply_early: OnReply = _not_early
        """Sends the reply to a request whose code goes on, and that is settled later; called on the loop."""
        self.now_ms: Callable[[], float] = _never
        """Unix time in milliseconds by the broker's clock. Any thread may call it."""
        self.abandoned = False
        """Whether the replica ended: calls that still run get no reply."""
        self.starting = threading.Lock()
        """Held for the moment in which a request either starts or is cancelled."""
        self.tasks: set[asyncio.Task[Any]] = set()
        """The tasks that have not ended."""
        self._context = context
        self._loop_thread = threading.get_ident()
        self._loop_watch = LoopWatch(backend, self._has_tasks)

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine as a task in this replica's context, and keep a reference to the task until it ends."""
        task = self.spawn_brief(coroutine)
        task.add_done_callback(self.tasks.discard)
        return task

    def spawn_brief(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Like `spawn`, for a coroutine that removes its task from ``tasks``: a callback costs another loop tick."""
        if self._loop_watch.is_asleep:
            self._loop_watch.wake()
        task = self._context.run(self.loop.create_task, coroutine)
        self.tasks.add(task)
        return task

    async def close(self, timeout_s: float) -> bool:
        """Wait for all tasks. Returns False if some were cancelled after ``timeout_s`` seconds; they get no replies."""
        self._loop_watch.close()
        if self.tasks and timeout_s > 0:
            await asyncio.wait(self.tasks, timeout=timeout_s)
        self.abandoned = True
        self.error_log.flush()
        if not self.tasks:
            return True
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks, timeout=1.0)
        return False

    def outcomes(self, method: Method, claims: Sequence[Claim], result: object, run_ms: float) -> Sequence[CallResult]:
        """Return the outcome of each claim after ``method`` returned ``result`` for them.

        It is the reply, or a response or generator that must run before there is one.
        """
        if not method.accepts_batch:
            if type(result) in GENERATORS and self.streams(claims[0].entry):
                return [cast("Values", result)]
            return [self._outcome(claims[0], result, run_ms)]
        try:
            results = _one_each(result, len(claims), self.backend)
        except BaseException as e:  # the result may have an ``__iter__`` of its own
            replies = [failed_reply(claim.entry, e, self.replica, run_ms) for claim in claims]
            self._log_error([claim.entry for claim in claims], replies[0])
            return replies
        return [self._outcome(claim, one, run_ms) for claim, one in zip(claims, results, strict=True)]

    def progress_of(self, claim: Claim) -> Callable[[bytes], None]:
        """Return the function that records the progress of a kept request, from any thread."""

        def report(progress: bytes) -> None:
            if threading.get_ident() == self._loop_thread:
                self.report_progress(claim, progress)  # now, as the request may end in this turn of the loop
            else:
                self.loop.call_soon_threadsafe(self.report_progress, claim, progress)

        return report

    def streams(self, entry: Entry) -> bool:
        """Return whether the reply to ``entry`` may be streamed."""
        return entry.header.window > 0 and self.stream_sink is not None

    def stream_writer(self, claim: Claim) -> StreamWriter:
        """Return the writer of a streamed reply, for an entry that `streams`. May be called on any thread."""
        assert self.stream_sink is not None
        return StreamWriter(self.stream_sink, self.loop, claim)

    def ended(self, writer: StreamWriter, run_ms: float) -> Reply:
        """Send the remaining parts, and return the reply that ends a complete stream."""
        writer.finish()
        return self.reply(writer.claim.entry, Encoded(200, "stream", [], b"%d" % writer.parts), run_ms)

    def broken(self, writer: StreamWriter, error: BaseException, run_ms: float) -> Reply:
        """Send the remaining parts, and return the reply that ends a stream which failed or was stopped."""
        writer.flush()
        entry = writer.claim.entry
        if writer.stopped_because:
            return self.refusal(entry, StreamBroken(self.backend, entry.shown_id, writer.stopped_because))
        if writer.is_stopped:
            return self.cancelled(entry)
        if writer.parts:  # its first values have arrived, and would arrive twice
            return self.unretried(entry, error, run_ms)
        return self.failure(writer.claim, error, run_ms)

    def failures(self, claims: Sequence[Claim], error: BaseException, run_ms: float) -> list[Reply]:
        """Log the error that user code raised for ``claims``; return their replies, and note whether it is retried."""
        replies = [self._noted(claim, error, run_ms) for claim in claims]
        self._log_error([claim.entry for claim in claims], replies[0])
        return replies

    def failure(self, claim: Claim, error: BaseException, run_ms: float) -> Reply:
        """`failures` of one claim."""
        return self.failures((claim,), error, run_ms)[0]

    def unretried(self, entry: Entry, error: BaseException, run_ms: float) -> Reply:
        """Log an error that is never retried, such as that of a result, and return the reply that carries it."""
        reply = failed_reply(entry, error, self.replica, run_ms)
        self._log_error((entry,), reply)
        return reply

    def reply(self, entry: Entry, encoded: Encoded, run_ms: float) -> Reply:
        status, codec, headers, body = encoded
        try:
            check_size(body)
        except PayloadTooLarge as e:
            return self.unretried(entry, e, run_ms)
        return Reply(entry.id, status, codec, headers, None, self.replica, 0.0, run_ms, body)

    def refusal(self, entry: Entry, error: PenstockError) -> Reply:
        """Return the reply to a request that does not run."""
        return Reply(entry.id, error.status, error=to_wire(error), replica=self.replica)

    def cancelled(self, entry: Entry) -> Reply:
        return self.refusal(entry, RequestCancelled(entry.shown_id))

    def _has_tasks(self) -> bool:
        return bool(self.tasks)

    def _noted(self, claim: Claim, error: BaseException, run_ms: float) -> Reply:
        claim.retry = self.retries.wish_of(error)
        return raised_reply(claim.entry, shown_error(error), self.replica, run_ms)

    def _log_error(self, entries: Sequence[Entry], reply: Reply) -> None:
        if reply.error is not None:
            self.error_log.record(entries, from_wire(reply.error))

    def _outcome(self, claim: Claim, result: object, run_ms: float) -> CallResult:
        try:
            if type(result) not in _PLAIN:
                if isinstance(result, BaseException):
                    return self.failure(claim, result, run_ms)
                if isinstance(result, Response) and not is_complete(result):
                    return result
            return self.reply(claim.entry, encode(result, self.backend, self.allow_pickle), run_ms)
        except BaseException as e:  # from `encode`, or from a method of the result
            return self.unretried(claim.entry, e, run_ms)


def ms_since(began_at: float) -> float:
    return (perf_counter() - began_at) * 1000.0


def _drop_progress(claim: Claim, progress: bytes) -> None:
    """Drop progress: no replica is attached that would record it."""


def _not_early(claim: Claim, reply: Reply) -> None:
    """Send nothing: no replica is attached. The reply is sent when the code has ended."""


def _never() -> float:
    return 0.0


def _one_each(results: Any, wanted: int, backend: str) -> Sequence[object]:
    # Arrays and tensors count as lists of their first dimension.
    if not isinstance(results, (list, tuple)) and not hasattr(results, "tolist"):
        kind = type(results).__name__
        raise TypeError(
            f"backend {backend!r} must return a list of {wanted} results for {wanted} requests, not a {kind}"
        )
    each = list(cast("Sequence[object]", results))
    if len(each) != wanted:
        raise ValueError(f"backend {backend!r} returned {len(each)} results for a batch of {wanted} requests")
    return each
