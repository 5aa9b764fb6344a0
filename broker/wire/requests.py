"""The format of a request: an entry of a request stream, with its header and body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from . import exact_json
from ._fields import (
    BODY_FIELD,
    CALLER_FIELD,
    HEADER_FIELD,
    ID_FIELD,
    LARGE_FIELD,
    SIZE_FIELD,
    VERSION,
    VERSION_FIELD,
    Pairs,
    load_header,
    load_pairs,
    named_fields,
    parse_count,
    wrong_field,
    wrong_member,
)
from .call_ids import shown_id
from .path_params import PathParam, dump_params, load_params

HTTP_CODEC = ""
"""The body came over HTTP: bytes that the content type describes. Only a handle may name another codec."""


@dataclass(slots=True)
class Header:
    """What a request is, apart from its body."""

    endpoint: str = ""
    method: str = "GET"
    path: str = "/"
    path_params: dict[str, PathParam] = field(default_factory=dict[str, PathParam])
    query: str | dict[str, Any] = ""
    """The raw query string of HTTP, or the keyword arguments of a handle as the JSON values they were."""
    headers: Pairs = field(default_factory=list[tuple[str, str]])
    """Lower-case names; the trace context is among them, as ``traceparent`` (W3C Trace Context)."""
    codec: str = HTTP_CODEC
    """How a handle wrote the body: ``json``, ``text``, ``bytes``, ``none`` or ``pickle``."""
    deadline_ms: int = 0
    """Unix time by the broker's clock; 0 means none."""
    call: str = "__call__"
    """The method of the backend's class."""
    request_id: str = ""
    """The ``X-Request-Id``, for logs; two requests may carry the same."""
    client: str = ""
    """The address that HTTP came from, ``host:port``."""
    window: int = 0
    """How much of an answer in parts (`Part`) may be under way to its reader; 0: the caller takes it only as a whole.

    In bytes, each value counted as `VALUE_COST` more.
    """
    scope: dict[str, Any] | None = None
    """What else of the ASGI scope the proxy saw that does not follow from the rest: see ``proxy/scopes.py``."""
    _sealed: bytes = field(default=b"", init=False, repr=False, compare=False)

    def seal(self) -> Header:
        """Write it once for all the requests that will share it. It must not be changed any more."""
        self._sealed = self.dump()
        return self

    def dump(self) -> bytes:
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
            return orjson.dumps(members)
        except TypeError:  # of keyword arguments: long integers, lone surrogates
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
        # Checked here and not by a function for each: this runs for every request.
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


@dataclass(slots=True)
class Entry:
    """One request as it lies in a stream."""

    id: str = field(repr=False)
    """The id of the call, which is its secret: see ``broker/wire/call_ids.py``."""
    caller: str = field(repr=False)
    """Whose reply stream is waiting; empty for shadow traffic, which nobody waits for."""
    header: Header
    body: bytes = b""
    large: bool = False
    """The body is not here but in a key of its own."""
    size_bytes: int = field(default=0, compare=False)
    """Of head and body as its publisher counted them; 0 if it is small, and need not be counted apart."""

    @property
    def shown_id(self) -> str:
        """The id for logs and messages."""
        return shown_id(self.header.request_id, self.id)

    def raw(self) -> RawEntry:
        body = None if self.large else self.body
        return RawEntry(self.id.encode(), self.caller.encode(), self.header.dump(), body)

    def fields(self) -> list[bytes]:
        """Return names and values in turn, as ``XADD`` takes them."""
        return self.raw().fields()

    @classmethod
    def of(cls, fields: Sequence[bytes] | Mapping[bytes, bytes]) -> Entry:
        """Read what `fields` wrote.

        Raises:
            WireError: the version is not ours, a field is missing, or one cannot be read.
        """
        named = named_fields(fields)
        try:
            return cls(
                named[ID_FIELD].decode(),
                named[CALLER_FIELD].decode(),
                _header_of(named[HEADER_FIELD]),
                named.get(BODY_FIELD, b""),
                named.get(LARGE_FIELD) == b"1",
                parse_count(named[SIZE_FIELD]) if SIZE_FIELD in named else 0,
            )
        except (KeyError, UnicodeDecodeError) as e:
            raise wrong_field(e) from None


class RawEntry(NamedTuple):
    """The values of an `Entry` as bytes, apart from each other: many requests in a row differ in two of them."""

    id: bytes
    caller: bytes
    header: bytes
    body: bytes | None
    """None for a large one."""
    large_bytes: int = 0
    """The length of a large one."""

    @property
    def size_bytes(self) -> int:
        """Of head and body, wherever that lies."""
        return len(self.header) + (self.large_bytes if self.body is None else len(self.body))

    def __repr__(self) -> str:
        return f"RawEntry(header={self.header!r})"  # without what is secret

    def fields(self) -> list[bytes]:
        fields = [VERSION_FIELD, VERSION, ID_FIELD, self.id, CALLER_FIELD, self.caller, HEADER_FIELD, self.header]
        return [*fields, *self.body_field()]

    def body_field(self) -> tuple[bytes, bytes]:
        """Return the name and the value of the field that says what the body is, or that it is elsewhere."""
        return (LARGE_FIELD, b"1") if self.body is None else (BODY_FIELD, self.body)


_last_header = (Header().dump(), Header())


def _header_of(raw: bytes) -> Header:
    # The items of a batch have one header, as the calls of a handle have, and come one after another: they share what
    # was made of it. Nobody changes a header that was read, but user code has its parameters and its query to itself.
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
