"""Bounds on reading large JSON: no garbage collection meanwhile, and at most so many strings, arrays and objects.

A parser holds the interpreter's lock from the first byte to the last, so that no other thread runs: neither the event
loop nor the one that renews a replica's lease. The time depends on the values more than on the bytes. Measured on a
slow core: 40 ns for a small number, 130 for an empty array, 800 for a member whose name has not occurred before. The
garbage collector, which runs each time that some hundred arrays and objects were made and finds nothing, made that six
times as much: 8 MB of ``[],[],…`` took 1.8 s instead of 0.3.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import TypeVar

from .errors import ConfigError, MalformedBody

T = TypeVar("T")

MAX_ITEMS = 2_000_000
"""How many strings, arrays and objects a body from a client may hold: at worst they take 1.7 s, within a lease."""

MAX_ITEMS_VARIABLE = "PENSTOCK_MAX_JSON_ITEMS"
"""The environment variable that sets another limit."""

_COLLECTED_BYTES = 256 * 1024
"""A shorter body is read in some milliseconds whatever it holds."""


def read_uncollected(read: Callable[[bytes], T], body: bytes) -> T:
    """Return ``read(body)``, for a ``read`` that parses JSON, without garbage collection if the body is large."""
    if len(body) <= _COLLECTED_BYTES or not gc.isenabled():
        return read(body)
    gc.disable()
    try:
        return read(body)
    finally:
        gc.enable()


def read_bounded(read: Callable[[bytes], T], body: bytes) -> T:
    """`read_uncollected` for a body from a client.

    Raises:
        MalformedBody: it holds more strings, arrays and objects than are read.
        ConfigError: the environment variable that says how many is not a number.
    """
    if len(body) > _COLLECTED_BYTES:
        limit = _max_items()
        # Each takes two bytes. Brackets within strings count too: to tell them apart would be to parse it.
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
