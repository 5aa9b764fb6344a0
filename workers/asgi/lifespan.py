"""The lifespan of an application: started before a replica serves, shut down after its last request.

An application supports the protocol if it receives ``lifespan.startup``. One that raises before, or sends a message of
another protocol, or returns, is served without: https://asgi.readthedocs.io/en/latest/specs/lifespan.html.
"""

from __future__ import annotations

import asyncio
import logging
from contextvars import Context
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from ...handles.errors import BackendError
from ..executing.errors import backend_error

log = logging.getLogger(__name__)

LEAST_SHUTDOWN_S = 1.0
"""An application has at least this long to shut down, also if its requests took all of the time to drain."""

_RAISE_S = 1.0
"""How long after ``lifespan.startup.failed`` the exception is awaited that most frameworks raise then."""

_TRACEBACK = "Traceback (most recent call last)"


class Lifespan:
    """The lifespan of one application in one replica."""

    def __init__(self, app: ASGIApp, backend: str) -> None:
        self.state: dict[str, Any] = {}
        """The items that the application stored in ``scope["state"]``; each request gets a copy."""
        self._app, self._backend = app, backend
        self._task: asyncio.Task[None] | None = None
        self._started = asyncio.Event()
        """Set when the startup is complete or has failed."""
        self._shutting_down, self._is_down = asyncio.Event(), asyncio.Event()
        self._has_received = self._is_foreign = False
        """Whether the application has received a message; whether it has sent one of another protocol."""
        self._failure: str | None = None
        """The message of a failed startup."""
        self._raised: BaseException | None = None

    async def startup(self, context: Context) -> None:
        """Run the startup of the application in ``context``, however long it takes.

        Raises:
            BackendError: it failed.
        """
        loop = asyncio.get_running_loop()
        task = self._task = context.run(loop.create_task, self._run())
        try:
            await _either(task, self._started)
            if self._failure is not None:
                await asyncio.wait([task], timeout=_RAISE_S)
                raise _startup_error(self._failure, self._raised)
        except BaseException:
            await self._cancel()
            raise
        if not self._started.is_set():
            self._task = None
            if self._raised is not None and self._has_received and not self._is_foreign:
                raise backend_error(self._raised) from None
            log.debug("the application of backend %r has no lifespan", self._backend, exc_info=self._raised)

    async def shutdown(self, timeout_s: float) -> None:
        """Run the shutdown of the application, for at most ``timeout_s`` seconds but at least one. Never raises."""
        if self._task is None:
            return
        timeout_s = max(timeout_s, LEAST_SHUTDOWN_S)
        self._shutting_down.set()
        try:
            await asyncio.wait_for(_either(self._task, self._is_down), timeout_s)
            await asyncio.wait([self._task], timeout=_RAISE_S)
        except asyncio.TimeoutError:
            log.warning("the application of backend %r did not shut down within %g s", self._backend, timeout_s)
        await self._cancel()

    async def _cancel(self) -> None:
        task, self._task = self._task, None
        if task is not None and not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=_RAISE_S)

    async def _run(self) -> None:
        scope: Scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        try:
            await self._app(scope, self._receive, self._send)
        except asyncio.CancelledError:
            raise
        except BaseException as e:  # SystemExit must not pass through a task
            self._raised = e
            if self._started.is_set() and self._failure is None:
                when = "shutdown" if self._shutting_down.is_set() else "lifespan"
                log.error("the %s of the application of backend %r failed", when, self._backend, exc_info=e)

    async def _receive(self) -> Message:
        if not self._has_received:
            self._has_received = True
            return {"type": "lifespan.startup"}
        await self._shutting_down.wait()
        if self._is_down.is_set():
            await asyncio.Event().wait()  # there are no more messages; the task is cancelled
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        is_startup = not self._started.is_set()
        if kind == "lifespan.startup.complete" and is_startup:
            self._started.set()
        elif kind == "lifespan.startup.failed" and is_startup:
            self._failure = str(message.get("message", ""))
            self._started.set()
        elif kind == "lifespan.shutdown.complete" and not is_startup:
            self._is_down.set()
        elif kind == "lifespan.shutdown.failed" and not is_startup:
            log.error("the shutdown of backend %r failed: %s", self._backend, message.get("message", ""))
            self._is_down.set()
        else:
            self._is_foreign = self._is_foreign or is_startup
            raise RuntimeError(f"an application cannot send {kind!r} now: this is its lifespan")


async def _either(task: asyncio.Task[None], event: asyncio.Event) -> None:
    """Wait for the end of ``task`` or for ``event``."""
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()


def _startup_error(message: str, raised: BaseException | None) -> BackendError:
    if raised is not None:
        return backend_error(raised)
    if message.startswith(_TRACEBACK):
        type_name, _, text = message.strip().splitlines()[-1].partition(": ")
        return BackendError(type_name, text, message)
    return BackendError("StartupFailed", message or "the application gave no reason")
