"""What lies on the streams: every field and version, encode beside decode, no I/O.

A request is an `Entry`, an answer a `Reply`, with `Part`s before it if it streams. All are flat stream fields: a
version, an id, a header (JSON) and a body, which is raw bytes and never inside the JSON. Unknown fields are ignored, so
that old replicas can read new proxies; an unknown version is refused by name; whatever else cannot be read is a
`WireError` and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from reprlib import repr as shortened
from typing import Any, NamedTuple, cast

import orjson

from . import exact_json
from .call_ids import shown_id
from .errors import WireError
from .path_params import PathParam, dump_params, load_params

VERSION = b"1"
PART_VERSION = b"part-1"
"""Of a part of an answer: whoever knows of no parts refuses it, instead of mistaking it for the answer."""

VALUE_COST = 128
"""What a value of an answer in parts weighs besides its bytes, so that many small ones are bounded too."""
LARGE = 256 * 1024
"""A body of more bytes travels in a key of its own (claim check), so that a claim of many entries stays small."""
LARGEST = 512 * 1024 * 1024
"""What Redis takes as one value (``proto-max-bulk-len``). Beyond, it cuts the connection, with all who share it."""

VERSION_FIELD, ID_FIELD, CALLER_FIELD, HEADER_FIELD = b"v", b"id", b"by", b"h"
BODY_FIELD, LARGE_FIELD, _MANY = b"b", b"large", b"n"
SIZE_FIELD = b"size"
"""The bytes of head and body of a request that is not small, written by the script that publishes it."""

RAW_PATH_SAFE = "!\"$&'()*+,-./:;<=>@[\\]^_`{|}~"
"""Besides letters and digits, what a client may have sent in a path as it is; other raw paths are in the header."""

Pairs = list[tuple[str, str]]

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
        members = _load_header(raw)
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
            raise _wrong_member(members, _HEADER_TYPES)
        if type(query) is dict and query and exact_json.has_long_number(raw):  # pyright: ignore[reportUnknownArgumentType]
            query = exact_json.loads(raw)["query"]
        return cls(
            endpoint,
            method,
            path,
            load_params(params) if params else {},
            query,  # pyright: ignore[reportUnknownArgumentType]
            _load_pairs(headers) if headers else [],
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
    """The id of the call, which is its secret: see ``broker/call_ids.py``."""
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
        named = _named(fields)
        try:
            return cls(
                named[ID_FIELD].decode(),
                named[CALLER_FIELD].decode(),
                _header_of(named[HEADER_FIELD]),
                named.get(BODY_FIELD, b""),
                named.get(LARGE_FIELD) == b"1",
                _count(named[SIZE_FIELD]) if SIZE_FIELD in named else 0,
            )
        except (KeyError, UnicodeDecodeError) as e:
            raise _wrong_field(e) from None


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


@dataclass(slots=True)
class Reply:
    """One answer as it lies in a caller's stream."""

    id: str = field(repr=False)
    """Of the request."""
    status: int = 200
    codec: str = "none"
    """How the value was written: ``json``, ``text``, ``bytes``, ``none`` or ``pickle``.

    ``response`` is a whole HTTP response; ``stream`` ends an answer in parts, and the body says how many there were.
    """
    headers: Pairs = field(default_factory=list[tuple[str, str]])
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
        header = {
            "status": self.status,
            "codec": self.codec,
            "headers": self.headers,
            "error": self.error,
            "replica": self.replica,
            "queue_ms": self.queue_ms,
            "run_ms": self.run_ms,
        }
        fields = [VERSION_FIELD, VERSION, ID_FIELD, self.id.encode(), HEADER_FIELD, orjson.dumps(header)]
        fields += (LARGE_FIELD, b"1") if self.large else (BODY_FIELD, self.body)
        return fields

    @staticmethod
    def fields_of(replies: Sequence[Reply]) -> list[bytes]:
        """Write several as one entry: they have one status, codec and replica, and no headers and no error."""
        if len(replies) == 1:
            return replies[0].fields()
        first = replies[0]
        header = {
            "status": first.status,
            "codec": first.codec,
            "replica": first.replica,
            "queue_ms": [reply.queue_ms for reply in replies],
            "run_ms": [reply.run_ms for reply in replies],
        }
        fields = [VERSION_FIELD, VERSION, _MANY, b"%d" % len(replies), HEADER_FIELD, orjson.dumps(header)]
        for reply in replies:
            fields += (reply.id.encode(), reply.body)
        return fields

    @classmethod
    def all_of(cls, fields: Sequence[bytes]) -> list[Reply]:
        """Read what `fields` or `fields_of` wrote. Raises `WireError` as `Entry.of` does."""
        if len(fields) < 6 or fields[2] != _MANY:
            return [cls.of(fields)]
        try:
            members = _loads(_named(fields[:6])[HEADER_FIELD])
        except KeyError as e:
            raise _wrong_field(e) from None
        queue_ms, run_ms = members.pop("queue_ms", None), members.pop("run_ms", None)
        first = cls._said(members)
        ids, bodies = fields[6::2], fields[7::2]
        count = _count(fields[3])
        if (
            not len(ids) == len(bodies) == count == _numbers(queue_ms) == _numbers(run_ms)
            or first.headers
            or first.error is not None
        ):
            raise WireError(f"an entry does not hold the {shortened(fields[3])} alike replies that it says it does")
        status, codec, replica = first.status, first.codec, first.replica
        try:
            return [
                cls(id_.decode(), status, codec, [], None, replica, queued, ran, body)
                for id_, queued, ran, body in zip(ids, queue_ms, run_ms, bodies)  # noqa: B905 - the lengths are equal
            ]
        except UnicodeDecodeError as e:
            raise _wrong_field(e) from None

    @staticmethod
    def ids_of(fields: Sequence[bytes]) -> list[str]:
        """Return whose replies an entry has that cannot be read, as far as that can be."""
        if len(fields) >= 6 and fields[2] == _MANY:
            found = list(fields[6::2])
        else:
            found = [value for name, value in zip(fields[::2], fields[1::2], strict=False) if name == ID_FIELD][:1]
        return [id_.decode(errors="replace") for id_ in found]

    @classmethod
    def of(cls, fields: Sequence[bytes] | Mapping[bytes, bytes]) -> Reply:
        """Read what `fields` wrote. Raises `WireError` as `Entry.of` does."""
        named = _named(fields)
        try:
            id_, header = named[ID_FIELD].decode(), named[HEADER_FIELD]
        except (KeyError, UnicodeDecodeError) as e:
            raise _wrong_field(e) from None
        return cls._said(_loads(header), id_, named.get(BODY_FIELD, b""), named.get(LARGE_FIELD) == b"1")

    @classmethod
    def _said(cls, members: dict[str, Any], id_: str = "", body: bytes = b"", large: bool = False) -> Reply:
        """Return the reply that has the ``members`` of a header."""
        get = members.get
        status, codec, replica = get("status", 200), get("codec", "none"), get("replica", "")
        queue_ms, run_ms = get("queue_ms", 0.0), get("run_ms", 0.0)
        headers, error = get("headers"), get("error")
        if not (
            type(status) is int
            and type(codec) is type(replica) is str
            and (type(queue_ms) is float or type(queue_ms) is int)
            and (type(run_ms) is float or type(run_ms) is int)
            and (error is None or type(error) is dict)
        ):
            raise _wrong_member(members, _REPLY_TYPES)
        if not 100 <= status <= 599:
            raise WireError(f"the status of a reply must be 100 to 599, not {status}")
        return cls(
            id_,
            status,
            codec,
            _load_pairs(headers) if headers else [],
            error,  # pyright: ignore[reportUnknownArgumentType]
            replica,
            queue_ms,
            run_ms,
            body,
            large,
        )


