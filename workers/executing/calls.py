"""Calls of user code: on the loop or on a thread, for one request or a batch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator, Sequence
from time import perf_counter
from types import AsyncGeneratorType, GeneratorType
from typing import Any, Protocol, Union

from starlette.responses import Response

from ...broker.wire.replies import Reply
from ...broker.wire.requests import Entry
from ...handles.errors import PenstockError
from ...handles.log_context import work_on
from .errors import failed_reply
from .executor import CallResult, Executor, OnReply, ms_since
from .request import Request
from .stream_writer import Values
from .streamed_calls import OnThisThread, Responding, StreamingOnLoop, StreamingOnThread
from .threads import ThreadJob
from .user_code import Method

log = logging.getLogger(__name__)

_Further = Union[StreamingOnThread, StreamingOnLoop, Responding]  # noqa: UP007 - it is evaluated, also on Python 3.10
"""What goes on after a call."""


class RunningCall(Protocol):
    """Requests that were handed to the user's code."""

    def cancel(self, entry_id: str) -> None:
        """Give one of them up.

        If it waits for a thread, it is not started; if it is in ``async def`` code that no other request waits for, its
        task is cancelled; if its answer streams, the generator is closed. Its answer is then `RequestCancelled`. All
        other code runs to its end.
        """
        ...

    def recall(self, entry_id: str) -> bool:
        """Give one up if it has not started. Returns whether that is so; its answer is then `RequestCancelled`."""
        ...


class RefusedCall:
    """Requests that the user's code never sees."""

    def __init__(self, executor: Executor, entries: Sequence[Entry], error: PenstockError, done: OnReply) -> None:
        for entry in entries:
            executor.loop.call_soon(done, entry, executor.refusal(entry, error))

    def cancel(self, entry_id: str) -> None:
        pass

    def recall(self, entry_id: str) -> bool:
        return False


class CallGroup:
    """Calls that were handed over together."""

    def __init__(self, calls: Sequence[RunningCall]) -> None:
        self._calls = calls

    def cancel(self, entry_id: str) -> None:
        for call in self._calls:
            call.cancel(entry_id)

    def recall(self, entry_id: str) -> bool:
        return any(call.recall(entry_id) for call in self._calls)


class _Call:
    """One call of the user's code: for one request or, if its method takes them, a batch."""

    def __init__(self, executor: Executor, method: Method, entries: Sequence[Entry], done: OnReply) -> None:
        self._executor, self._method, self._entries, self._done = executor, method, entries, done
        self._started = False
        self._requests: Sequence[Request] = ()
        self._late: list[Entry] = []
        """Their deadlines had passed when the call began, which they are not part of."""
        self._further: list[_Further] = []
        """What goes on after the call."""

    def cancel(self, entry_id: str) -> None:
        if not self.recall(entry_id) and self._started:
            self._interrupt(entry_id)
            for further in self._further:
                further.cancel(entry_id)

    def recall(self, entry_id: str) -> bool:
        dropped: list[Entry] = []
        with self._executor.starting:
            if not self._started:
                dropped = [entry for entry in self._entries if entry.id == entry_id]
                self._entries = [entry for entry in self._entries if entry.id != entry_id]
        for entry in dropped:
            self._executor.loop.call_soon(self._done, entry, self._executor.cancelled(entry))
        return bool(dropped)

    def _interrupt(self, entry_id: str) -> None:
        """Give up an entry that the user's code has; code on a thread cannot be stopped."""

    def _start(self) -> Any:
        """Return what to call the method with. From here on, no entry is dropped.

        None of them may be left: those that have waited here for too long are dropped now.
        """
        executor = self._executor
        with executor.starting:
            self._started = True
        for entry in self._entries:
            if (deadline_ms := entry.header.deadline_ms) and deadline_ms <= executor.now_ms():
                self._late.append(entry)
        if self._late:
            self._entries = [entry for entry in self._entries if entry not in self._late]
        if not self._method.accepts_batch and self._entries:  # for the one there is, without a list comprehension
            entry = self._entries[0]
            request = Request(entry, executor.allow_pickle)
            self._requests = (request,)
            work_on(((entry.header.request_id, entry.id),))
            return request
        work_on([(entry.header.request_id, entry.id) for entry in self._entries])
        self._requests = [Request(entry, executor.allow_pickle) for entry in self._entries]
        return self._requests if self._entries else None

    def _deliver(self, outcomes: Sequence[CallResult]) -> None:
        for entry in self._late:
            self._done(entry, self._executor.cancelled(entry))
        # There is no outcome if all entries were dropped.
        for index, (entry, outcome) in enumerate(zip(self._entries, outcomes, strict=False)):
            if isinstance(outcome, Reply):
                self._done(entry, outcome)
                continue
            try:
                self._further.append(self._go_on(index, entry, outcome))
            except Exception as e:  # such as a thread that the system does not start
                log.exception("cannot go on with an answer of backend %r", self._executor.backend)
                self._done(entry, failed_reply(entry, e, self._executor.replica))
        for entry in self._entries[len(outcomes) :] if len(outcomes) < len(self._entries) else ():
            error = RuntimeError(f"backend {self._executor.backend!r} has made no answer to this request")
            self._done(entry, failed_reply(entry, error, self._executor.replica))

    def _go_on(self, index: int, entry: Entry, outcome: Response | Values) -> _Further:
        if isinstance(outcome, Response):
            streams = not self._method.accepts_batch and self._executor.streams(entry)
            return Responding(self._executor, entry, self._requests[index], outcome, self._done, streams)
        if isinstance(outcome, GeneratorType):
            return StreamingOnThread(self._executor, entry, outcome, self._done)
        assert isinstance(outcome, AsyncGeneratorType)
        return StreamingOnLoop(self._executor, entry, outcome, self._done)


