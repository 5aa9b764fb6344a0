"""Sockets on which an HTTP server listens, and the errors where it cannot. Needs no uvicorn."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
from typing import Any

from ...broker.errors import ConfigError


class PortInUse(ConfigError):
    """Another process listens on this port."""


def bind(host: str, port: int, *, shared: bool) -> list[socket.socket]:
    """Return sockets for every address of ``host``, bound to the same port and not listening yet.

    Raises:
        PortInUse: another process listens on the port, and one of the two does not share it.
        ConfigError: this process may not use the port, or the host is not an address of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as e:
        raise ConfigError(f"the HTTP host {host!r} cannot be resolved: {e.strerror or e}") from None
    bound: list[socket.socket] = []
    with contextlib.ExitStack() as undo:
        for family, _, _, _, address in dict.fromkeys(found):
            # For port 0 the first address gets a free port, and the others use the same.
            at = (address[0], bound[0].getsockname()[1] if bound else port, *address[2:])
            try:
                if not shared and at[1] != 0:
                    _probe(family, at)
                sock = undo.enter_context(_bind(family, at, share=True))
            except OSError as e:
                if e.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and len(found) > 1:
                    continue  # "localhost" on a machine without IPv6
                raise _bind_error(host, port, e) from None
            bound.append(sock)
        if not bound:
            raise ConfigError(f"the HTTP host {host!r} is not an address of this machine")
        undo.pop_all()
    return bound


def _probe(family: int, address: tuple[Any, ...]) -> None:
    """Raise OSError if any process listens on ``address``, even if it shares the port."""
    _bind(family, address, share=False).close()


def _bind(family: int, address: tuple[Any, ...], *, share: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Connections of an earlier server in TIME_WAIT must not block the port.
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


def _bind_error(host: str, port: int, error: OSError) -> ConfigError:
    where = f"cannot serve HTTP on {host}:{port}"
    if error.errno == errno.EADDRINUSE:
        return PortInUse(
            f"{where}: the port is in use by another process; "
            "choose another one in http_options, or 0 for any free port"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(f"{where}: {host!r} is not an address of this machine")
    return ConfigError(f"{where}: {error.strerror or error}")


def is_wildcard(host: str) -> bool:
    """Return whether ``host`` means all addresses of a machine, so that a URL cannot contain it."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return not host
