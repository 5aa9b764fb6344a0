"""Format of requests: the entries of a request stream, each with a header and a body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import orjson

from . import exact_json
from ._fields import (
    BODY_FIELD,
    CALLER_FIELD,
    HEADER_FIELD,
    ID_FIELD,
    KEEP_FIELD,
    LARGE_FIELD,
    RETRY_FIELD,
    SIZE_FIELD,
    VERSION,
    VERSION_FIELD,
    Pairs,
    load_header,
    load_pairs,
    load_retry,
    named_fields,
    parse_count,
    wrong_field,
    wrong_member,
)
from .call_ids import shown_id
from .path_params import PathParam, dump_params, load_params

HTTP_CODEC = ""
"""The codec of a body that came over HTTP: its content type describes it. Only handles set another codec."""


@dataclass(slots=True)
class Header:
    """All of a request but its body."""

    endpoint: str = ""
    method: str = "GET"
    path: str = "/"
    path_params: dict[str, PathParam] = field(default_factory=dict[str, PathParam])
    query: str | dict[str, Any] = ""
    """The raw query string of HTTP, or the keyword arguments of a handle as JSON values."""
    headers: Pairs = field(default_factory=list[tuple[str, str]])
    """Pairs of lower-case name and value. They include the trace context, as ``traceparent`` (W3C Trace Context)."""
    codec: str = HTTP_CODEC
    """How a handle wrote the body: ``json``, ``text``, ``bytes``, ``none`` or ``pickle``."""
    deadline_ms: int = 0
    """Unix time by the broker's clock; 0 means none."""
    call: str = "__call__"
    """The name of the backend's method to call."""
    request_id: str = ""
    """The ``X-Request-Id``, for logs; two requests may carry the same."""
    client: str = ""
    """The address of the HTTP client, ``host:port``."""
    window: int = 0
    """How many bytes of a streamed reply (`Part`) may be in flight, with `VALUE_COST` added for each value.

    0: the caller does not accept a streamed reply.
    """
    scope: dict[str, Any] | None = None
    """Members of the proxy's ASGI scope that do not follow from the other fields: see ``proxy/scopes.py``."""
    _sealed: bytes = field(default=b"", init=False, repr=False, compare=False)

    def seal(self) -> Header:
        """Encode it once for all requests that share it. It must not be changed afterwards."""
        self._sealed = self.dump()
        return self

    def dump(self) -> bytes:
        """Return the header as JSON."""
        if self._sealed:
            return self._sealed
        members: dict[str, Any] = {
            "endpoint": self.endpoint,
            "method": self.method,
            "path": self.path,
            "params": dump_params(self.path_params) if self.path_params else {},
            "query": self.query,
            "headers": self.headers,
            "codec": self.codec,
            "deadline_ms": self.deadline_ms,
            "call": self.call,
            "request_id": self.request_id,
            "client": self.client,
            "window": self.window,
        }
        if self.scope:
            members["scope"] = self.scope
        try:
            return exact_json.compact(orjson.dumps(members))
        except TypeError:  # keyword arguments with long integers or lone surrogates
            return exact_json.dumps(members)

    @classmethod
    def load(cls, raw: bytes) -> Header:
        """Read what `dump` wrote. Raises `WireError` for anything else."""
        members = load_header(raw)
        get = members.get
        endpoint, method, path = get("endpoint", ""), get("method", "GET"), get("path", "/")
        query, codec, deadline_ms = get("query", ""), get("codec", HTTP_CODEC), get("deadline_ms", 0)
        call, request_id, client = get("call", "__call__"), get("request_id", ""), get("client", "")
        params, headers, window, scope = get("params"), get("headers"), get("window", 0), get("scope")
        # Inline and not a function call for each: this runs for every request.
        if not (
            type(endpoint) is type(method) is type(path) is type(codec) is str
            and type(call) is type(request_id) is type(client) is str
            and type(deadline_ms) is type(window) is int
            and (type(query) is str or type(query) is dict)
            and (scope is None or type(scope) is dict)
        ):
            raise wrong_member(members, _HEADER_TYPES)
        if type(query) is dict and query and exact_json.has_long_number(raw):  # pyright: ignore[reportUnknownArgumentType]
            query = exact_json.loads(raw)["query"]
        return cls(
            endpoint,
            method,
            path,
            load_params(params) if params else {},
            query,  # pyright: ignore[reportUnknownArgumentType]
            load_pairs(headers) if headers else [],
            codec,
            deadline_ms,
            call,
            request_id,
            client,
            window,
            scope,  # pyright: ignore[reportUnknownArgumentType]
        )


class _Referable:
    """Allows weak references to instances with slots: an argument of `dataclass` does so from Python 3.11 on."""

    __slots__ = ("__weakref__",)