class ThreadCall(_Call, ThreadJob):
    """A call of code that blocks."""

    def __init__(self, executor: Executor, method: Method, entries: Sequence[Entry], done: OnReply) -> None:
        super().__init__(executor, method, entries, done)
        self._outcomes: Sequence[CallResult] = ()
        self._stream: OnThisThread | None = None
        self._given_up = False
        executor.threads.submit(self)

    def _interrupt(self, entry_id: str) -> None:
        with self._executor.starting:
            self._given_up = True
            stream = self._stream
        if stream is not None:
            stream.flow.stop()

    def run(self) -> None:
        began_at = perf_counter()
        try:
            argument = self._start()
            if not self._entries:
                return
            result = self._method.function(argument)
        except BaseException as e:
            self._outcomes = self._executor.failures(self._entries, e, ms_since(began_at))
        else:
            self._outcomes = self._executor.outcomes(self._method, self._entries, result, ms_since(began_at))
            if isinstance(values := self._outcomes[0], GeneratorType):
                self._stream_here(values, began_at)
        work_on(())  # a health check may be next on this thread

    def _stream_here(self, values: Generator[Any, Any, Any], began_at: float) -> None:
        """Run a generator to its end, so that no other request of one that is alone on its thread comes between."""
        with self._executor.starting:
            stream = self._stream = OnThisThread(self._executor, self._entries[0], values)
            given_up = self._given_up
        if given_up:
            stream.flow.stop()
        stream.run(began_at)

    def finish(self) -> None:
        if self._stream is not None:
            self._done(self._entries[0], self._stream.reply())
        else:
            self._deliver(self._outcomes)


class LoopCall(_Call):
    """A call of ``async def`` code."""

    def __init__(self, executor: Executor, method: Method, entries: Sequence[Entry], done: OnReply) -> None:
        super().__init__(executor, method, entries, done)
        self._given_up: set[str] = set()
        self._task = executor.spawn_brief(self._run())

    def _interrupt(self, entry_id: str) -> None:
        self._given_up.add(entry_id)
        if self._given_up.issuperset(entry.id for entry in self._entries):
            self._task.cancel()

    async def _run(self) -> None:
        executor, began_at = self._executor, perf_counter()
        outcomes: Sequence[CallResult]
        try:
            argument = self._start()
            if not self._entries:
                executor.tasks.discard(self._task)
                self._deliver(())
                return
            result = await self._method.function(argument)
        except BaseException as e:
            executor.tasks.discard(self._task)
            if executor.abandoned or not executor.loop.is_running():
                return  # cancelled because the replica ends, or thrown away with the loop
            if self._given_up and isinstance(e, asyncio.CancelledError):
                outcomes = [executor.cancelled(entry) for entry in self._entries]
            else:
                outcomes = executor.failures(self._entries, e, ms_since(began_at))
        else:
            executor.tasks.discard(self._task)
            outcomes = executor.outcomes(self._method, self._entries, result, ms_since(began_at))
        self._deliver(outcomes)
