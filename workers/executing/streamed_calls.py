"""Streamed calls: generators, and responses that produce their body themselves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Generator
from time import perf_counter
from types import AsyncGeneratorType
from typing import Any, cast

from starlette.responses import Response
from starlette.types import Message

from ...broker.wire.replies import Reply
from ...broker.wire.requests import Entry
from ...handles.log_context import work_on
from .errors import raised_reply
from .executor import Executor, OnReply, ms_since
from .request import Request
from .results import Collector
from .stream_writer import pump, pump_soon
from .threads import ThreadJob

log = logging.getLogger(__name__)


class OnThisThread:
    """A generator that runs to its end on one thread, and what comes of it."""

    def __init__(self, executor: Executor, entry: Entry, values: Generator[Any, Any, Any]) -> None:
        self.flow = executor.flow(entry)
        self._executor, self._values = executor, values
        self._error: BaseException | None = None
        self._run_ms = 0.0

    def run(self, began_at: float) -> None:
        executor = self._executor
        try:
            pump(self.flow, self._values, executor.backend, executor.allow_pickle)
        except BaseException as e:
            self._error = e
        self._run_ms = ms_since(began_at)

    def reply(self) -> Reply:
        """Return what ends it. To be called on the loop, after `run`."""
        if self._error is not None:
            return self._executor.broken(self.flow, self._error, self._run_ms)
        return self._executor.ended(self.flow, self._run_ms)


class StreamingOnThread(ThreadJob):
    """A generator that blocks, made by ``async def`` code."""

    def __init__(self, executor: Executor, entry: Entry, values: Generator[Any, Any, Any], done: OnReply) -> None:
        self._entry, self._done = entry, done
        self._stream = OnThisThread(executor, entry, values)
        executor.threads.submit(self)

    def cancel(self, entry_id: str) -> None:
        self._stream.flow.stop()

    def run(self) -> None:
        work_on([(self._entry.header.request_id, self._entry.id)])
        self._stream.run(perf_counter())
        work_on(())

    def finish(self) -> None:
        self._done(self._entry, self._stream.reply())


class StreamingOnLoop:
    """An asynchronous generator."""

    def __init__(self, executor: Executor, entry: Entry, values: AsyncGenerator[Any, Any], done: OnReply) -> None:
        self._executor, self._entry, self._values, self._done = executor, entry, values, done
        self._flow = executor.flow(entry)
        self._started = False
        self._task = executor.spawn(self._run())
        self._flow.on_stop = self._interrupt

    def cancel(self, entry_id: str) -> None:
        self._flow.stop()

    def _interrupt(self) -> None:
        if self._started:  # else its task would end without having run at all
            self._task.cancel()

    async def _run(self) -> None:
        executor, flow = self._executor, self._flow
        work_on([(self._entry.header.request_id, self._entry.id)])
        began_at = perf_counter()
        self._started = True
        try:
            await pump_soon(flow, self._values, executor.backend, executor.allow_pickle)
        except BaseException as e:
            if executor.abandoned or not executor.loop.is_running():
                return
            self._done(self._entry, executor.broken(flow, e, ms_since(began_at)))
        else:
            self._done(self._entry, executor.ended(flow, ms_since(began_at)))


class Responding:
    """A response that must be called as an ASGI application: it streams, reads a file or has a background task.

    Its messages go out as they come if it ``streams``, and if there is more than one of its body. Else they are put
    together to a whole response.
    """

    def __init__(
        self, executor: Executor, entry: Entry, request: Request, response: Response, done: OnReply, streams: bool
    ) -> None:
        self._executor, self._entry, self._request, self._response, self._done = (
            executor,
            entry,
            request,
            response,
            done,
        )
        self._collector = Collector()
        self._flow = executor.flow(entry) if streams else None
        self._passing_on = False
        """Its head has gone out, so what follows does as well."""
        self._began_at = perf_counter()
        self._started = self._given_up = False
        self._task = executor.spawn(self._run())
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
        executor, entry = self._executor, self._entry
        work_on([(entry.header.request_id, entry.id)])
        self._started = True
        try:
            if self._given_up:
                raise asyncio.CancelledError
            await self._response(self._request.scope, self._request.receive, self._send)
            if not self._collector.complete:
                raise RuntimeError(f"the {type(self._response).__name__} ended before its body was complete")
        except BaseException as e:
            if executor.abandoned or not executor.loop.is_running():
                return
            if self._collector.complete:
                log.exception("the background task of a response failed (backend %s)", executor.backend)
            elif self._flow is not None:
                self._done(entry, executor.broken(self._flow, e, ms_since(self._began_at)))
            elif self._given_up and isinstance(e, asyncio.CancelledError):
                self._done(entry, executor.cancelled(entry))
            else:
                self._done(entry, raised_reply(entry, e, executor.replica, ms_since(self._began_at)))
        finally:
            # Starlette leaves it to the garbage collector to close what a response was still to read from.
            values: Any = getattr(self._response, "body_iterator", None)
            if isinstance(values, AsyncGeneratorType):
                await self._close(cast("AsyncGenerator[Any, Any]", values))

    async def _close(self, values: AsyncGenerator[Any, Any]) -> None:
        try:
            await values.aclose()
        except (Exception, SystemExit, KeyboardInterrupt):  # the last two would stop the loop, and with it the replica
            log.exception("a response of backend %s cannot be closed", self._executor.backend)

    async def _send(self, message: Message) -> None:
        executor, entry, collector, flow = self._executor, self._entry, self._collector, self._flow
        if not self._passing_on:
            if (encoded := collector.take(message)) is not None:
                self._done(entry, executor.reply(entry, encoded, ms_since(self._began_at)))
            if flow is None or collector.complete:
                return
            if message["type"] == "http.response.start":
                executor.loop.call_soon(self._pass_on)  # without a body in this turn, its head goes alone
                return
            self._pass_on()
        if flow is not None and message["type"] == "http.response.body" and not collector.complete:
            if body := bytes(message.get("body", b"")):
                await flow.put_soon("response", body)
            if not message.get("more_body", False):
                collector.complete = True
                self._done(entry, executor.ended(flow, ms_since(self._began_at)))

    def _pass_on(self) -> None:
        if self._flow is not None and not self._passing_on and not self._collector.complete:
            self._passing_on = True
            self._flow.start(self._collector.status, self._collector.headers)
