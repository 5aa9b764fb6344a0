"""An ASGI application as the code of a backend: loaded, and started by its lifespan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import Context
from typing import Any

from starlette.types import ASGIApp, Scope

from ...broker.wire.requests import Entry
from ..claim import Claim
from ..executing.executor import Executor, OnReply
from ..executing.methods import CALL
from ..executing.user_code import Method, NotCallable
from .calls import ApplicationCall
from .lifespan import Lifespan
from .scopes import http_scope


class AsgiCode:
    """An application in a replica. It has no methods that callers could name, and no hooks."""

    accepts_batch = False

    def __init__(self, app: ASGIApp, backend: str) -> None:
        self.app = app
        self.call = Method(app, is_async=True, accepts_batch=False)
        self._lifespan = Lifespan(app, backend)

    async def startup(self, context: Context) -> None:
        """Run the startup of its lifespan in ``context``. Raises `BackendError`: it failed."""
        await self._lifespan.startup(context)

    async def shutdown(self, timeout_s: float) -> None:
        """Run the shutdown of its lifespan. Never raises."""
        await self._lifespan.shutdown(timeout_s)

    def start(self, executor: Executor, method: Method, claims: Sequence[Claim], done: OnReply) -> ApplicationCall:
        """Start a request, as `LoopCall` does for other code."""
        (claim,) = claims
        return ApplicationCall(executor, self, claim, done)

    def scope_of(self, entry: Entry, on_progress: Callable[[bytes], None] | None) -> Scope:
        return http_scope(entry, self._lifespan.state, on_progress)

    def method(self, name: str) -> Method:
        """Return the application for ``__call__``. Raises `NotCallable` for any other name."""
        if name != CALL:
            raise NotCallable(f"{self} has no method {name!r}: call it with a method and a path of HTTP", 404)
        return self.call

    def hook(self, name: str) -> Any:
        """Return None: Penstock calls no method of an application."""
        return None

    def __repr__(self) -> str:
        return f"the ASGI application {getattr(self.app, '__qualname__', None) or type(self.app).__qualname__}"
