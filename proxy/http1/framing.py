"""Framing rules of HTTP/1.1 requests: the contents of a head, and the end of a message.

Everything here is pure. A request that an intermediary could read differently is refused, never repaired.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import httptools

RawHeaders = list[tuple[bytes, bytes]]

MAX_HEAD_BYTES = 64 * 1024
"""Limit of the bytes of request line, header fields and trailer fields. More are refused with 431."""

MAX_HEADER_FIELDS = 128
"""Limit of the number of header and trailer fields. More are refused with 431."""

BLANK_LINE = b"\r\n\r\n"
"""The end of a head, and of a chunked body."""

CHUNKED = -1
"""Stands for the length of a body that ends with its last chunk."""

_FRAMING_FIELDS = (b"content-length", b"transfer-encoding")
_MAX_PORT = 65535
_KNOWN_HOSTS = 1024

# RFC 9110, section 7.2, and RFC 3986, section 3.2.2: a registered name or an address, then perhaps a port.
_HOST = re.compile(
    rb"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?:[A-Za-z0-9\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})+)(?::(?P<port>[0-9]*))?"
)


class Refusal(NamedTuple):
    """The reason to refuse a request, as an HTTP status and a message."""

    status: int
    message: str


class Refused(Exception):
    """Raised in a callback of the parser, to stop it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.refusal = Refusal(status, message)


TOO_MANY_FIELDS = Refusal(431, f"a request has more than {MAX_HEADER_FIELDS} header fields, trailers included")
TOO_LONG_A_HEAD = Refusal(431, f"the head of a request has more than {MAX_HEAD_BYTES} bytes, trailers included")

valid_hosts: set[bytes] = set()
"""Cache of valid values of ``Host``, so that a usual request costs one look-up. Has at most 1,024 values."""


def refusal(headers: Sequence[tuple[bytes, bytes]], version: str) -> Refusal | None:
    """Return why a request with ``headers`` is refused, or None (RFC 9112, sections 3.2 and 6.1)."""
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        return Refusal(400, f"a request must have one host header, not {len(hosts)}")
    if hosts and not is_valid_host(hosts[0]):
        return Refusal(400, "the host header must be a name or an address, optionally followed by a colon and a port")
    codings = b", ".join(value for name, value in headers if name == b"transfer-encoding").decode("latin-1")
    if codings and codings.lower() != "chunked":
        return Refusal(501, f"the transfer coding must be 'chunked', not {codings!r}")
    return None


def is_valid_host(host: bytes) -> bool:
    """Return whether ``host`` is a valid value of ``Host``: not empty, and without user information."""
    if host in valid_hosts:
        return True
    found = _HOST.fullmatch(host.strip(b" \t"))
    if found is None or int(found["port"] or b"0") > _MAX_PORT:
        return False
    if found["address"] is not None:
        try:
            ipaddress.IPv6Address(found["address"].decode())
        except ValueError:
            return False
    if len(valid_hosts) < _KNOWN_HOSTS:
        valid_hosts.add(host)
    return True


def parsed_target(target: bytes, headers: RawHeaders, version: str) -> Any:
    """Return the parsed target of a request, with ``path`` and ``query``, in origin-form.

    The authority of an absolute-form target replaces the value of ``Host`` in ``headers`` (RFC 9112, section 3.2.2).

    Raises:
        Refused: the target has neither form, or it has a fragment.
    """
    try:
        if not target.startswith(b"/"):
            if (refused := refusal(headers, version)) is not None:
                raise Refused(*refused)
            target = _origin_form(target, headers)
        if b"#" not in target:
            return httptools.parse_url(target)
    except httptools.HttpParserInvalidURLError:
        pass
    raise Refused(400, "the target of a request must be a path with an optional query, or an http URL with these")


def _origin_form(target: bytes, headers: RawHeaders) -> bytes:
    scheme, separator, rest = target.partition(b"://")
    end = next((at for at, byte in enumerate(rest) if byte in b"/?"), len(rest))
    authority, path = rest[:end], rest[end:]
    if not separator or scheme.lower() not in (b"http", b"https") or not is_valid_host(authority):
        raise Refused(400, "the target of a request must be a path with an optional query, or an http URL with these")
    headers[:] = [(name, authority if name == b"host" else value) for name, value in headers]
    return path if path.startswith(b"/") else b"/" + path


def has_framing(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Return whether a request with ``headers`` declares a body, which may be empty."""
    return any(name in _FRAMING_FIELDS for name, _ in headers)


def framing_fields(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Return the fields of ``headers`` that frame the body, as lines of a head."""
    return b"".join(b"%b: %b\r\n" % pair for pair in headers if pair[0] in _FRAMING_FIELDS)


def body_length(headers: Sequence[tuple[bytes, bytes]]) -> int:
    """Return the length of the body of a request whose head the parser accepted, or `CHUNKED`."""
    for name, value in headers:
        if name == b"content-length":
            return int(value)
    return CHUNKED


def declares_length(data: bytes, end: int, length: int) -> bool:
    """Return whether the head ``data[:end]`` declares, in a usual spelling, that its body has ``length`` bytes.

    False means nothing: the field may have another spelling.
    """
    at = data.find(b"\r\nContent-Length: ", 0, end)
    if at < 0:
        at = data.find(b"\r\ncontent-length: ", 0, end)
        if at < 0:
            return False
    at += len(b"\r\nContent-Length: ")
    return data[at : data.find(b"\r", at)] == b"%d" % length


class BlankLines:
    """Finds blank lines in bytes that arrive in pieces."""

    def __init__(self) -> None:
        self._tail = b""

    def end_of_next(self, data: bytes, start: int) -> int:
        """Return the end of the next blank line in ``data`` from ``start`` on, or the length of ``data``."""
        if self._tail:
            across = (self._tail + data[start : start + 3]).find(BLANK_LINE)
            if across >= 0:
                return start + across + len(BLANK_LINE) - len(self._tail)
        at = data.find(BLANK_LINE, start)
        return len(data) if at < 0 else at + len(BLANK_LINE)

    def passed(self, data: bytes, start: int, end: int) -> None:
        """Record that ``data[start:end]`` was parsed."""
        tail = (self._tail + data[max(start, end - 3) : end])[-3:]
        self._tail = b"" if data.endswith(BLANK_LINE, start, end) else tail


class DiscardedTrailers:
    """Replaces the headers of a request once its chunked body has begun: counts trailer fields and drops them.

    A trailer field may be merged into the headers only if its definition permits it (RFC 9110, section 6.5.1). Headers
    select the client's identity, the method and the framing, so none is merged.
    """

    def __init__(self, head_bytes: int, head_fields: int) -> None:
        self._bytes, self._fields, self._head_fields = head_bytes, head_fields, head_fields

    def __bool__(self) -> bool:
        """Return whether there were trailer fields."""
        return self._fields > self._head_fields

    def append(self, field: tuple[bytes, bytes]) -> None:
        """Count a field.

        Raises:
            Refused: there are too many, or they are too long.
        """
        self._fields += 1
        self._bytes += len(field[0]) + len(field[1]) + len(b": \r\n")
        if (refusal := self.refusal()) is not None:
            raise Refused(*refusal)

    def refusal(self, unread: int = 0) -> Refusal | None:
        """Return the reason to refuse the request, or None. ``unread`` counts bytes of an incomplete field."""
        if self._fields > MAX_HEADER_FIELDS:
            return TOO_MANY_FIELDS
        return TOO_LONG_A_HEAD if self._bytes + unread > MAX_HEAD_BYTES else None
