"""The HTTP server: uvicorn in the running loop, on sockets that several proxies of a node can share."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import math
import socket
import time
from collections.abc import Callable, Generator
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp, Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from ..broker.errors import ConfigError, PenstockError

logger = logging.getLogger("penstock.proxy")

MAX_HEAD_BYTES = 64 * 1024
"""Longer request lines and headers are refused with 431. What arrives in one read is only looked at beyond this."""

HEAD_TIMEOUT_S = 15.0
"""A client that has begun a request must have sent its headers by then."""

STALL_TIMEOUT_S = 60.0
"""A client that takes nothing of its answer for so long is cut off."""

_HEAD_TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
# After nginx's lingering_timeout and lingering_time.
_LINGER_IDLE_S = 5.0
_LINGER_S = 30.0
_JOINED_BYTES = 64 * 1024
"""Copying a longer body behind its head costs more than a system call."""
_KEEP_ALIVE_S = 65  # above the 60 s of common load balancers, so that they end idle connections and not we
_SWEEP_S = 1.0
_FLUSH_S = 0.5
_BACKLOG = 2048


class PortInUse(ConfigError):
    """Another process listens where we were to."""


class Server:
    """Serves one ASGI application.

    Args:
        app: the application.
        host: a name or an address; a name may have several, and all of them are listened on.
        port: 0 picks a free one, which `port` has after `start`.
        shared: other proxies of this instance listen on the same port and share its connections. If not, a port that
            anybody listens on is refused; otherwise SO_REUSEPORT would let us take half of a stranger's connections.
    """

    def __init__(self, app: ASGIApp, host: str, port: int, *, shared: bool = False) -> None:
        self.host, self.port = host, port
        self._shared = shared
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                lifespan="off",
                loop="none",
                interface="asgi3",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                backlog=_BACKLOG,
            )
        )
        self._serving: asyncio.Task[None] | None = None
        self._sweeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen, and return once connections are taken.

        Raises:
            PortInUse: somebody listens there, and ``shared`` was not set or is not what they do.
            ConfigError: the port may not be used, or the host is not an address of this machine.
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
        """Return if it serves. Raises why it does not."""
        if self._serving is None or self._serving.done():
            if self._serving is not None:
                await self._serving
            raise PenstockError(f"the HTTP server on {self.host}:{self.port} has ended")

    async def stop(self, timeout_s: float) -> None:
        """Take no more connections, finish what is in flight, and end: after ``timeout_s`` seconds in any case.

        Clients with idle connections have a moment to use them once more, and are told then to connect anew, if the
        application says so in its answers: to close at once would cut off a request that is on its way to us.
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
        # Those that were told that there is no time left may still have to hear it.
        await self._connections_end(_FLUSH_S)
        for connection in list(self._uvicorn.server_state.connections):
            connection.transport.abort()

    async def _connections_end(self, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while self._uvicorn.server_state.connections and time.monotonic() < until:  # noqa: ASYNC110 - uvicorn has no event
            await asyncio.sleep(0.02)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = time.monotonic()
            for connection in list(self._uvicorn.server_state.connections):
                if isinstance(connection, Protocol):
                    connection.cut_off_if_stalled(now)


def bind(host: str, port: int, *, shared: bool) -> list[socket.socket]:
    """Return sockets for every address of ``host``, bound to the same port and not listening yet.

    Raises:
        ConfigError: see `Server.start`.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as e:
        raise ConfigError(f"the HTTP host {host!r} cannot be resolved: {e.strerror or e}") from None
    bound: list[socket.socket] = []
    with contextlib.ExitStack() as undo:
        for family, _, _, _, address in dict.fromkeys(found):
            # Port 0 is picked by the first address; the others take the same.
            at = (address[0], bound[0].getsockname()[1] if bound else port, *address[2:])
            try:
                if not shared and at[1] != 0:
                    _probe(family, at)
                sock = undo.enter_context(_bind(family, at, share=True))
            except OSError as e:
                if e.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and len(found) > 1:
                    continue  # "localhost" on a machine without IPv6
                raise _why_not(host, port, e) from None
            bound.append(sock)
        if not bound:
            raise ConfigError(f"the HTTP host {host!r} is no address of this machine")
        undo.pop_all()
    return bound


def _probe(family: int, address: tuple[Any, ...]) -> None:
    """Raise OSError if anybody listens on ``address``, whether they would share it or not."""
    _bind(family, address, share=False).close()


def _bind(family: int, address: tuple[Any, ...], *, share: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # So that connections of an earlier server that linger do not stand in the way.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setblocking(False)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _why_not(host: str, port: int, error: OSError) -> ConfigError:
    where = f"cannot serve HTTP on {host}:{port}"
    if error.errno == errno.EADDRINUSE:
        return PortInUse(
            f"{where}: the port is in use by another process; "
            "name another one in http_options, or 0 for any that is free"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(f"{where}: {host!r} is no address of this machine")
    return ConfigError(f"{where}: {error.strerror or error}")


def is_wildcard(host: str) -> bool:
    """Say whether ``host`` stands for all addresses of a machine, so that it is none to call it by."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return not host


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield  # signals are for whoever hosts us

    async def stop_listening(self) -> None:
        """Take no more connections but those that the kernel has taken for us; it would reset them."""
        loop = asyncio.get_running_loop()
        left: list[socket.socket] = []
        for server in self.servers:
            listeners = [listener.dup() for listener in server.sockets]
            server.close()
            for listener in listeners:
                with listener, contextlib.suppress(OSError):
                    listener.setblocking(False)
                    while True:
                        left.append(listener.accept()[0])
        for connection in left:
            connection.setblocking(False)
            await loop.connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> Protocol:
        return Protocol(self.config, self.server_state, {}, asyncio.get_running_loop())


class Protocol(HttpToolsProtocol):
    """uvicorn's, with an end to what it would wait for for ever: long heads, slow heads, answers that nobody reads.

    And with a lingering close: to close a connection on which the client still sends resets it, and may so take the
    answer away before the client has read it. We only end our direction then, and drop what still comes for a while.
    """

    _head_bytes = 0
    _head_since = 0.0
    _unsent = 0
    _unsent_since = 0.0
    _lingering_since = 0.0
    _heard_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._tcp = cast(asyncio.Transport, transport)
        self._corked = _Transport(self._tcp, self.close)
        super().connection_made(cast(asyncio.Transport, self._corked))
        self._head_since = time.monotonic()  # a client that connects has as long for its first request

    def data_received(self, data: bytes) -> None:
        if self._lingering_since:
            self._heard_at = time.monotonic()
            return
        if (
            len(data) > MAX_HEAD_BYTES
            and self._head_bytes == 0
            and not self._in_body()
            and data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES) < 0
        ):
            self._refuse_head()
            return
        super().data_received(data)
        if self._in_head():
            if self._head_bytes == 0:
                self._head_since = time.monotonic()
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse_head()
        else:
            self._head_bytes = 0

    def shutdown(self) -> None:
        if self._lingering_since:
            self._tcp.close()
        elif not self._has_begun_head():  # a request that is on its way is still served
            super().shutdown()

    def close(self) -> None:
        """Close the connection once what was written is sent; with a client in the middle of a message, linger."""
        if self._tcp.is_closing() or self._lingering_since:
            return
        self._corked.flush()
        if self._has_begun_head() or self._in_body():
            self._linger()
        else:
            self._tcp.close()

    def _linger(self) -> None:
        self._lingering_since = self._heard_at = time.monotonic()
        self._corked.flush()
        self._tcp.write_eof()
        self.flow.resume_reading()

    def cut_off_if_stalled(self, now: float) -> None:
        if self._lingering_since:
            if now - self._heard_at > _LINGER_IDLE_S or now - self._lingering_since > _LINGER_S:
                self._tcp.abort()
            return
        if self._in_head() and now - self._head_since > HEAD_TIMEOUT_S:
            self._tcp.abort()
            return
        unsent = self._tcp.get_write_buffer_size()
        if unsent == 0 or unsent != self._unsent:
            self._unsent, self._unsent_since = unsent, now
        elif now - self._unsent_since > STALL_TIMEOUT_S:
            self._tcp.abort()

    def _current(self) -> RequestResponseCycle | None:
        return self.cycle  # None until the first request, whatever its annotation says

    def _in_head(self) -> bool:
        # A message gets its scope with its first byte, and its cycle with the last one of its head.
        cycle = self._current()
        return cycle is None or cycle.scope is not self.scope

    def _has_begun_head(self) -> bool:
        return cast("Scope | None", self.scope) is not None and self._in_head()

    def _in_body(self) -> bool:
        return not self._in_head() and self.cycle.more_body

    def _refuse_head(self) -> None:
        logger.warning("refused a request whose head has more than %d bytes", MAX_HEAD_BYTES)
        cycle = self._current()
        if cycle is None or cycle.response_complete:
            self._corked.flush()
            self._tcp.write(_HEAD_TOO_LONG)
        self._linger()


