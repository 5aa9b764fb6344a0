"""Bounds on parsing large JSON: no garbage collection during the parse, and a limit on strings, arrays and objects.

A parser holds the interpreter lock from the first byte to the last. Meanwhile no other thread runs: neither the event
loop nor the thread that renews a replica's lease. The time depends on the values more than on the bytes. Measured on a
slow core: 40 ns for a small number, 130 for an empty array, 800 for an object member whose name is new. The garbage
collector runs once for every few hundred new arrays and objects, and finds nothing to free. It made the parse six times
as long: 8 MB of ``[],[],…`` took 1.8 s instead of 0.3.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import TypeVar

from .errors import ConfigError, MalformedBody

T = TypeVar("T")

MAX_ITEMS = 2_000_000
"""The most strings, arrays and objects of a body from a client. At worst they take 1.7 s, less than a lease."""

MAX_ITEMS_VARIABLE = "PENSTOCK_MAX_JSON_ITEMS"
"""Environment variable that sets another limit."""

_SMALL_BYTES = 256 * 1024
"""A body of at most this size is parsed within milliseconds, whatever it contains, and needs no bounds."""


def read_uncollected(read: Callable[[bytes], T], body: bytes) -> T:
    """Return ``read(body)``, where ``read`` parses JSON. A large body is parsed without garbage collection."""
    if len(body) <= _SMALL_BYTES or not gc.isenabled():
        return read(body)
    gc.disable()
    try:
        return read(body)
    finally:
        gc.enable()


def read_bounded(read: Callable[[bytes], T], body: bytes) -> T:
    """Return ``read(body)`` for a body from a client; see `read_uncollected`.

    Raises:
        MalformedBody: the body has more strings, arrays and objects than the limit.
        ConfigError: the environment variable with the limit is not a number.
    """
    if len(body) > _SMALL_BYTES:
        limit = _max_items()
        # Each takes at least two bytes. Brackets within strings count too: telling them apart would need a parser.
        if len(body) > 2 * limit and (count := _count_items(body)) > limit:
            raise MalformedBody(
                f"the body is JSON with {count:,} strings, arrays and objects, and at most {limit:,} are read: send "
                f"numbers as bytes, send fewer rows at a time, or set {MAX_ITEMS_VARIABLE} for the replicas"
            )
    return read_uncollected(read, body)


def _count_items(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{") + body.count(b'"') // 2


def _max_items() -> int:
    text = os.environ.get(MAX_ITEMS_VARIABLE)
    if text is None:
        return MAX_ITEMS
    if not text.isascii() or not text.isdecimal():
        raise ConfigError(f"{MAX_ITEMS_VARIABLE} must be a number of JSON values, not {text!r}")
    return int(text)
