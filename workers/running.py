"""Requests in the hands of the user's code: on the loop or on a thread, alone or in a batch."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context
from time import perf_counter
from typing import Any, Protocol, TypeVar, cast

from starlette.responses import Response
from starlette.types import Message

from ..broker.wire import Entry, Reply
from ..handles.errors import PenstockError, RequestCancelled, to_wire
from ..handles.log_lines import work_on
from .failures import failed_reply
from .request import Request
from .responses import Collector, Encoded, encode, is_at_hand
from .target import Method
from .threads import Job, Threads

log = logging.getLogger(__name__)

T = TypeVar("T")

Done = Callable[[Entry, Reply], None]
"""Takes the complete answer to one request.

Called on the loop, once for each, and never from within the ``run`` or ``cancel`` that it follows from.
"""


class Running(Protocol):
    """Requests that were handed to the user's code."""

    def cancel(self, entry_id: str) -> None:
        """Give one of them up.

        If it waits for a thread, it is not started; if it is in ``async def`` code that no other request waits for, its
        task is cancelled. Its answer is then `RequestCancelled`. All other code runs to its end.
        """
        ...


class Place:
    """Where the user's code of one replica runs, and what it takes to answer from there."""

    def __init__(self, backend: str, replica: str, threads: Threads, context: Context) -> None:
        self.backend, self.replica = backend, replica
        self.threads = threads
        self.loop = asyncio.get_running_loop()
        self.allow_pickle = False
        self.abandoned = False
        """Nobody hears any more of what still runs."""
        self.starting = threading.Lock()
        """Held for the moment in which a request either starts or is cancelled."""
        self._context = context
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run it as a task in this replica's context, and see that it is not lost until it ends."""
        task = self._context.run(self.loop.create_task, coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self, timeout_s: float) -> bool:
        """Wait for all tasks. Returns False if some had to be abandoned after ``timeout_s`` seconds."""
        if self._tasks and timeout_s > 0:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        self.abandoned = True
        if not self._tasks:
            return True
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks, timeout=1.0)
        return False

    def outcomes(
        self, method: Method, entries: Sequence[Entry], result: object, run_ms: float
    ) -> Sequence[Reply | Response]:
        """Return what becomes of each entry after ``method`` returned ``result`` for them.

        That is its reply, or a response that must be called on the loop before there is one.
        """
        if not method.accepts_batch:
            return [self._outcome(entries[0], result, run_ms)]
        try:
            results = _one_each(result, len(entries), self.backend)
        except (TypeError, ValueError) as e:
            return self.failures(entries, e, run_ms)
        return [self._outcome(entry, one, run_ms) for entry, one in zip(entries, results, strict=True)]

    def failures(self, entries: Sequence[Entry], error: BaseException, run_ms: float) -> list[Reply]:
        return [failed_reply(entry, error, self.replica, run_ms) for entry in entries]

    def reply(self, entry: Entry, encoded: Encoded, run_ms: float) -> Reply:
        status, codec, headers, body = encoded
        return Reply(entry.id, status, codec, headers, None, self.replica, 0.0, run_ms, body)

    def refusal(self, entry: Entry, error: PenstockError) -> Reply:
        return Reply(entry.id, error.status, error=to_wire(error), replica=self.replica)

    def cancelled(self, entry: Entry) -> Reply:
        return self.refusal(entry, RequestCancelled(_name(entry)))

    def _outcome(self, entry: Entry, result: object, run_ms: float) -> Reply | Response:
        if isinstance(result, BaseException):
            return failed_reply(entry, result, self.replica, run_ms)
        if isinstance(result, Response) and not is_at_hand(result):
            return result
        try:
            return self.reply(entry, encode(result, self.backend, self.allow_pickle), run_ms)
        except BaseException as e:  # besides what `encode` raises, what the methods of the result do
            return failed_reply(entry, e, self.replica, run_ms)


class Refused:
    """Requests that the user's code never sees."""

    def __init__(self, place: Place, entries: Sequence[Entry], error: PenstockError, done: Done) -> None:
        for entry in entries:
            place.loop.call_soon(done, entry, place.refusal(entry, error))

    def cancel(self, entry_id: str) -> None:
        pass


class Several:
    """Calls that were handed over together."""

    def __init__(self, calls: Sequence[Running]) -> None:
        self._calls = calls

    def cancel(self, entry_id: str) -> None:
        for call in self._calls:
            call.cancel(entry_id)


class _Call:
    """One call of the user's code: for one request or, if its method takes them, a batch."""

    def __init__(self, place: Place, method: Method, entries: Sequence[Entry], done: Done) -> None:
        self._place, self._method, self._entries, self._done = place, method, entries, done
        self._started = False
        self._responding: list[_Responding] = []

    def cancel(self, entry_id: str) -> None:
        dropped: list[Entry] = []
        with self._place.starting:
            if not self._started:
                dropped = [entry for entry in self._entries if entry.id == entry_id]
                self._entries = [entry for entry in self._entries if entry.id != entry_id]
        for entry in dropped:
            self._place.loop.call_soon(self._done, entry, self._place.cancelled(entry))
        if self._started and not dropped:
            self._interrupt(entry_id)
            for responding in self._responding:
                responding.cancel(entry_id)

    def _interrupt(self, entry_id: str) -> None:
        """Give up an entry that the user's code has; code on a thread cannot be stopped."""

    def _start(self) -> Any:
        """Return what to call the method with. From here on, no entry is dropped."""
        with self._place.starting:
            self._started = True
        work_on([_name(entry) for entry in self._entries])
        self._requests = [Request(entry, self._place.allow_pickle) for entry in self._entries]
        if self._method.accepts_batch:
            return self._requests
        return self._requests[0] if self._requests else None

    def _deliver(self, outcomes: Sequence[Reply | Response]) -> None:
        for request, entry, outcome in zip(
            self._requests, self._entries, outcomes, strict=False
        ):  # none if all were dropped
            if isinstance(outcome, Reply):
                self._done(entry, outcome)
            else:
                self._responding.append(_Responding(self._place, entry, request, outcome, self._done))