class _Transport:
    """A transport that holds back the head of an answer until its body comes, and whose ``close`` is the protocol's.

    uvicorn writes head and body apart, and the second system call cost a tenth of the proxy's time. A head whose body
    does not come in the same turn of the loop is sent at its end.
    """

    def __init__(self, tcp: asyncio.Transport, close: Callable[[], None]) -> None:
        self._tcp, self._protocol_close = tcp, close
        self._head = b""
        self._loop = asyncio.get_running_loop()
        self.abort = tcp.abort
        self.pause_reading, self.resume_reading = tcp.pause_reading, tcp.resume_reading
        self.get_extra_info, self.set_protocol = tcp.get_extra_info, tcp.set_protocol
        self._closing = False

    def write(self, data: bytes) -> None:
        if self._head:
            if len(data) <= _JOINED_BYTES:
                data = self._head + data
            else:
                self._tcp.write(self._head)
            self._head = b""
            self._tcp.write(data)
        elif data.startswith(b"HTTP/1.1 "):
            self._head = data
            self._loop.call_soon(self.flush)
        else:
            self._tcp.write(data)

    def flush(self) -> None:
        if self._head:
            head, self._head = self._head, b""
            self._tcp.write(head)

    def close(self) -> None:
        self._closing = True
        self._protocol_close()

    def is_closing(self) -> bool:
        return self._closing or self._tcp.is_closing()
