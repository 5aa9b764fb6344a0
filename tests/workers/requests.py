"""Requests as a proxy or a handle publishes them, and their replies."""

from collections.abc import Mapping
from itertools import count
from typing import Any

import orjson

from penstock.broker.wire._fields import Pairs
from penstock.broker.wire.replies import Reply
from penstock.broker.wire.requests import Entry, Header
from penstock.handles.errors import BackendError, PenstockError, from_wire

_numbers = count(1)


def from_http(
    body: bytes = b"",
    *,
    content_type: str = "",
    headers: Pairs | None = None,
    method: str = "POST",
    path: str = "/",
    path_params: Mapping[str, Any] | None = None,
    query: str = "",
    call: str = "__call__",
    client: str = "192.0.2.7:40000",
    request_id: str = "",
) -> Entry:
    pairs = [("host", "example.org:8000"), *(headers or [])]
    if content_type:
        pairs.append(("content-type", content_type))
    header = Header("e", method, path, dict(path_params or {}), query, pairs, call=call, client=client)
    header.request_id = request_id
    return Entry(f"id-{next(_numbers)}", "caller", header, body)


def from_handle(value: object = None, *, codec: str = "json", call: str = "__call__", **arguments: Any) -> Entry:
    body = value if isinstance(value, bytes) else orjson.dumps(value)
    return Entry(f"id-{next(_numbers)}", "caller", Header("e", query=arguments, codec=codec, call=call), body)


def value_of(reply: Reply) -> Any:
    """Return the value that a handle returns, or raise the error that it raises."""
    if reply.error is not None:
        raise from_wire(reply.error)
    if reply.codec == "json":
        return orjson.loads(reply.body)
    return {"none": None, "text": reply.body.decode("utf-8", "replace")}.get(reply.codec, reply.body)


def error_of(reply: Reply) -> PenstockError:
    assert reply.error is not None, f"the reply is not an error: {reply}"
    return from_wire(reply.error)


def backend_error_of(reply: Reply) -> BackendError:
    error = error_of(reply)
    assert isinstance(error, BackendError)
    return error
