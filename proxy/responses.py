"""HTTP responses: a reply or an error as status, headers and body."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import quote

import orjson
from starlette.exceptions import HTTPException

from ..broker.wire._fields import Pairs
from ..broker.wire.replies import Reply
from ..handles.errors import BackendError, BrokerRefused, BrokerUnavailable, PenstockError, from_wire

RawHeaders = list[tuple[bytes, bytes]]


class HTTPResponse(NamedTuple):
    """An HTTP response before it is sent."""

    status: int
    headers: RawHeaders
    """Without ``content-length``, which whoever sends it adds."""
    body: bytes = b""
    head_length: int | None = None
    """What ``content-length`` a backend gave that left the body out, as it may for HEAD."""
    close: bool = False
    """The connection cannot be used again."""


_JSON: RawHeaders = [(b"content-type", b"application/json")]
_TEXT: RawHeaders = [(b"content-type", b"text/plain; charset=utf-8")]
_BYTES: RawHeaders = [(b"content-type", b"application/octet-stream")]
_BY_CODEC: dict[str, RawHeaders] = {"json": _JSON, "text": _TEXT, "bytes": _BYTES, "none": []}

# RFC 9110, section 7.6.1: they speak of one connection, and the backend's is not the client's.
HOP_BY_HOP = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)
# The server writes a date of its own and the proxy the id of the request: each may be there once.
_OURS = frozenset(("date", "x-request-id", "content-length"))

_OF_THE_BODY = frozenset(
    (b"content-type", b"content-encoding", b"content-language", b"content-location", b"content-range")
)
"""Of a body that somebody else would have written."""

_HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")


def of_reply(reply: Reply, *, debug: bool) -> HTTPResponse:
    """Return what the reply of a backend is over HTTP."""
    if reply.error is not None:
        answer = of_error(from_wire(reply.error), debug=debug)
        return _with_headers(answer, reply.headers, debug=debug) if reply.headers else answer
    if (headers := _BY_CODEC.get(reply.codec)) is not None:
        return HTTPResponse(reply.status, headers, reply.body)
    if reply.codec == "response":
        try:
            headers = response_headers(reply.headers)
        except ValueError as e:
            return of_error(BackendError("ValueError", str(e)), debug=debug)
        if reply.status < 200:
            said = f"the backend's response has status {reply.status}; a final one is 200 to 599"
            return of_error(BackendError("ValueError", said), debug=debug)
        return HTTPResponse(reply.status, headers, reply.body, None if reply.body else _declared_length(reply.headers))
    return of_error(
        BackendError(
            "TypeError",
            f"the backend answered with a value written as {reply.codec!r}, which only a Python handle can read; "
            "HTTP takes None, str, bytes, JSON values and Starlette responses",
        ),
        debug=debug,
    )


def of_error(error: PenstockError, *, debug: bool) -> HTTPResponse:
    """Return ``error`` as JSON, ``{"error": {"type", "message"}}``, with its status."""
    status = error.status if 400 <= error.status <= 599 else 500
    told: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, BackendError):
        told = {"type": error.type_name, "message": error.message}
        if debug:
            told["traceback"] = error.traceback
    elif isinstance(error, BrokerUnavailable) and not debug:
        told["message"] = "the broker is unavailable"  # its address is none of a client's business
    elif isinstance(error, BrokerRefused) and not debug:
        told["message"] = "the broker refused the request"  # nor are its users and its keys
    headers = _JSON
    if (retry_after_s := getattr(error, "retry_after_s", None)) is not None:
        headers = [*_JSON, (b"retry-after", b"%d" % max(1, math.ceil(retry_after_s)))]
    return HTTPResponse(status, headers, orjson.dumps({"error": told}))


def of_http_exception(error: HTTPException) -> HTTPResponse:
    """Return what a middleware's Starlette exception is over HTTP, with its headers."""
    answer = of_status(error.status_code, error.detail)
    if error.status_code in (204, 304):  # RFC 9110, section 6.4.1: these have no content
        answer = HTTPResponse(error.status_code, [])
    pairs = [(str(name), str(value)) for name, value in (error.headers or {}).items()]
    return _with_headers(answer, pairs, debug=False) if pairs else answer


def _with_headers(answer: HTTPResponse, pairs: Pairs, *, debug: bool) -> HTTPResponse:
    """Return ``answer``, whose body is ours, with the headers that came with the error, such as www-authenticate."""
    try:
        extra = [pair for pair in response_headers(pairs) if pair[0] not in _OF_THE_BODY]
    except ValueError as e:
        return of_error(BackendError("ValueError", str(e)), debug=debug)
    given = {name for name, _ in extra}
    return answer._replace(headers=[pair for pair in answer.headers if pair[0] not in given] + extra)


def of_status(status: int, message: str, extra: Iterable[tuple[bytes, bytes]] = ()) -> HTTPResponse:
    """Return an error that is HTTP's own, as JSON of the same form."""
    try:
        kind = HTTPStatus(status).phrase.replace(" ", "")
    except ValueError:
        kind = "Error"  # a status that HTTP has not heard of
    return HTTPResponse(status, [*_JSON, *extra], orjson.dumps({"error": {"type": kind, "message": message}}))


def of_json(value: Any) -> HTTPResponse:
    return HTTPResponse(200, _JSON, orjson.dumps(value))


def of_text(text: str, status: int = 200, content_type: str = "text/plain; charset=utf-8") -> HTTPResponse:
    return HTTPResponse(status, [(b"content-type", content_type.encode())], text.encode())


def redirect(path: str, query: bytes) -> HTTPResponse:
    """Send the client to ``path``, with its method and its body."""
    location = quote(path).encode() + (b"?" + query if query else b"")
    return HTTPResponse(307, [(b"location", location)])


def response_headers(pairs: Pairs) -> RawHeaders:
    """Return the headers of a backend's own response as they may be passed on.

    Raises:
        ValueError: one could not be sent, or would end early and begin something else (a line feed in it).
    """
    dropped = HOP_BY_HOP | _OURS
    for name, value in pairs:
        if name.lower() == "connection":
            dropped |= {token.strip().lower() for token in value.split(",")}
    headers: RawHeaders = []
    for name, value in pairs:
        if _HEADER_NAME.fullmatch(name) is None or _HEADER_VALUE.fullmatch(value) is None:
            raise ValueError(f"the backend's response has the header {name!r}: {value!r}, which HTTP cannot carry")
        if (lower := name.lower()) not in dropped:
            headers.append((lower.encode("latin-1"), value.encode("latin-1")))
    return headers


def _declared_length(pairs: Pairs) -> int | None:
    for name, value in pairs:
        if name.lower() == "content-length" and value.isdecimal() and len(value) < 19:
            return int(value)
    return None
