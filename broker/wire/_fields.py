"""Names, limits and validation of the fields that requests and replies share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from reprlib import repr as shortened
from typing import Any, cast

import orjson

from ..errors import WireError
from . import exact_json

VERSION = b"1"
LARGE = 256 * 1024
"""A body of more bytes always travels in a key of its own (claim check), so that a claim of many entries stays small.

Smaller bodies of requests may as well: see ``handles/calls/large_bodies.py``.
"""
LARGEST = 512 * 1024 * 1024
"""Redis's default limit of one value (``proto-max-bulk-len``). For a longer one it closes the whole connection."""
VALUE_COST = 128
"""Bytes added to the size of each value of a streamed reply, so that its window bounds many small values too."""

VERSION_FIELD, ID_FIELD, CALLER_FIELD, HEADER_FIELD = b"v", b"id", b"by", b"h"
BODY_FIELD, LARGE_FIELD = b"b", b"large"
SIZE_FIELD = b"size"
"""The size in bytes of header and body of a request that is not small, written by the script that publishes it."""

KEEP_FIELD = b"keep"
"""Of a kept request: the most bytes of a streamed result. Its result stays in Redis, and goes to no reply stream."""

RETRY_FIELD = b"retry"
"""Of an entry whose code has raised before: the number of its attempts and when the next one is due (`load_retry`).

The scripts that claim an entry again add it; it is not on the stream.
"""

RAW_PATH_SAFE = "!\"$&'()*+,-./:;<=>@[\\]^_`{|}~"
"""Characters besides letters and digits that a path may contain unescaped; other raw paths are in the header."""

Pairs = list[tuple[str, str]]


def named_fields(fields: Sequence[bytes] | Mapping[bytes, bytes], wanted: bytes = VERSION) -> Mapping[bytes, bytes]:
    """Return the fields of an entry by name. Raises `WireError` if its wire version is not ``wanted``."""
    if not isinstance(fields, Mapping):
        if len(fields) % 2:
            raise WireError("an entry has a field without a value")
        fields = dict(zip(fields[::2], fields[1::2]))  # noqa: B905 - `strict` costs, and the lengths are equal
    if (version := fields.get(VERSION_FIELD)) != wanted:
        raise WireError(f"cannot read wire version {shortened(version)}; this process reads {wanted!r}")
    return fields


def wrong_field(error: KeyError | UnicodeDecodeError) -> WireError:
    """Return the error for a field that is missing or not UTF-8."""
    if isinstance(error, KeyError):
        return WireError(f"an entry has no field {error.args[0]!r}")
    return WireError(f"{shortened(error.object)} is not UTF-8")


def parse_count(text: bytes) -> int:
    """Return the number in decimal digits that ``text`` is; -1 for anything else."""
    return int(text) if text.isdigit() else -1


def load_retry(raw: bytes) -> tuple[int, int]:
    """Read a `RETRY_FIELD`: the number of attempts, and when the next one is due, or 0. Raises `WireError`."""
    attempts, _, due_ms = raw.partition(b":")
    if not (attempts.isdigit() and due_ms.isdigit()):
        raise WireError(f"the attempts of an entry cannot be read: {shortened(raw)}")
    return int(attempts), int(due_ms)


def load_header(raw: bytes) -> dict[str, Any]:
    """Return the members of a request's header. Raises `WireError`: it is not a JSON object."""
    try:
        return load_members(raw)
    except WireError as e:
        try:
            members = exact_json.loads(raw)  # keyword arguments may contain lone surrogates
        except ValueError:
            raise e from None
        if type(members) is not dict:
            raise
        return cast("dict[str, Any]", members)


def load_members(raw: bytes) -> dict[str, Any]:
    """Return the members of a JSON object. Raises `WireError` for anything else."""
    try:
        members = orjson.loads(raw)
    except orjson.JSONDecodeError as e:
        raise WireError(f"the header is not JSON: {e}") from None
    if type(members) is not dict:
        raise WireError(f"the header must be a JSON object, not {type(members).__name__}")
    return cast("dict[str, Any]", members)


def wrong_member(members: Mapping[str, Any], types: Mapping[str, tuple[type, ...]]) -> WireError:
    """Return the error for the first of ``members`` whose type is not among its ``types``."""
    for name, allowed in types.items():
        if name in members and type(members[name]) not in allowed:
            return WireError(f"the header's {name!r} cannot be a {type(members[name]).__name__}")
    raise AssertionError("every member has an allowed type")


def load_pairs(raw: Any) -> Pairs:
    """Return header fields as pairs of name and value. Raises `WireError` for anything else."""
    try:
        pairs = [(key, value) for key, value in raw if type(key) is str and type(value) is str]
        if len(pairs) == len(raw):
            return pairs
    except (TypeError, ValueError):
        pass
    raise WireError("the header's 'headers' must be pairs of strings")
