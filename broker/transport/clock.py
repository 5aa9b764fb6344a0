"""The broker's clock, which deadlines refer to: measured periodically, extrapolated in between.

Processes also share it to act together. What idle replicas send at a multiple of `GRID_MS` arrives together, and Redis
wakes up once for all of it: most of the cost of a small command to an idle server is the wake-up.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any

_STALE_S = 30.0
"""Seconds after which the clock is read again."""
_MAX_ROUND_TRIP_S = 0.02
"""A reading that took longer than this is too imprecise."""
_MAX_READINGS = 5

GRID_MS = 50.0
"""Distance of the moments at which idle replicas act. Every second it is twenty times that Redis wakes up, and a fleet
of 1,000 sends it a hundred packets at a time: they may delay a request by two milliseconds.
"""
_EARLY_MS = 2.0
"""A timer may end this much before its time."""


def on_grid(delay_s: float, now_ms: float) -> float:
    """Return a delay that ends at a multiple of `GRID_MS`: at most that much shorter, or as long but for `_EARLY_MS`.

    Args:
        delay_s: the longest delay.
        now_ms: Unix time by the broker's clock (`Clock.now_ms`).
    """
    past_ms = (now_ms + delay_s * 1000 + _EARLY_MS) % GRID_MS - _EARLY_MS
    return delay_s - past_ms / 1000


class Clock:
    """Unix time by the broker's clock, extrapolated from the last reading with the local monotonic clock."""

    def __init__(self) -> None:
        self._offset_ms = 0.0
        self._read_at = 0.0

    def now_ms(self) -> float:
        """Return Unix time by the broker's clock, in milliseconds. Any thread may call it."""
        # Not the loop's time: uvloop updates that once per tick, in whole milliseconds.
        return monotonic() * 1000 + self._offset_ms

    def is_stale(self) -> bool:
        """Return whether the clock should be read again."""
        return monotonic() - self._read_at > _STALE_S

    async def read(self, request: Callable[[], Awaitable[Any]]) -> None:
        """Set the clock from the replies to ``TIME`` that ``request`` returns. No other command may be in flight.

        Uses the quickest of a few readings: the error is at most half of its round trip.
        """
        quickest_s = math.inf
        for _ in range(_MAX_READINGS):
            before = monotonic()
            seconds, micros = await request()
            if (took_s := monotonic() - before) < quickest_s:
                quickest_s = took_s
                self._set(before, seconds, micros)
            if took_s < _MAX_ROUND_TRIP_S / 10:
                return

    def update(self, before: float, reply: Any) -> None:
        """Set the clock from the reply to a ``TIME`` sent at ``before``, unless its round trip took too long."""
        if not isinstance(reply, Exception) and monotonic() - before < _MAX_ROUND_TRIP_S:
            self._set(before, reply[0], reply[1])

    def _set(self, before: float, seconds: bytes, micros: bytes) -> None:
        self._read_at = monotonic()
        server_ms = int(seconds) * 1000 + int(micros) / 1000
        self._offset_ms = server_ms - (before + self._read_at) / 2 * 1000
