"""HTTP responses: replies and errors as status, headers and body."""

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
    """Without ``content-length``, which is added when the response is sent."""
    body: bytes = b""
    head_length: int | None = None
    """The ``content-length`` of a backend's response without a body: HEAD may omit the body and keep the length."""
    close: bool = False
    """Whether the connection must be closed after the response."""


_JSON: RawHeaders = [(b"content-type", b"application/json")]
_TEXT: RawHeaders = [(b"content-type", b"text/plain; charset=utf-8")]
_BYTES: RawHeaders = [(b"content-type", b"application/octet-stream")]
_BY_CODEC: dict[str, RawHeaders] = {"json": _JSON, "text": _TEXT, "bytes": _BYTES, "none": []}

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
"""Headers of one connection (RFC 9110, section 7.6.1): never forwarded, in either direction."""

_OURS = frozenset(("date", "x-request-id", "content-length"))
"""Headers that the server and the proxy write themselves."""

_CONTENT_HEADERS = frozenset(
    (b"content-type", b"content-encoding", b"content-language", b"content-location", b"content-range")
)
"""Headers that describe the body. An error's body is written here, so those of the backend do not apply to it."""

_HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")


def of_reply(reply: Reply, *, debug: bool) -> HTTPResponse:
    """Return a backend's reply as a response."""
    if reply.error is not None:
        response = of_error(from_wire(reply.error), debug=debug)
        return _with_headers(response, reply.headers, debug=debug) if reply.headers else response
    if (headers := _BY_CODEC.get(reply.codec)) is not None:
        return HTTPResponse(reply.status, headers, reply.body)
    if reply.codec == "response":
        try:
            headers = response_headers(reply.headers)
        except ValueError as e:
            return of_error(BackendError("ValueError", str(e)), debug=debug)
        if reply.status < 200:
            message = f"the backend's response has status {reply.status}; a final status is 200 to 599"
            return of_error(BackendError("ValueError", message), debug=debug)
        return HTTPResponse(reply.status, headers, reply.body, None if reply.body else _declared_length(reply.headers))
    return of_error(
        BackendError(
            "TypeError",
            f"the backend returned a value encoded as {reply.codec!r}, which only a Python handle can read; "
            "HTTP takes None, str, bytes, JSON values and Starlette responses",
        ),
        debug=debug,
    )


def of_error(error: PenstockError, *, debug: bool) -> HTTPResponse:
    """Return ``error`` as JSON, ``{"error": {"type", "message"}}``, with its status."""
    status = error.status if 400 <= error.status <= 599 else 500
    details: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, BackendError):
        details = {"type": error.type_name, "message": error.message}
        if debug:
            details["traceback"] = error.traceback
    elif isinstance(error, BrokerUnavailable) and not debug:
        details["message"] = "the broker is unavailable"  # the message has the broker's address
    elif isinstance(error, BrokerRefused) and not debug:
        details["message"] = "the broker refused the request"  # the message has names of users and keys
    headers = _JSON
    if (retry_after_s := getattr(error, "retry_after_s", None)) is not None:
        headers = [*_JSON, (b"retry-after", b"%d" % max(1, math.ceil(retry_after_s)))]
    return HTTPResponse(status, headers, orjson.dumps({"error": details}))


def of_http_exception(error: HTTPException) -> HTTPResponse:
    """Return a Starlette exception of a middleware as a response, with its headers."""
    response = of_status(error.status_code, error.detail)
    if error.status_code in (204, 304):  # no content (RFC 9110, section 6.4.1)
        response = HTTPResponse(error.status_code, [])
    pairs = [(str(name), str(value)) for name, value in (error.headers or {}).items()]
    return _with_headers(response, pairs, debug=False) if pairs else response


def _with_headers(response: HTTPResponse, pairs: Pairs, *, debug: bool) -> HTTPResponse:
    """Return an error's response with the headers that the backend gave it, such as ``www-authenticate``."""
    try:
        extra = [pair for pair in response_headers(pairs) if pair[0] not in _CONTENT_HEADERS]
    except ValueError as e:
        return of_error(BackendError("ValueError", str(e)), debug=debug)
    given = {name for name, _ in extra}
    return response._replace(headers=[pair for pair in response.headers if pair[0] not in given] + extra)


def of_status(status: int, message: str, extra: Iterable[tuple[bytes, bytes]] = ()) -> HTTPResponse:
    """Return an error of HTTP itself, in the JSON form of `of_error`."""
    try:
        kind = HTTPStatus(status).phrase.replace(" ", "")
    except ValueError:
        kind = "Error"  # not a status that Python knows
    return HTTPResponse(status, [*_JSON, *extra], orjson.dumps({"error": {"type": kind, "message": message}}))


def of_json(value: Any) -> HTTPResponse:
    """Return ``value`` as JSON, with status 200."""
    return HTTPResponse(200, _JSON, orjson.dumps(value))


def not_allowed(method: str, path: str, allowed: tuple[str, ...]) -> HTTPResponse:
    """Return the response to a request whose path has routes, and none for its method."""
    listed = ", ".join(allowed)
    message = f"{path!r} allows {listed}, not {method}"
    return of_status(405, message, [(b"allow", listed.encode())])


def of_text(text: str, status: int = 200, content_type: str = "text/plain; charset=utf-8") -> HTTPResponse:
    """Return ``text`` in UTF-8."""
    return HTTPResponse(status, [(b"content-type", content_type.encode())], text.encode())


def redirect(path: str, query: bytes) -> HTTPResponse:
    """Return a redirect to ``path`` for which the client keeps its method and its body (307)."""
    location = quote(path).encode() + (b"?" + query if query else b"")
    return HTTPResponse(307, [(b"location", location)])


def response_headers(pairs: Pairs) -> RawHeaders:
    """Return the headers of a backend's response that may be forwarded, with names in lower case.

    Raises:
        ValueError: HTTP cannot carry one of them. A line feed, for example, would start another header.
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
