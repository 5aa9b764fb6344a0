"""Headers of an HTTP request, as the entry on the stream carries them."""

from __future__ import annotations

from starlette.types import Scope

from ..handles.errors import ConfigError, PenstockError
from . import responses

_HOP_BY_HOP = frozenset(name.encode() for name in responses.HOP_BY_HOP)
_USUAL_CONNECTION = (None, b"keep-alive", b"close")


class WebSocketRefused(PenstockError):
    """The client asked for a WebSocket."""

    status = 501

    def __str__(self) -> str:
        return (
            "WebSockets are not served here: each request travels through a queue as a whole; "
            "a streamed response, such as server-sent events, brings many messages to the client"
        )


def carried_headers(scope: Scope, headers: dict[bytes, bytes]) -> list[tuple[str, str]]:
    """Return the headers that the entry carries: all but those of the connection (RFC 9110, section 7.6.1).

    Raises:
        WebSocketRefused: the request is the handshake of a WebSocket (RFC 6455, section 4.1).
    """
    dropped: frozenset[bytes] = _HOP_BY_HOP
    pairs: list[tuple[bytes, bytes]] = scope["headers"]
    if headers.get(b"connection") not in _USUAL_CONNECTION or len(headers) != len(pairs):  # it may be repeated
        listed: set[bytes] = set()
        for name, value in pairs:
            if name == b"connection":
                listed |= {token.strip().lower() for token in value.split(b",")}
        if b"upgrade" in listed and _is_websocket_handshake(scope, headers):
            raise WebSocketRefused
        dropped |= listed
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in pairs if name not in dropped]


def _is_websocket_handshake(scope: Scope, headers: dict[bytes, bytes]) -> bool:
    asks = headers.get(b"upgrade", b"").lower() == b"websocket" and b"sec-websocket-key" in headers
    return asks and scope["method"] == "GET" and scope.get("http_version") == "1.1"


def public_method(name: bytes) -> str:
    """Return the name of the method to call.

    Raises:
        ConfigError: it is not the name of a public method.
    """
    method = header_text(name)
    if method == "__call__" or (method.isidentifier() and not method.startswith("_")):
        return method
    raise ConfigError(f"x-serve-call-method {method!r} is not the name of a public method")


def header_text(raw: bytes) -> str:
    """Decode a header value as UTF-8, as Python clients send it, or else as Latin-1, which HTTP/1.1 once prescribed."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")
