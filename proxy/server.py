"""The HTTP server: uvicorn in the running event loop, on ports that several proxies of a node can share."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import time
from collections.abc import Callable, Generator
from functools import partial
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from ..broker.errors import ConfigError, PenstockError
from .http1.connection_limit import MAX_CONNECTIONS, ConnectionLimit
from .http1.fast_path import protocol_for
from .http1.listening import bind
from .http1.protocol import Protocol

_SWEEP_S = 1.0
"""Seconds between two checks of the connections' time limits."""

_FLUSH_S = 0.5
"""How long `Server.stop` waits for clients to read the 503 that ends their unfinished requests."""

_BACKLOG = 2048
"""Length of the kernel's accept queue."""


class Server:
    """Serves one ASGI application over HTTP/1.1.

    Args:
        app: the application.
        host: a name or an address. The server listens on all addresses of a name.
        port: the port; 0 picks a free one, which the attribute `port` holds after `start`.
        shared: share the port, and its connections, with other proxies of the instance. Without it a port on which
            any process listens is refused; SO_REUSEPORT would take half of the connections of a foreign process.
        max_connections: limit of open connections. Further ones are refused with 503 and closed.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        *,
        shared: bool = False,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self.host, self.port = host, port
        self._shared = shared
        protocol = partial(protocol_for(app), limit=ConnectionLimit(max_connections))
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                app,
                http=cast("type[asyncio.Protocol]", protocol),
                ws="none",
                lifespan="off",
                loop="none",
                interface="asgi3",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=_BACKLOG,
            )
        )
        self._serving: asyncio.Task[None] | None = None
        self._sweeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen, and return once connections are accepted.

        Raises:
            PortInUse: another process listens on the port, and one of the two does not share it.
            ConfigError: this process may not use the port, or the host is not an address of this machine.
        """
        sockets = bind(self.host, self.port, shared=self._shared)
        self.port = sockets[0].getsockname()[1]
        loop = asyncio.get_running_loop()
        self._serving = loop.create_task(self._uvicorn.serve(sockets), name="http server")
        self._sweeping = loop.create_task(self._sweep(), name="http sweeper")
        while not self._uvicorn.started:
            if self._serving.done():
                await self._serving
                raise ConfigError(f"the HTTP server on {self.host}:{self.port} ended as it started")
            await asyncio.sleep(0.001)

    async def check(self) -> None:
        """Return if the server is running.

        Raises:
            PenstockError: the server has ended. If it ended with an exception, that one is raised.
        """
        if self._serving is None or self._serving.done():
            if self._serving is not None:
                await self._serving
            raise PenstockError(f"the HTTP server on {self.host}:{self.port} has ended")

    async def stop(self, timeout_s: float) -> None:
        """Accept no more connections, finish the requests in progress, and end after at most ``timeout_s`` seconds.

        Idle connections stay open for up to a second, because closing them at once would cut off a request that is on
        its way. The application should add ``connection: close`` to its responses meanwhile, as `App.draining` does.
        """
        if self._serving is None:
            return
        deadline = time.monotonic() + timeout_s
        await self._uvicorn.stop_listening()
        await self._connections_end(min(1.0, timeout_s / 4))
        self._uvicorn.config.timeout_graceful_shutdown = max(0, math.ceil(deadline - time.monotonic()))
        self._uvicorn.should_exit = True
        await self._serving
        self._serving = None
        if self._sweeping is not None:
            self._sweeping.cancel()
        for connection in self.connections:
            connection.give_up()
        # The responses to requests that were given up have still to be sent.
        await self._connections_end(_FLUSH_S)
        for connection in self.connections:
            connection.transport.abort()

    async def _connections_end(self, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while self._uvicorn.server_state.connections and time.monotonic() < until:  # noqa: ASYNC110 - uvicorn has no event
            await asyncio.sleep(0.02)

    def unsent_bytes(self) -> int:
        """Return how many bytes of replies the kernel has not taken yet, over all connections."""
        return sum(connection.unsent_bytes for connection in self.connections)

    @property
    def connections(self) -> list[Protocol]:
        """The open connections of this server."""
        return [one for one in self._uvicorn.server_state.connections if isinstance(one, Protocol)]

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = time.monotonic()
            for connection in self.connections:
                connection.end_if_overdue(now)


class _Uvicorn(uvicorn.Server):
    """uvicorn's server, without signal handlers and with a stop that loses no accepted connection."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield  # the process around the proxy handles signals

    async def stop_listening(self) -> None:
        """Stop listening, but serve the connections in the accept queue, which the kernel would reset."""
        loop = asyncio.get_running_loop()
        accepted: list[socket.socket] = []
        for server in self.servers:
            listeners = [listener.dup() for listener in server.sockets]
            server.close()
            for listener in listeners:
                with listener, contextlib.suppress(OSError):
                    listener.setblocking(False)
                    while True:
                        accepted.append(listener.accept()[0])
        for connection in accepted:
            connection.setblocking(False)
            await loop.connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> asyncio.Protocol:
        protocol_class = cast("Callable[..., Protocol]", self.config.http_protocol_class)
        return protocol_class(self.config, self.server_state, {}, asyncio.get_running_loop())