_HEADER_TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("endpoint", "method", "path", "codec", "call", "request_id", "client"), (str,)),
    "query": (str, dict),
    "deadline_ms": (int,),
    "window": (int,),
    "scope": (dict, type(None)),
}
_REPLY_TYPES: Mapping[str, tuple[type, ...]] = {
    "status": (int,),
    "codec": (str,),
    "replica": (str,),
    "queue_ms": (float, int),
    "run_ms": (float, int),
    "error": (dict, type(None)),
}
_PART_TYPES: Mapping[str, tuple[type, ...]] = {
    "n": (int,),
    "codec": (str,),
    "more": (bool,),
    "status": (int,),
}


@dataclass(slots=True)
class Part:
    """Some consecutive values of an answer that is sent as it is made, as they lie in a caller's stream.

    A `Reply` ends it: with codec ``stream`` or with an error.
    """

    id: str = field(repr=False)
    """Of the request."""
    number: int
    """Counted from 0: a caller that misses one, or sees one twice, must not go on."""
    codec: str = "response"
    """How the values were written; ``response``: the bytes of an HTTP response's body, cut anywhere."""
    sizes: list[int] = field(default_factory=list[int])
    """How many bytes of the body each value has."""
    more: bool = False
    """The last value goes on in the next part."""
    status: int = 200
    headers: Pairs = field(default_factory=list[tuple[str, str]])
    """Like the status those of an HTTP response, in part 0."""
    body: bytes = b""

    def fields(self) -> list[bytes]:
        """Return names and values in turn, as ``XADD`` takes them."""
        header: dict[str, Any] = {"n": self.number, "codec": self.codec, "sizes": self.sizes, "more": self.more}
        if self.number == 0:
            header |= {"status": self.status, "headers": self.headers}
        fields = [VERSION_FIELD, PART_VERSION, ID_FIELD, self.id.encode(), HEADER_FIELD, orjson.dumps(header)]
        return [*fields, BODY_FIELD, self.body]

    @classmethod
    def of(cls, fields: Sequence[bytes] | Mapping[bytes, bytes]) -> Part:
        """Read what `fields` wrote. Raises `WireError` as `Entry.of` does."""
        named = _named(fields, PART_VERSION)
        try:
            id_, header, body = named[ID_FIELD].decode(), named[HEADER_FIELD], named[BODY_FIELD]
        except (KeyError, UnicodeDecodeError) as e:
            raise _wrong_field(e) from None
        members = _loads(header)
        get = members.get
        number, codec, more = get("n", -1), get("codec", "response"), get("more", False)
        status, headers, raw_sizes = get("status", 200), get("headers"), get("sizes", [])
        if not (type(number) is type(status) is int and type(codec) is str and type(more) is bool):
            raise _wrong_member(members, _PART_TYPES)
        sizes = _load_sizes(raw_sizes, len(body))
        if number < 0 or (more and not sizes):
            raise WireError(f"a part has the number {number} and {len(sizes)} values, with more to come: {more}")
        if not 200 <= status <= 599:
            raise WireError(f"the status of a part must be 200 to 599, not {status}")
        return cls(id_, number, codec, sizes, more, status, _load_pairs(headers) if headers else [], body)


