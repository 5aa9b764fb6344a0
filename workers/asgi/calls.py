"""One request in an ASGI application, from its first message to the end of its background tasks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import perf_counter
from typing import Protocol

from starlette.types import ASGIApp, Message, Scope

from ...broker.wire.replies import Reply
from ...broker.wire.requests import Entry
from ...handles.log_context import work_on
from ..claim import Claim
from ..executing.errors import backend_error
from ..executing.executor import Executor, OnReply, ms_since
from ..executing.results import Encoded
from ..executing.stream_writer import StreamStopped, StreamWriter
from .response_messages import ResponseMessages

log = logging.getLogger(__name__)

DISCONNECT_GRACE_S = 5.0
"""How long an application goes on after its client has disconnected, before its task is cancelled."""


class ClientDisconnected(OSError):
    """The client has disconnected: the messages of the application go nowhere (ASGI 2.4)."""


class Application(Protocol):
    """An application that has started."""

    app: ASGIApp

    def scope_of(self, entry: Entry, on_progress: Callable[[bytes], None] | None) -> Scope:
        """Return the scope of a request, by which it reports its progress. Raises `MalformedBody`."""
        ...


class ApplicationCall:
    """One request in an application.

    A response whose body has more than one message streams if the caller accepts that; else it is combined to a whole
    one. Its reply is sent when the response is complete. The request is settled when the application has returned,
    which is after its background tasks: if the replica dies before, another one runs the request again.
    """

    began_s = 0.0

    def __init__(self, executor: Executor, application: Application, claim: Claim, done: OnReply) -> None:
        self._executor, self._application, self._claim, self._done = executor, application, claim, done
        self._response = ResponseMessages(claim.entry.header.method)
        self._writer: StreamWriter | None = None
        """Sends the body in parts; None while the response is whole."""
        self._reply: Reply | None = None
        """The reply, once the response is complete."""
        self._started = self._is_recalled = self._has_received = self._is_disconnected = False
        self._over = asyncio.Event()
        """Set when the client has disconnected or the response is complete."""
        self._grace: asyncio.TimerHandle | None = None
        self._began_at = perf_counter()
        self._task = executor.spawn_brief(self._run())

    def cancel(self, claim: Claim) -> None:
        """Disconnect the application from its client. After a complete response, it goes on undisturbed."""
        if claim is not self._claim or self.recall(claim) or self._reply is not None:
            return
        if self._writer is not None:
            self._writer.stop()
        else:
            self._disconnect()

    def recall(self, claim: Claim) -> bool:
        if claim is not self._claim or self._started or self._is_recalled:
            return False
        self._is_recalled = True
        self._executor.loop.call_soon(self._done, claim, self._executor.cancelled(claim.entry))
        return True

    def _disconnect(self) -> None:
        if not self._is_disconnected and self._reply is None:
            self._is_disconnected = True
            self._over.set()
            self._grace = self._executor.loop.call_later(DISCONNECT_GRACE_S, self._task.cancel)

    async def _run(self) -> None:
        executor = self._executor
        if self._is_recalled:
            executor.tasks.discard(self._task)
            return
        self._started = True
        try:
            reply = await self._call()
        finally:
            executor.tasks.discard(self._task)
            if self._grace is not None:
                self._grace.cancel()
        if reply is not None:
            self._reply = None  # nothing is left to send early
            self._over.set()
            self._done(self._claim, reply)

    async def _call(self) -> Reply | None:
        """Call the application and return the reply; None if the replica ends."""
        executor, entry, application = self._executor, self._claim.entry, self._application
        if (deadline_ms := entry.header.deadline_ms) and deadline_ms <= executor.now_ms():
            return executor.cancelled(entry)
        work_on((entry,))
        self._began_at = perf_counter()
        try:
            on_progress = None if entry.keep_bytes is None else executor.progress_of(self._claim)
            await application.app(application.scope_of(entry, on_progress), self._receive, self._send)
            if not self._is_disconnected:
                self._response.check_ended()
        except BaseException as e:
            if executor.abandoned or not executor.loop.is_running():
                return None
            return self._failed(e)
        return self._reply if self._reply is not None else self._unread()

    def _failed(self, error: BaseException) -> Reply:
        executor, entry = self._executor, self._claim.entry
        if self._reply is not None:
            # Frameworks respond to an exception themselves, and then raise it again.
            executor.error_log.record((entry,), backend_error(error))
            if self._writer is None and not self._claim.is_replied:
                self._claim.retry = executor.retries.wish_of(error)
            return self._reply
        if self._is_disconnected:
            log.debug("the client of request %s disconnected", entry.shown_id, exc_info=error)
            return self._unread()
        if self._writer is not None:
            return executor.broken(self._writer, error, ms_since(self._began_at))
        return executor.failure(self._claim, error, ms_since(self._began_at))

    def _unread(self) -> Reply:
        """Return the reply to a client that has disconnected."""
        executor = self._executor
        if self._writer is not None:
            return executor.broken(self._writer, ClientDisconnected(), ms_since(self._began_at))
        return executor.cancelled(self._claim.entry)

    # -- the callables of ASGI

    async def _receive(self) -> Message:
        if not self._has_received:
            self._has_received = True
            return {"type": "http.request", "body": self._claim.entry.body, "more_body": False}
        await self._over.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self._is_disconnected:
            raise ClientDisconnected("the client has disconnected")
        executor, response = self._executor, self._response
        chunk = response.add(message)
        if chunk is None:
            if executor.streams(self._claim.entry):
                executor.loop.call_soon(self._begin_stream)  # without a body in this turn, its head goes alone
            return
        if self._writer is None:
            if response.is_complete or not executor.streams(self._claim.entry):
                response.keep(chunk)
            else:
                self._begin_stream()
        if self._writer is not None and chunk:
            try:
                await self._writer.put_soon("response", chunk)
            except StreamStopped:
                raise ClientDisconnected("the client has disconnected") from None
        if response.is_complete:
            self._complete()

    def _begin_stream(self) -> None:
        if self._writer is None and not self._response.is_complete and not self._is_disconnected:
            self._writer = writer = self._executor.stream_writer(self._claim)
            writer.on_stop = self._disconnect
            writer.start(self._response.status, self._response.headers)

    def _complete(self) -> None:
        executor, response, run_ms = self._executor, self._response, ms_since(self._began_at)
        if self._writer is not None:
            self._reply = executor.ended(self._writer, run_ms)
        else:
            encoded = Encoded(response.status, "response", response.headers, response.whole_body())
            self._reply = executor.reply(self._claim.entry, encoded, run_ms)
        self._over.set()
        # An application without background tasks returns in this turn of the loop: one write replies and settles.
        executor.loop.call_soon(self._reply_early)

    def _reply_early(self) -> None:
        if self._reply is not None:
            self._executor.reply_early(self._claim, self._reply)
