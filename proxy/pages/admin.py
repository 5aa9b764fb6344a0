"""The admin port: an HTTP server for the pages that operators and scrapers read, apart from the port of requests.

The proxies of a node compete for the port. One of them has it, and another one takes over when that ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from starlette.types import Receive, Scope, Send

from .. import responses
from ..http1.listening import PortInUse
from ..responses import HTTPResponse
from ..routing import RESERVED
from ..server import Server
from .dashboard import Dashboard

log = logging.getLogger(__name__)

_DASHBOARD = f"{RESERVED}dashboard"
_EVENTS = f"{_DASHBOARD}/events"
_DEAD_LETTERS = f"{_DASHBOARD}/dead-letters"

_STOP_S = 0.5
"""How long the port's responses in progress may take to end."""

_TRY_S = 1.0
"""Seconds between two attempts to listen on the port."""


class AdminApp:
    """The ASGI application of the admin port of one proxy.

    ``page`` returns the response to a request for any page but the dashboard.
    """

    def __init__(self, page: Callable[[Scope], Awaitable[HTTPResponse]], dashboard: Dashboard) -> None:
        self._page, self._dashboard = page, dashboard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        method, path = scope["method"], scope["path"]
        if path == _DEAD_LETTERS or path.startswith(f"{_DEAD_LETTERS}/"):
            response = await self._dashboard.dead_letters.respond(scope, path[len(_DEAD_LETTERS) + 1 :])
        elif path not in (_DASHBOARD, _EVENTS):
            response = await self._page(scope)
        elif method not in ("GET", "HEAD"):
            response = responses.not_allowed(method, path, ("GET", "HEAD"))
        elif path == _DASHBOARD:
            response = self._dashboard.page()
        elif self._dashboard.is_full:
            response = responses.of_status(503, "too many dashboards are open")
        else:
            await self._dashboard.send_events(receive, send)
            return
        await send_response(send, response, method)


async def send_response(send: Send, response: HTTPResponse, method: str) -> None:
    """Send a whole response."""
    status, headers, body, *_ = response
    headers = [*headers, (b"content-length", b"%d" % len(body)), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if method == "HEAD" else body})


class AdminPort:
    """Serves `AdminApp` on ``host`` and ``port`` while no other proxy of the node does.

    Args:
        app: the application.
        host: the address to listen on.
        port: the port; 0 picks a free one.
        on_listening: called with the URL when the proxy has the port.
    """

    def __init__(self, app: AdminApp, host: str, port: int, on_listening: Callable[[str], None]) -> None:
        self._server = Server(app, host, port)
        self._on_listening = on_listening
        self._trying: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen if no other process does; otherwise try again now and then until `stop`."""
        if not await self._listen():
            self._trying = asyncio.get_running_loop().create_task(self._keep_trying(), name="admin port")

    async def stop(self) -> None:
        """Stop listening."""
        if self._trying is not None:
            self._trying.cancel()
            await asyncio.wait([self._trying])
        await self._server.stop(_STOP_S)

    async def _keep_trying(self) -> None:
        while True:
            await asyncio.sleep(_TRY_S)
            if await self._listen():
                return

    async def _listen(self) -> bool:
        try:
            await self._server.start()
        except PortInUse as e:
            log.debug("the admin port is served by another process: %s", e)
            return False
        host = f"[{self._server.host}]" if ":" in self._server.host else self._server.host
        self._on_listening(f"http://{host}:{self._server.port}")
        return True
