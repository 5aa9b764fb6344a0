"""What lies on the streams: every field and version, encode beside decode, no I/O.

A request is an `Entry`, an answer a `Reply`. Both are flat stream fields: a version, an id, a header (JSON) and a body,
which is raw bytes and never inside the JSON. Unknown fields are ignored, so that old replicas can read new proxies; an
unknown version is refused by name; whatever else cannot be read is a `WireError` and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Union, cast
from uuid import UUID

import orjson

from .errors import WireError

VERSION = b"1"
LARGE = 256 * 1024
"""A body of more bytes travels in a key of its own (claim check), so that a claim of many entries stays small."""

_V, _ID, _CALLER, _HEADER, _BODY, _LARGE = b"v", b"id", b"by", b"h", b"b", b"large"

PathParam = Union[str, int, float, UUID]
Pairs = list[tuple[str, str]]

HTTP_CODEC = ""
"""The body came over HTTP: bytes that the content type describes. Only a handle may name another codec."""


@dataclass(slots=True)
class Header:
    """What a request is, apart from its body."""

    endpoint: str = ""
    method: str = "GET"
    path: str = "/"
    path_params: dict[str, PathParam] = field(default_factory=dict)
    query: str | dict[str, Any] = ""
    """The raw query string of HTTP, or the keyword arguments of a handle as the JSON values they were."""
    headers: Pairs = field(default_factory=list)
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

    def dump(self) -> bytes:
        return orjson.dumps(
            {
                "endpoint": self.endpoint,
                "method": self.method,
                "path": self.path,
                "params": _dump_params(self.path_params) if self.path_params else {},
                "query": self.query,
                "headers": self.headers,
                "codec": self.codec,
                "deadline_ms": self.deadline_ms,
                "call": self.call,
                "request_id": self.request_id,
                "client": self.client,
            }
        )

    @classmethod
    def load(cls, raw: bytes) -> Header:
        """Read what `dump` wrote. Raises `WireError` for anything else."""
        read = _Reader(raw)
        query = read.get("query", (str, dict), "")
        return cls(
            read.get("endpoint", str, ""),
            read.get("method", str, "GET"),
            read.get("path", str, "/"),
            _load_params(read.get("params", dict, {})),
            query,
            read.pairs("headers"),
            read.get("codec", str, HTTP_CODEC),
            read.get("deadline_ms", int, 0),
            read.get("call", str, "__call__"),
            read.get("request_id", str, ""),
            read.get("client", str, ""),
        )


@dataclass(slots=True)
class Entry:
    """One request as it lies in a stream."""

    id: str
    caller: str
    """Whose reply stream is waiting; empty for shadow traffic, which nobody waits for."""
    header: Header
    body: bytes = b""
    large: bool = False
    """The body is not here but in a key of its own."""

    def fields(self) -> list[bytes]:
        """Return names and values in turn, as ``XADD`` takes them."""
        fields = [
            _V,
            VERSION,
            _ID,
            self.id.encode(),
            _CALLER,
            self.caller.encode(),
            _HEADER,
            self.header.dump(),
        ]
        fields += (_LARGE, b"1") if self.large else (_BODY, self.body)
        return fields

    @classmethod
    def of(cls, fields: Sequence[bytes] | Mapping[bytes, bytes]) -> Entry:
        """Read what `fields` wrote.

        Raises:
            WireError: the version is not ours, a field is missing, or one cannot be read.
        """
        named = _named(fields)
        return cls(
            _text(named, _ID),
            _text(named, _CALLER),
            Header.load(_required(named, _HEADER)),
            named.get(_BODY, b""),
            named.get(_LARGE) == b"1",
        )


@dataclass(slots=True)
class Reply:
    """One answer as it lies in a caller's stream."""

    id: str
    """Of the request."""
    status: int = 200
    codec: str = "none"
    """How the value was written: ``json``, ``text``, ``bytes``, ``none``, ``pickle``; ``response`` is a whole HTTP response."""
    headers: Pairs = field(default_factory=list)
    """Those of a whole response; else empty."""
    error: dict[str, Any] | None = None
    """The error instead of a value, as ``handles.errors.to_wire`` wrote it."""
    replica: str = ""
    queue_ms: float = 0.0
    """From its publication to its start."""
    run_ms: float = 0.0
    body: bytes = b""
    large: bool = False

    def fields(self) -> list[bytes]:
        """Return names and values in turn, as ``XADD`` takes them."""
        header: dict[str, Any] = {
            "status": self.status,
            "codec": self.codec,
            "replica": self.replica,
            "queue_ms": self.queue_ms,
            "run_ms": self.run_ms,
        }
        if self.headers:
            header["headers"] = self.headers
        if self.error is not None:
            header["error"] = self.error
        fields = [_V, VERSION, _ID, self.id.encode(), _HEADER, orjson.dumps(header)]
        fields += (_LARGE, b"1") if self.large else (_BODY, self.body)
        return fields

    @classmethod
    def of(cls, fields: Sequence[bytes] | Mapping[bytes, bytes]) -> Reply:
        """Read what `fields` wrote. Raises `WireError` as `Entry.of` does."""
        named = _named(fields)
        read = _Reader(_required(named, _HEADER))
        status = read.get("status", int, 200)
        if not 100 <= status <= 599:
            raise WireError(f"the status of a reply must be 100 to 599, not {status}")
        return cls(
            _text(named, _ID),
            status,
            read.get("codec", str, "none"),
            read.pairs("headers"),
            read.get("error", (dict, type(None)), None),
            read.get("replica", str, ""),
            float(read.get("queue_ms", (float, int), 0.0)),
            float(read.get("run_ms", (float, int), 0.0)),
            named.get(_BODY, b""),
            named.get(_LARGE) == b"1",
        )


