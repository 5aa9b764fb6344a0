"""Headers of an HTTP request, as the entry on the stream carries them."""

from __future__ import annotations

from starlette.types import Scope

from ..handles.errors import ConfigError
from . import responses

_HOP_BY_HOP = frozenset(name.encode() for name in responses.HOP_BY_HOP)
_USUAL_CONNECTION = (None, b"keep-alive", b"close")


def carried_headers(scope: Scope, headers: dict[bytes, bytes]) -> list[tuple[str, str]]:
    """Return the headers that the entry carries: all but those of the connection (RFC 9110, section 7.6.1)."""
    dropped = _HOP_BY_HOP
    pairs: list[tuple[bytes, bytes]] = scope["headers"]
    if headers.get(b"connection") not in _USUAL_CONNECTION or len(headers) != len(pairs):  # it may be repeated
        for name, value in pairs:
            if name == b"connection":
                dropped |= {token.strip().lower() for token in value.split(b",")}
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in pairs if name not in dropped]


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
