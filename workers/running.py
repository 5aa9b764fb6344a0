"""Requests in the hands of the user's code: on the loop or on a thread, alone or in a batch."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from contextvars import Context
from time import perf_counter
from types import AsyncGeneratorType, GeneratorType
from typing import Any, Protocol, TypeVar, Union, cast

from starlette.responses import Response
from starlette.types import Message

from ..broker.wire import Entry, Reply
from ..handles.bodies import check_size
from ..handles.errors import PayloadTooLarge, PenstockError, RequestCancelled, StreamBroken, to_wire
from ..handles.log_lines import work_on
from .failures import failed_reply
from .request import Request
from .responses import Collector, Encoded, encode, is_at_hand
from .streams import GENERATORS, Outflow, Outlet, Values, pump, pump_soon
from .target import Method
from .threads import Job, Threads

log = logging.getLogger(__name__)

T = TypeVar("T")

Outcome = Union[Reply, Response, Values]  # noqa: UP007 - it is evaluated, also on Python 3.10
"""What the user's code has made of a request: its reply, or what the reply is still to be made of."""

_PLAIN = frozenset((dict, list, str, int, float, bool, bytes, type(None)))
"""What most results are: neither an exception nor a response, without asking each."""

Done = Callable[[Entry, Reply], None]
"""Takes the complete answer to one request.

Called on the loop, once for each, and never from within the ``run`` or ``cancel`` that it follows from.
"""


class Running(Protocol):
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