def _count(text: bytes) -> int:
    return int(text) if text.isdigit() else -1


def _numbers(members: Any) -> int:
    """Return how many numbers a list has; -1 for anything else."""
    if type(members) is not list:
        return -1
    numbers = cast("list[object]", members)
    return len(numbers) if all(type(one) is float or type(one) is int for one in numbers) else -1


def _named(fields: Sequence[bytes] | Mapping[bytes, bytes], wanted: bytes = VERSION) -> Mapping[bytes, bytes]:
    if not isinstance(fields, Mapping):
        if len(fields) % 2:
            raise WireError("an entry has a field without a value")
        fields = dict(zip(fields[::2], fields[1::2]))  # noqa: B905 - `strict` costs, and the lengths are equal
    if (version := fields.get(VERSION_FIELD)) != wanted:
        raise WireError(f"cannot read wire version {shortened(version)}; this process reads {wanted!r}")
    return fields


def _wrong_field(error: KeyError | UnicodeDecodeError) -> WireError:
    if isinstance(error, KeyError):
        return WireError(f"an entry has no field {error.args[0]!r}")
    return WireError(f"{shortened(error.object)} is not UTF-8")


def _load_header(raw: bytes) -> dict[str, Any]:
    try:
        return _loads(raw)
    except WireError as e:
        try:
            members = exact_json.loads(raw)  # keyword arguments may have lone surrogates
        except ValueError:
            raise e from None
        if type(members) is not dict:
            raise
        return cast("dict[str, Any]", members)


def _loads(raw: bytes) -> dict[str, Any]:
    try:
        members = orjson.loads(raw)
    except orjson.JSONDecodeError as e:
        raise WireError(f"the header is not JSON: {e}") from None
    if type(members) is not dict:
        raise WireError(f"the header must be a JSON object, not {type(members).__name__}")
    return cast("dict[str, Any]", members)


def _wrong_member(members: Mapping[str, Any], types: Mapping[str, tuple[type, ...]]) -> WireError:
    for name, allowed in types.items():
        if name in members and type(members[name]) not in allowed:
            return WireError(f"the header's {name!r} cannot be a {type(members[name]).__name__}")
    raise AssertionError("a member that was of the wrong type is of the right one")


def _load_pairs(raw: Any) -> Pairs:
    try:
        pairs = [(key, value) for key, value in raw if type(key) is str and type(value) is str]
        if len(pairs) == len(raw):
            return pairs
    except (TypeError, ValueError):
        pass
    raise WireError("the header's 'headers' must be pairs of strings")


def _load_sizes(raw: Any, total: int) -> list[int]:
    try:
        sizes = [size for size in raw if type(size) is int and size >= 0]
        if len(sizes) == len(raw) and sum(sizes) == total:
            return sizes
    except TypeError:
        pass
    raise WireError(f"the header's 'sizes' must be those of the {total} bytes of a part, not {shortened(raw)}")