class OnThread(_Call, Job):
    """A call of code that blocks."""

    def __init__(self, place: Place, method: Method, entries: Sequence[Entry], done: Done) -> None:
        super().__init__(place, method, entries, done)
        self._outcomes: Sequence[Reply | Response] = ()
        place.threads.submit(self)

    def run(self) -> None:
        argument = self._start()
        if not self._entries:
            return
        began_at = perf_counter()
        try:
            result = self._method.function(argument)
        except BaseException as e:
            self._outcomes = self._place.failures(self._entries, e, _ms_since(began_at))
        else:
            self._outcomes = self._place.outcomes(self._method, self._entries, result, _ms_since(began_at))
        work_on(())  # a health check may be next on this thread

    def finish(self) -> None:
        self._deliver(self._outcomes)


class OnLoop(_Call):
    """A call of ``async def`` code."""

    def __init__(self, place: Place, method: Method, entries: Sequence[Entry], done: Done) -> None:
        super().__init__(place, method, entries, done)
        self._given_up: set[str] = set()
        self._task = place.spawn(self._run())

    def _interrupt(self, entry_id: str) -> None:
        self._given_up.add(entry_id)
        if self._given_up.issuperset(entry.id for entry in self._entries):
            self._task.cancel()

    async def _run(self) -> None:
        place, argument = self._place, self._start()
        if not self._entries:
            return
        began_at = perf_counter()
        outcomes: Sequence[Reply | Response]
        try:
            result = await self._method.function(argument)
        except BaseException as e:
            if place.abandoned or not place.loop.is_running():
                return  # cancelled because the replica ends, or thrown away with the loop
            if self._given_up and isinstance(e, asyncio.CancelledError):
                outcomes = [place.cancelled(entry) for entry in self._entries]
            else:
                outcomes = place.failures(self._entries, e, _ms_since(began_at))
        else:
            outcomes = place.outcomes(self._method, self._entries, result, _ms_since(began_at))
        self._deliver(outcomes)


class _Responding:
    """A response that must be called as an ASGI application: it streams, reads a file or has a background task.

    Its messages are put together to a whole response.
    """

    def __init__(self, place: Place, entry: Entry, request: Request, response: Response, done: Done) -> None:
        self._place, self._entry, self._request, self._response, self._done = place, entry, request, response, done
        self._collector = Collector()
        self._started = self._given_up = False
        self._task = place.spawn(self._run())

    def cancel(self, entry_id: str) -> None:
        # Once it is complete, what still runs is its background task, which nobody has to wait for.
        if entry_id != self._entry.id or self._collector.complete:
            return
        self._given_up = True
        if self._started:  # else its task would end without having run at all
            self._task.cancel()

    async def _run(self) -> None:
        place, entry = self._place, self._entry
        work_on([_name(entry)])
        began_at = perf_counter()
        self._started = True

        async def send(message: Message) -> None:
            if (encoded := self._collector.take(message)) is not None:
                self._done(entry, place.reply(entry, encoded, _ms_since(began_at)))

        try:
            if self._given_up:
                raise asyncio.CancelledError
            await self._response(self._request.scope, self._request.receive, send)
            if not self._collector.complete:
                raise RuntimeError(f"the {type(self._response).__name__} ended before its body was complete")
        except BaseException as e:
            if place.abandoned or not place.loop.is_running():
                return
            if self._collector.complete:
                log.exception("the background task of a response failed (backend %s)", place.backend)
            elif self._given_up and isinstance(e, asyncio.CancelledError):
                self._done(entry, place.cancelled(entry))
            else:
                self._done(entry, failed_reply(entry, e, place.replica, _ms_since(began_at)))


def _name(entry: Entry) -> str:
    """Return the id by which its sender knows the request: that of HTTP, or of a handle's call."""
    return entry.header.request_id or entry.id


def _one_each(results: Any, wanted: int, backend: str) -> Sequence[object]:
    # Arrays and tensors are lists as far as their first dimension goes.
    if not isinstance(results, (list, tuple)) and not hasattr(results, "tolist"):
        kind = type(results).__name__
        raise TypeError(
            f"backend {backend!r} must return a list of {wanted} results for {wanted} requests, not a {kind}"
        )
    each = list(cast("Sequence[object]", results))
    if len(each) != wanted:
        raise ValueError(f"backend {backend!r} returned {len(each)} results for a batch of {wanted} requests")
    return each


def _ms_since(began_at: float) -> float:
    return (perf_counter() - began_at) * 1000.0
