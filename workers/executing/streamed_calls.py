"""Calls that go on after the code has returned: generators, and responses that produce their body themselves."""

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
from ...handles.log_context import work_on
from ..claim import Claim
from .executor import Executor, OnReply, ms_since
from .request import Request
from .results import Collector
from .stream_writer import pump, pump_soon
from .threads import ThreadJob

log = logging.getLogger(__name__)


class GeneratorOnThread:
    """A generator that runs to its end on one thread, and the reply that ends its stream."""

    def __init__(self, executor: Executor, claim: Claim, values: Generator[Any, Any, Any]) -> None:
        self.writer = executor.stream_writer(claim)
        self._executor, self._values = executor, values
        self._error: BaseException | None = None
        self._run_ms = 0.0

    def run(self, began_at: float) -> None:
        """Send all values. Called on the thread; never raises."""
        executor = self._executor
        try:
            pump(self.writer, self._values, executor.backend, executor.allow_pickle)
        except BaseException as e:
            self._error = e
        self._run_ms = ms_since(began_at)

    def reply(self) -> Reply:
        """Return the reply that ends the stream. Called on the loop, after `run`."""
        if self._error is not None:
            return self._executor.broken(self.writer, self._error, self._run_ms)
        return self._executor.ended(self.writer, self._run_ms)


class ThreadStreamCall(ThreadJob):
    """A blocking generator that ``async def`` code returned. It runs on a thread."""

    def __init__(self, executor: Executor, claim: Claim, values: Generator[Any, Any, Any], done: OnReply) -> None:
        self._claim, self._done = claim, done
        self._stream = GeneratorOnThread(executor, claim, values)
        executor.threads.submit(self)

    def cancel(self, claim: Claim) -> None:
        """Close the generator when it yields next."""
        self._stream.writer.stop()

    def run(self) -> None:
        entry = self._claim.entry
        work_on((entry,))
        self._stream.run(perf_counter())
        work_on(())

    def finish(self) -> None:
        self._done(self._claim, self._stream.reply())


class LoopStreamCall:
    """An asynchronous generator. It runs on the loop."""

    def __init__(self, executor: Executor, claim: Claim, values: AsyncGenerator[Any, Any], done: OnReply) -> None:
        self._executor, self._claim, self._values, self._done = executor, claim, values, done
        self._writer = executor.stream_writer(claim)
        self._started = False
        self._task = executor.spawn(self._run())
        self._writer.on_stop = self._interrupt

    def cancel(self, claim: Claim) -> None:
        """Cancel the generator."""
        self._writer.stop()

    def _interrupt(self) -> None:
        if self._started:  # else its task would end without having run at all
            self._task.cancel()

    async def _run(self) -> None:
        executor, writer, entry = self._executor, self._writer, self._claim.entry
        work_on((entry,))
        began_at = perf_counter()
        self._started = True
        try:
            await pump_soon(writer, self._values, executor.backend, executor.allow_pickle)
        except BaseException as e:
            if executor.abandoned or not executor.loop.is_running():
                return
            self._done(self._claim, executor.broken(writer, e, ms_since(began_at)))
        else:
            self._done(self._claim, executor.ended(writer, ms_since(began_at)))


class ResponseCall:
    """A response that must be called as an ASGI application: it streams, reads a file or has a background task.

    If it ``streams`` and its body has more than one message, each message is sent as it comes. Otherwise they are
    combined to one whole response.
    """

    def __init__(
        self, executor: Executor, claim: Claim, request: Request, response: Response, done: OnReply, streams: bool
    ) -> None:
        self._executor, self._claim, self._done = executor, claim, done
        self._request, self._response = request, response
        self._collector = Collector()
        self._writer = executor.stream_writer(claim) if streams else None
        self._is_streaming = False
        """Whether the head was sent, so that the body follows in parts."""
        self._began_at = perf_counter()
        self._started = self._is_cancelled = False
        self._task = executor.spawn(self._run())
        if self._writer is not None:
            self._writer.on_stop = self._interrupt

    def cancel(self, claim: Claim) -> None:
        """Cancel the response. A background task that runs after a complete response goes on."""
        if claim is not self._claim or self._collector.complete:
            return
        if self._writer is not None:
            self._writer.stop()
        else:
            self._interrupt()

    def _interrupt(self) -> None:
        self._is_cancelled = True
        if self._started:  # else its task would end without having run at all
            self._task.cancel()

    async def _run(self) -> None:
        executor, claim, entry = self._executor, self._claim, self._claim.entry
        work_on((entry,))
        self._started = True
        try:
            if self._is_cancelled:
                raise asyncio.CancelledError
            await self._response(self._request.scope, self._request.receive, self._send)
            if not self._collector.complete:
                raise RuntimeError(f"the {type(self._response).__name__} ended before its body was complete")
        except BaseException as e:
            if executor.abandoned or not executor.loop.is_running():
                return
            if self._collector.complete:
                log.exception("the background task of a response of backend %r failed", executor.backend)
            elif self._writer is not None:
                self._done(claim, executor.broken(self._writer, e, ms_since(self._began_at)))
            elif self._is_cancelled and isinstance(e, asyncio.CancelledError):
                self._done(claim, executor.cancelled(entry))
            else:
                self._done(claim, executor.failure(claim, e, ms_since(self._began_at)))
        finally:
            # Starlette leaves it to the garbage collector to close an iterator that a response did not read to its end.
            values: Any = getattr(self._response, "body_iterator", None)
            if isinstance(values, AsyncGeneratorType):
                await self._close(cast("AsyncGenerator[Any, Any]", values))

    async def _close(self, values: AsyncGenerator[Any, Any]) -> None:
        try:
            await values.aclose()
        except (Exception, SystemExit, KeyboardInterrupt):  # the last two would stop the loop, and with it the replica
            log.exception("the body iterator of a response of backend %r cannot be closed", self._executor.backend)

    async def _send(self, message: Message) -> None:
        executor, claim, collector, writer = self._executor, self._claim, self._collector, self._writer
        if not self._is_streaming:
            if (encoded := collector.add(message)) is not None:
                self._done(claim, executor.reply(claim.entry, encoded, ms_since(self._began_at)))
            if writer is None or collector.complete:
                return
            if message["type"] == "http.response.start":
                executor.loop.call_soon(self._begin_stream)  # without a body in this turn, its head goes alone
                return
            self._begin_stream()
        if writer is not None and message["type"] == "http.response.body" and not collector.complete:
            if body := bytes(message.get("body", b"")):
                await writer.put_soon("response", body)
            if not message.get("more_body", False):
                collector.complete = True
                self._done(claim, executor.ended(writer, ms_since(self._began_at)))

    def _begin_stream(self) -> None:
        if self._writer is not None and not self._is_streaming and not self._collector.complete:
            self._is_streaming = True
            self._writer.start(self._collector.status, self._collector.headers)
