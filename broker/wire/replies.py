"""Format of replies: the entries of a caller's reply stream, each a whole reply, several alike, or a part of one."""

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
"""The wire version of a part. A reader that does not support parts rejects it, and does not take it for a reply."""
_COUNT_FIELD = b"n"
"""The number of replies in an entry with several."""


@dataclass(slots=True)
class Reply:
    """A whole reply, or the end of a streamed one."""

    id: str = field(repr=False)
    """The id of the call, which is its secret: see ``broker/wire/call_ids.py``."""
    status: int = 200
    codec: str = "none"
    """How the value was written: ``json``, ``text``, ``bytes``, ``none`` or ``pickle``.

    ``response`` is a whole HTTP response; ``stream`` ends a streamed reply, and the body is the number of its parts.
    """
    headers: Pairs = field(default_factory=list[tuple[str, str]])
    """The header fields of an HTTP response (``response``); else empty."""
    error: dict[str, Any] | None = None
    """The error instead of a value, as ``handles.errors.to_wire`` wrote it."""
    replica: str = ""
    queue_ms: float = 0.0
    """Milliseconds from publishing the request to the start of its run."""
    run_ms: float = 0.0
    body: bytes = b""
    large: bool = False
    """Whether the body is a claim check: it lies in a key of its own."""

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
        """Write replies as one entry. They must share status, codec and replica, and have no headers and no error."""
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
        fields = [VERSION_FIELD, VERSION, _COUNT_FIELD, b"%d" % len(replies), HEADER_FIELD, orjson.dumps(header)]
        for reply in replies:
            fields += (reply.id.encode(), reply.body)
        return fields

    @classmethod
    def all_of(cls, fields: Sequence[bytes]) -> list[Reply]:
        """Read what `fields` or `fields_of` wrote. Raises `WireError` as `Entry.of` does."""
        if len(fields) < 6 or fields[2] != _COUNT_FIELD:
            return [cls.of(fields)]
        try:
            members = load_members(named_fields(fields[:6])[HEADER_FIELD])
        except KeyError as e:
            raise wrong_field(e) from None
        queue_ms, run_ms = members.pop("queue_ms", None), members.pop("run_ms", None)
        first = cls._from_members(members)
        ids, bodies = fields[6::2], fields[7::2]
        count = parse_count(fields[3])
        if (
            not len(ids) == len(bodies) == count == _count_numbers(queue_ms) == _count_numbers(run_ms)
            or first.headers
            or first.error is not None
        ):
            raise WireError(f"an entry does not have the {shortened(fields[3])} replies that its field 'n' announces")
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
        """Return the call ids of an entry that cannot be read, as far as they can be found."""
        if len(fields) >= 6 and fields[2] == _COUNT_FIELD:
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
        return cls._from_members(load_members(header), id_, named.get(BODY_FIELD, b""), named.get(LARGE_FIELD) == b"1")

    @classmethod
    def _from_members(cls, members: dict[str, Any], id_: str = "", body: bytes = b"", large: bool = False) -> Reply:
        """Return the reply with the ``members`` of a header. Raises `WireError`: one has a wrong type or value."""
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
    """One part of a streamed reply: some consecutive values of it.

    The last part is followed by a `Reply`, with the codec ``stream`` or with an error.
    """

    id: str = field(repr=False)
    """The id of the call, which is its secret."""
    number: int
    """Counted from 0. A caller that misses a part, or receives one twice, must abort the stream."""
    codec: str = "response"
    """How the values were written; ``response``: the bytes of an HTTP response's body, cut anywhere."""
    sizes: list[int] = field(default_factory=list[int])
    """The number of bytes of the body that belong to each value."""
    more: bool = False
    """Whether the last value continues in the next part."""
    status: int = 200
    """The status of an HTTP response; only in part 0."""
    headers: Pairs = field(default_factory=list[tuple[str, str]])
    """The header fields of an HTTP response; only in part 0."""
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
            raise WireError(f"a part cannot have the number {number}, {len(sizes)} values and 'more' {more}")
        if not 200 <= status <= 599:
            raise WireError(f"the status of a part must be 200 to 599, not {status}")
        return cls(id_, number, codec, sizes, more, status, load_pairs(headers) if headers else [], body)


def _count_numbers(members: Any) -> int:
    """Return the length of a list of numbers; -1 for anything else."""
    if type(members) is not list:
        return -1
    numbers = cast("list[object]", members)
    return len(numbers) if all(type(number) is float or type(number) is int for number in numbers) else -1


def _load_sizes(raw: Any, total: int) -> list[int]:
    """Return ``raw`` if it is a list of sizes whose sum is ``total``. Raises `WireError` for anything else."""
    try:
        sizes = [size for size in raw if type(size) is int and size >= 0]
        if len(sizes) == len(raw) and sum(sizes) == total:
            return sizes
    except TypeError:
        pass
    raise WireError(f"the header's 'sizes' must add up to the {total} bytes of the part, not {shortened(raw)}")
