"""Raw ASGI applications to test with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from penstock.workers.asgi.application import AsgiApplication
from tests.workers.serving import by_reference

App = Callable[[Any, Any, Any], Awaitable[None]]


def deployed(app: App) -> Any:
    """Return the application as the runner gets it. It is not copied."""
    return by_reference(AsgiApplication(app))


def http_only(app: App) -> App:
    """Return an application without a lifespan, as frameworks without one behave."""

    async def run(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await app(scope, receive, send)

    return run


def sending(*messages: dict[str, Any]) -> App:
    """Return an application that sends ``messages``."""

    @http_only
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    return app


def head(status: Any = 200, *headers: Any) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body(chunk: Any = b"", *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": chunk, "more_body": more}