@dataclass(slots=True)
class Entry(_Referable):
    """A request as it lies on a request stream."""

    id: str = field(repr=False)
    """The id of the call, which is its secret: see ``broker/wire/call_ids.py``."""
    caller: str = field(repr=False)
    """The id of the caller whose reply stream gets the reply; empty for shadow traffic, which gets none."""
    header: Header
    body: bytes = b""
    large: bool = False
    """Whether the body is a claim check: it lies in a key of its own."""
    size_bytes: int = field(default=0, compare=False)
    """The size of header and body as its publisher counted it; 0 for a small request, whose size is not recorded."""
    keep_bytes: int | None = None
    """Of a kept request (``broker/wire/kept.py``): the most bytes of a streamed result; None for any other."""
    attempts: int = field(default=0, compare=False)
    """How often its code was called and raised an error that is retried."""
    due_ms: int = field(default=0, compare=False)
    """When its next attempt is due: Unix time by the broker's clock; 0 if it does not wait for one."""

    @property
    def shown_id(self) -> str:
        """The id for logs and messages."""
        return shown_id(self.header.request_id, self.id)

    @property
    def headers(self) -> Pairs:
        """The header fields of the request."""
        return self.header.headers

    def raw(self) -> RawEntry:
        """Return the encoded values of the fields."""
        body = None if self.large else self.body
        return RawEntry(self.id.encode(), self.caller.encode(), self.header.dump(), body)

    def fields(self) -> list[bytes]:
        """Return names and values in turn, as ``XADD`` takes them."""
        return self.raw().fields()

    @classmethod
    def of(cls, fields: Sequence[bytes] | Mapping[bytes, bytes]) -> Entry:
        """Read what `fields` wrote.

        Raises:
            WireError: another wire version, or a field that is missing or cannot be read.
        """
        # Nearly all entries have these fields and no other. To read them by position halves the time.
        kind: type[object] = type(fields)
        if kind is list and len(fields) == _USUAL_LENGTH:
            values = cast("list[bytes]", fields)
            if values[::2] == _USUAL and values[1] == VERSION:
                try:
                    return cls(values[3].decode(), values[5].decode(), _header_of(values[7]), values[9])
                except UnicodeDecodeError as e:
                    raise wrong_field(e) from None
        named = named_fields(fields)
        try:
            entry = cls(
                named[ID_FIELD].decode(),
                named[CALLER_FIELD].decode(),
                _header_of(named[HEADER_FIELD]),
                named.get(BODY_FIELD, b""),
                named.get(LARGE_FIELD) == b"1",
                parse_count(named[SIZE_FIELD]) if SIZE_FIELD in named else 0,
                parse_count(named[KEEP_FIELD]) if KEEP_FIELD in named else None,
            )
        except (KeyError, UnicodeDecodeError) as e:
            raise wrong_field(e) from None
        if RETRY_FIELD in named:
            entry.attempts, entry.due_ms = load_retry(named[RETRY_FIELD])
        return entry


class RawEntry(NamedTuple):
    """The encoded values of an `Entry`, one by one: consecutive requests often differ in only two of them."""

    id: bytes
    caller: bytes
    header: bytes
    body: bytes | None
    """None for a large body, which lies in a key of its own."""
    large_bytes: int = 0
    """The length of a large body."""

    @property
    def size_bytes(self) -> int:
        """The size of header and body, also if the body lies in a key of its own."""
        return len(self.header) + (self.large_bytes if self.body is None else len(self.body))

    def __repr__(self) -> str:
        return f"RawEntry(header={self.header!r})"  # without the ids, which are secret

    def fields(self) -> list[bytes]:
        """Return names and values in turn, as ``XADD`` takes them."""
        fields = [VERSION_FIELD, VERSION, ID_FIELD, self.id, CALLER_FIELD, self.caller, HEADER_FIELD, self.header]
        return [*fields, *self.body_field()]

    def body_field(self) -> tuple[bytes, bytes]:
        """Return name and value of the field with the body, or of the field that marks a large one."""
        return (LARGE_FIELD, b"1") if self.body is None else (BODY_FIELD, self.body)


_USUAL = [VERSION_FIELD, ID_FIELD, CALLER_FIELD, HEADER_FIELD, BODY_FIELD]
"""The fields of a small request, in the order in which `RawEntry.fields` writes them."""
_USUAL_LENGTH = 2 * len(_USUAL)

_last_header = (Header().dump(), Header())


def _header_of(raw: bytes) -> Header:
    # Batch items have equal headers, as have the calls of a handle, and follow one another: they share one `Header`.
    # That is safe as nothing changes a decoded header but user code, which may change path parameters and a mapping
    # of keyword arguments: headers with these are not shared.
    global _last_header
    known, header = _last_header
    if raw != known:
        header = Header.load(raw)
        if not header.path_params and (type(header.query) is str or not header.query):
            _last_header = raw, header
    return header


_HEADER_TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("endpoint", "method", "path", "codec", "call", "request_id", "client"), (str,)),
    "query": (str, dict),
    "deadline_ms": (int,),
    "window": (int,),
    "scope": (dict, type(None)),
}
