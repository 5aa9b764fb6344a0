"""The format of a reply: an entry of a caller's reply stream, whole or in parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from reprlib import repr as shortened
from typing import Any, cast

import orjson

from ..errors import WireError
from ._fields import (
    BODY_FIELD,
    HEADER_FIELD,
    ID_FIELD,
    LARGE_FIELD,
    VERSION,
    VERSION_FIELD,
    Pairs,
    load_members,
    load_pairs,
    named_fields,
    parse_count,
    wrong_field,
    wrong_member,
)

PART_VERSION = b"part-1"
"""Of a part of an answer: whoever knows of no parts refuses it, instead of mistaking it for the answer."""
_MANY = b"n"


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
            members = load_members(named_fields(fields[:6])[HEADER_FIELD])
        except KeyError as e:
            raise wrong_field(e) from None
        queue_ms, run_ms = members.pop("queue_ms", None), members.pop("run_ms", None)
        first = cls._said(members)
        ids, bodies = fields[6::2], fields[7::2]
        count = parse_count(fields[3])
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
            raise wrong_field(e) from None

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
        named = named_fields(fields)
        try:
            id_, header = named[ID_FIELD].decode(), named[HEADER_FIELD]
        except (KeyError, UnicodeDecodeError) as e:
            raise wrong_field(e) from None
        return cls._said(load_members(header), id_, named.get(BODY_FIELD, b""), named.get(LARGE_FIELD) == b"1")

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
            raise wrong_member(members, _REPLY_TYPES)
        if not 100 <= status <= 599:
            raise WireError(f"the status of a reply must be 100 to 599, not {status}")
        return cls(
            id_,
            status,
            codec,
            load_pairs(headers) if headers else [],
            error,  # pyright: ignore[reportUnknownArgumentType]
            replica,
            queue_ms,
            run_ms,
            body,
            large,
        )


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
        named = named_fields(fields, PART_VERSION)
        try:
            id_, header, body = named[ID_FIELD].decode(), named[HEADER_FIELD], named[BODY_FIELD]
        except (KeyError, UnicodeDecodeError) as e:
            raise wrong_field(e) from None
        members = load_members(header)
        get = members.get
        number, codec, more = get("n", -1), get("codec", "response"), get("more", False)
        status, headers, raw_sizes = get("status", 200), get("headers"), get("sizes", [])
        if not (type(number) is type(status) is int and type(codec) is str and type(more) is bool):
            raise wrong_member(members, _PART_TYPES)
        sizes = _load_sizes(raw_sizes, len(body))
        if number < 0 or (more and not sizes):
            raise WireError(f"a part has the number {number} and {len(sizes)} values, with more to come: {more}")
        if not 200 <= status <= 599:
            raise WireError(f"the status of a part must be 200 to 599, not {status}")
        return cls(id_, number, codec, sizes, more, status, load_pairs(headers) if headers else [], body)


def _numbers(members: Any) -> int:
    """Return how many numbers a list has; -1 for anything else."""
    if type(members) is not list:
        return -1
    numbers = cast("list[object]", members)
    return len(numbers) if all(type(one) is float or type(one) is int for one in numbers) else -1


def _load_sizes(raw: Any, total: int) -> list[int]:
    try:
        sizes = [size for size in raw if type(size) is int and size >= 0]
        if len(sizes) == len(raw) and sum(sizes) == total:
            return sizes
    except TypeError:
        pass
    raise WireError(f"the header's 'sizes' must be those of the {total} bytes of a part, not {shortened(raw)}")