class _Reader:
    """A JSON object whose members must be of the types that are asked for."""

    __slots__ = ("_members",)

    def __init__(self, raw: bytes) -> None:
        try:
            members = orjson.loads(raw)
        except orjson.JSONDecodeError as e:
            raise WireError(f"the header is not JSON: {e}") from None
        if type(members) is not dict:
            raise WireError(f"the header must be a JSON object, not {type(members).__name__}")
        self._members = cast("dict[str, Any]", members)

    def get(self, name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        value = self._members.get(name, default)
        # bool is an int to isinstance, and never what a number or a text here may be.
        if not isinstance(value, kind) or value is True or value is False:
            raise WireError(f"the header's {name!r} cannot be a {type(value).__name__}")
        return value

    def pairs(self, name: str) -> Pairs:
        raw = self._members.get(name)
        if raw is None:
            return []
        try:
            pairs = [(key, value) for key, value in raw]
        except (TypeError, ValueError):
            raise WireError(f"the header's {name!r} must be a list of pairs") from None
        for key, value in pairs:
            if type(key) is not str or type(value) is not str:
                raise WireError(f"the header's {name!r} must be pairs of strings")
        return pairs


def _named(fields: Sequence[bytes] | Mapping[bytes, bytes]) -> Mapping[bytes, bytes]:
    if not isinstance(fields, Mapping):
        if len(fields) % 2:
            raise WireError("an entry has a field without a value")
        fields = dict(zip(fields[::2], fields[1::2]))
    if (version := fields.get(_V)) != VERSION:
        raise WireError(f"cannot read wire version {version!r}; this process reads {VERSION!r}")
    return fields


def _required(fields: Mapping[bytes, bytes], name: bytes) -> bytes:
    try:
        return fields[name]
    except KeyError:
        raise WireError(f"an entry has no field {name!r}") from None


def _text(fields: Mapping[bytes, bytes], name: bytes) -> str:
    try:
        return _required(fields, name).decode()
    except UnicodeDecodeError:
        raise WireError(f"the field {name!r} is not UTF-8") from None


# JSON has no UUIDs, and orjson no integers beyond 64 bits and no infinity (which Starlette's float convertor makes of 400
# digits): what is not a string carries its type and is spelled out.
def _dump_params(params: Mapping[str, PathParam]) -> dict[str, str | tuple[str, str]]:
    return {name: value if type(value) is str else _dump_param(name, value) for name, value in params.items()}


def _dump_param(name: str, value: PathParam) -> tuple[str, str]:
    for kind, of in (("int", int), ("float", float), ("uuid", UUID), ("str", str)):
        if isinstance(value, of):
            return kind, repr(value) if of is float else str(value)
    raise WireError(f"the path parameter {name!r} cannot travel: its convertor made a {type(value).__name__}")


_CONVERTORS: dict[str, type[int] | type[float] | type[UUID] | type[str]] = {
    "int": int,
    "float": float,
    "uuid": UUID,
    "str": str,
}


def _load_params(raw: Mapping[str, Any]) -> dict[str, PathParam]:
    params: dict[str, PathParam] = {}
    for name, value in raw.items():
        if type(value) is str:
            params[name] = value
            continue
        try:
            kind, text = value
            params[name] = _CONVERTORS[kind](text)
        except (TypeError, ValueError, KeyError, AttributeError):
            raise WireError(f"the path parameter {name!r} cannot be read from {value!r}") from None
    return params