class Place:
    """Where the user's code of one replica runs, and what it takes to answer from there."""

    def __init__(self, backend: str, replica: str, threads: Threads, context: Context) -> None:
        self.backend, self.replica = backend, replica
        self.threads = threads
        self.loop = asyncio.get_running_loop()
        self.allow_pickle = False
        self.outlet: Outlet | None = None
        """Where answers in parts go; without it, none are sent."""
        self.now_ms: Callable[[], float] = _never
        """Unix time by the clock that deadlines are in; may be called on any thread."""
        self.abandoned = False
        """Nobody hears any more of what still runs."""
        self.starting = threading.Lock()
        """Held for the moment in which a request either starts or is cancelled."""
        self.tasks: set[asyncio.Task[Any]] = set()
        """All that have not ended."""
        self._context = context

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run it as a task in this replica's context, and see that it is not lost until it ends."""
        task = self.spawn_brief(coroutine)
        task.add_done_callback(self.tasks.discard)
        return task

    def spawn_brief(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Like `spawn`, but it takes itself off ``tasks`` as it ends: a callback is another turn of the loop."""
        task = self._context.run(self.loop.create_task, coroutine)
        self.tasks.add(task)
        return task

    async def close(self, timeout_s: float) -> bool:
        """Wait for all tasks. Returns False if some had to be abandoned after ``timeout_s`` seconds."""
        if self.tasks and timeout_s > 0:
            await asyncio.wait(self.tasks, timeout=timeout_s)
        self.abandoned = True
        if not self.tasks:
            return True
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks, timeout=1.0)
        return False

    def outcomes(self, method: Method, entries: Sequence[Entry], result: object, run_ms: float) -> Sequence[Outcome]:
        """Return what becomes of each entry after ``method`` returned ``result`` for them.

        That is its reply, or what must be run on before there is one: a response that is called on the loop, or a
        generator.
        """
        if not method.accepts_batch:
            if type(result) in GENERATORS and self.streams(entries[0]):
                return [cast("Values", result)]
            return [self._outcome(entries[0], result, run_ms)]
        try:
            results = _one_each(result, len(entries), self.backend)
        except (TypeError, ValueError) as e:
            return self.failures(entries, e, run_ms)
        return [self._outcome(entry, one, run_ms) for entry, one in zip(entries, results, strict=True)]

    def streams(self, entry: Entry) -> bool:
        """Return whether the answer to ``entry`` may be sent in parts."""
        return entry.header.window > 0 and self.outlet is not None

    def flow(self, entry: Entry) -> Outflow:
        """Begin to answer in parts. To be called only if the entry `streams`; may be called on any thread."""
        assert self.outlet is not None
        return Outflow(self.outlet, self.loop, entry)

    def ended(self, flow: Outflow, run_ms: float) -> Reply:
        """Return the answer that ends a stream, once it is complete."""
        flow.finish()
        return self.reply(flow.entry, Encoded(200, "stream", [], b"%d" % flow.parts), run_ms)

    def broken(self, flow: Outflow, error: BaseException, run_ms: float) -> Reply:
        """Return the answer that ends a stream, if the user's code raised ``error`` or was stopped."""
        flow.flush()
        if flow.stopped_because:
            return self.refusal(flow.entry, StreamBroken(self.backend, flow.entry.id, flow.stopped_because))
        if flow.stopped:
            return self.cancelled(flow.entry)
        return failed_reply(flow.entry, error, self.replica, run_ms)

    def failures(self, entries: Sequence[Entry], error: BaseException, run_ms: float) -> list[Reply]:
        return [failed_reply(entry, error, self.replica, run_ms) for entry in entries]

    def reply(self, entry: Entry, encoded: Encoded, run_ms: float) -> Reply:
        status, codec, headers, body = encoded
        try:
            check_size(body)
        except PayloadTooLarge as e:
            return failed_reply(entry, e, self.replica, run_ms)
        return Reply(entry.id, status, codec, headers, None, self.replica, 0.0, run_ms, body)

    def refusal(self, entry: Entry, error: PenstockError) -> Reply:
        return Reply(entry.id, error.status, error=to_wire(error), replica=self.replica)

    def cancelled(self, entry: Entry) -> Reply:
        return self.refusal(entry, RequestCancelled(_name(entry)))

    def _outcome(self, entry: Entry, result: object, run_ms: float) -> Outcome:
        if type(result) not in _PLAIN:
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

    def recall(self, entry_id: str) -> bool:
        return False


class Several:
    """Calls that were handed over together."""

    def __init__(self, calls: Sequence[Running]) -> None:
        self._calls = calls

    def cancel(self, entry_id: str) -> None:
        for call in self._calls:
            call.cancel(entry_id)

    def recall(self, entry_id: str) -> bool:
        return any(call.recall(entry_id) for call in self._calls)


class _Call:
    """One call of the user's code: for one request or, if its method takes them, a batch."""

    def __init__(self, place: Place, method: Method, entries: Sequence[Entry], done: Done) -> None:
        self._place, self._method, self._entries, self._done = place, method, entries, done
        self._started = False
        self._requests: Sequence[Request] = ()
        self._late: list[Entry] = []
        """Their deadlines had passed when the call began, which they are not part of."""
        self._further: list[_Responding | _Streaming] = []
        """What goes on after the call."""

    def cancel(self, entry_id: str) -> None:
        if not self.recall(entry_id) and self._started:
            self._interrupt(entry_id)
            for further in self._further:
                further.cancel(entry_id)

    def recall(self, entry_id: str) -> bool:
        dropped: list[Entry] = []
        with self._place.starting:
            if not self._started:
                dropped = [entry for entry in self._entries if entry.id == entry_id]
                self._entries = [entry for entry in self._entries if entry.id != entry_id]
        for entry in dropped:
            self._place.loop.call_soon(self._done, entry, self._place.cancelled(entry))
        return bool(dropped)

    def _interrupt(self, entry_id: str) -> None:
        """Give up an entry that the user's code has; code on a thread cannot be stopped."""

    def _start(self) -> Any:
        """Return what to call the method with. From here on, no entry is dropped.

        None of them may be left: those that have waited here for too long are dropped now.
        """
        place = self._place
        with place.starting:
            self._started = True
        for entry in self._entries:
            if (deadline_ms := entry.header.deadline_ms) and deadline_ms <= place.now_ms():
                self._late.append(entry)
        if self._late:
            self._entries = [entry for entry in self._entries if entry not in self._late]
        if not self._method.accepts_batch and self._entries:  # for the one there is, without a list comprehension
            entry = self._entries[0]
            request = Request(entry, place.allow_pickle)
            self._requests = (request,)
            work_on((entry.header.request_id or entry.id,))
            return request
        work_on([_name(entry) for entry in self._entries])
        self._requests = [Request(entry, place.allow_pickle) for entry in self._entries]
        return self._requests if self._entries else None

    def _deliver(self, outcomes: Sequence[Outcome]) -> None:
        for entry in self._late:
            self._done(entry, self._place.cancelled(entry))
        for request, entry, outcome in zip(
            self._requests, self._entries, outcomes, strict=False
        ):  # none if all were dropped
            if isinstance(outcome, Reply):
                self._done(entry, outcome)
            elif isinstance(outcome, Response):
                streams = not self._method.accepts_batch and self._place.streams(entry)
                self._further.append(_Responding(self._place, entry, request, outcome, self._done, streams))
            elif isinstance(outcome, GeneratorType):
                self._further.append(_StreamingOnThread(self._place, entry, outcome, self._done))
            elif isinstance(outcome, AsyncGeneratorType):
                self._further.append(_StreamingOnLoop(self._place, entry, outcome, self._done))


class OnThread(_Call, Job):
    """A call of code that blocks."""

    def __init__(self, place: Place, method: Method, entries: Sequence[Entry], done: Done) -> None:
        super().__init__(place, method, entries, done)
        self._outcomes: Sequence[Outcome] = ()
        self._stream: _OnThisThread | None = None
        self._given_up = False
        place.threads.submit(self)

    def _interrupt(self, entry_id: str) -> None:
        with self._place.starting:
            self._given_up = True
            stream = self._stream
        if stream is not None:
            stream.flow.stop()

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
            if isinstance(values := self._outcomes[0], GeneratorType):
                self._stream_here(values, began_at)
        work_on(())  # a health check may be next on this thread

    def _stream_here(self, values: Generator[Any, Any, Any], began_at: float) -> None:
        """Run a generator to its end, so that no other request of one that is alone on its thread comes between."""
        with self._place.starting:
            stream = self._stream = _OnThisThread(self._place, self._entries[0], values)
            given_up = self._given_up
        if given_up:
            stream.flow.stop()
        stream.run(began_at)

    def finish(self) -> None:
        if self._stream is not None:
            self._done(self._entries[0], self._stream.reply())
        else:
            self._deliver(self._outcomes)


class OnLoop(_Call):
    """A call of ``async def`` code."""

    def __init__(self, place: Place, method: Method, entries: Sequence[Entry], done: Done) -> None:
        super().__init__(place, method, entries, done)
        self._given_up: set[str] = set()
        self._task = place.spawn_brief(self._run())

    def _interrupt(self, entry_id: str) -> None:
        self._given_up.add(entry_id)
        if self._given_up.issuperset(entry.id for entry in self._entries):
            self._task.cancel()

    async def _run(self) -> None:
        place, argument = self._place, self._start()
        if not self._entries:
            place.tasks.discard(self._task)
            self._deliver(())
            return
        began_at = perf_counter()
        outcomes: Sequence[Outcome]
        try:
            result = await self._method.function(argument)
        except BaseException as e:
            place.tasks.discard(self._task)
            if place.abandoned or not place.loop.is_running():
                return  # cancelled because the replica ends, or thrown away with the loop
            if self._given_up and isinstance(e, asyncio.CancelledError):
                outcomes = [place.cancelled(entry) for entry in self._entries]
            else:
                outcomes = place.failures(self._entries, e, _ms_since(began_at))
        else:
            place.tasks.discard(self._task)
            outcomes = place.outcomes(self._method, self._entries, result, _ms_since(began_at))
        self._deliver(outcomes)


class _OnThisThread:
    """A generator that runs to its end on one thread, and what comes of it."""

    def __init__(self, place: Place, entry: Entry, values: Generator[Any, Any, Any]) -> None:
        self.flow = place.flow(entry)
        self._place, self._values = place, values
        self._error: BaseException | None = None
        self._run_ms = 0.0

    def run(self, began_at: float) -> None:
        place = self._place
        try:
            pump(self.flow, self._values, place.backend, place.allow_pickle)
        except BaseException as e:
            self._error = e
        self._run_ms = _ms_since(began_at)

    def reply(self) -> Reply:
        """Return what ends it. To be called on the loop, after `run`."""
        if self._error is not None:
            return self._place.broken(self.flow, self._error, self._run_ms)
        return self._place.ended(self.flow, self._run_ms)


class _StreamingOnThread(Job):
    """A generator that blocks, made by ``async def`` code."""

    def __init__(self, place: Place, entry: Entry, values: Generator[Any, Any, Any], done: Done) -> None:
        self._entry, self._done = entry, done
        self._stream = _OnThisThread(place, entry, values)
        place.threads.submit(self)

    def cancel(self, entry_id: str) -> None:
        self._stream.flow.stop()

    def run(self) -> None:
        work_on([_name(self._entry)])
        self._stream.run(perf_counter())
        work_on(())

    def finish(self) -> None:
        self._done(self._entry, self._stream.reply())


class _StreamingOnLoop:
    """An asynchronous generator."""

    def __init__(self, place: Place, entry: Entry, values: AsyncGenerator[Any, Any], done: Done) -> None:
        self._place, self._entry, self._values, self._done = place, entry, values, done
        self._flow = place.flow(entry)
        self._started = False
        self._task = place.spawn(self._run())
        self._flow.on_stop = self._interrupt

    def cancel(self, entry_id: str) -> None:
        self._flow.stop()

    def _interrupt(self) -> None:
        if self._started:  # else its task would end without having run at all
            self._task.cancel()

    async def _run(self) -> None:
        place, flow = self._place, self._flow
        work_on([_name(self._entry)])
        began_at = perf_counter()
        self._started = True
        try:
            await pump_soon(flow, self._values, place.backend, place.allow_pickle)
        except BaseException as e:
            if place.abandoned or not place.loop.is_running():
                return
            self._done(self._entry, place.broken(flow, e, _ms_since(began_at)))
        else:
            self._done(self._entry, place.ended(flow, _ms_since(began_at)))


_Streaming = Union[_StreamingOnThread, _StreamingOnLoop]  # noqa: UP007 - it is evaluated, also on Python 3.10


class _Responding:
    """A response that must be called as an ASGI application: it streams, reads a file or has a background task.

    Its messages go out as they come if it ``streams``, and if there is more than one of its body. Else they are put
    together to a whole response.
    """

    def __init__(
        self, place: Place, entry: Entry, request: Request, response: Response, done: Done, streams: bool
    ) -> None:
        self._place, self._entry, self._request, self._response, self._done = place, entry, request, response, done
        self._collector = Collector()
        self._flow = place.flow(entry) if streams else None
        self._passing_on = False
        """Its head has gone out, so what follows does as well."""
        self._began_at = perf_counter()
        self._started = self._given_up = False
        self._task = place.spawn(self._run())
        if self._flow is not None:
            self._flow.on_stop = self._interrupt

    def cancel(self, entry_id: str) -> None:
        # Once it is complete, what still runs is its background task, which nobody has to wait for.
        if entry_id != self._entry.id or self._collector.complete:
            return
        if self._flow is not None:
            self._flow.stop()
        else:
            self._interrupt()

    def _interrupt(self) -> None:
        self._given_up = True
        if self._started:  # else its task would end without having run at all
            self._task.cancel()

    async def _run(self) -> None:
        place, entry = self._place, self._entry
        work_on([_name(entry)])
        self._started = True
        try:
            if self._given_up:
                raise asyncio.CancelledError
            await self._response(self._request.scope, self._request.receive, self._send)
            if not self._collector.complete:
                raise RuntimeError(f"the {type(self._response).__name__} ended before its body was complete")
        except BaseException as e:
            if place.abandoned or not place.loop.is_running():
                return
            if self._collector.complete:
                log.exception("the background task of a response failed (backend %s)", place.backend)
            elif self._flow is not None:
                self._done(entry, place.broken(self._flow, e, _ms_since(self._began_at)))
            elif self._given_up and isinstance(e, asyncio.CancelledError):
                self._done(entry, place.cancelled(entry))
            else:
                self._done(entry, failed_reply(entry, e, place.replica, _ms_since(self._began_at)))
        finally:
            # Starlette leaves it to the garbage collector to close what a response was still to read from.
            values = getattr(self._response, "body_iterator", None)
            if isinstance(values, AsyncGeneratorType):
                await values.aclose()

    async def _send(self, message: Message) -> None:
        place, entry, collector, flow = self._place, self._entry, self._collector, self._flow
        if not self._passing_on:
            if (encoded := collector.take(message)) is not None:
                self._done(entry, place.reply(entry, encoded, _ms_since(self._began_at)))
            if flow is None or collector.complete:
                return
            if message["type"] == "http.response.start":
                place.loop.call_soon(self._pass_on)  # without a body in this turn, its head goes alone
                return
            self._pass_on()
        if flow is not None and message["type"] == "http.response.body" and not collector.complete:
            if body := bytes(message.get("body", b"")):
                await flow.put_soon("response", body)
            if not message.get("more_body", False):
                collector.complete = True
                self._done(entry, place.ended(flow, _ms_since(self._began_at)))

    def _pass_on(self) -> None:
        if self._flow is not None and not self._passing_on and not self._collector.complete:
            self._passing_on = True
            self._flow.start(self._collector.status, self._collector.headers)


def _never() -> float:
    return 0.0


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
