"""The broker's clock, which deadlines refer to: measured periodically, extrapolated in between."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any

_STALE_S = 30.0
_ROUND_S = 0.02
"""A reading that took longer than this says too little."""
_READINGS = 5


class Clock:
    """Unix time as the broker has it."""

    def __init__(self) -> None:
        self._offset_ms = 0.0
        self._read_at = 0.0

    def now_ms(self) -> float:
        """Unix time by the broker's clock, in milliseconds; the local clock may be off or jump. Any thread may ask."""
        # Not the loop's time: uvloop reads that once a turn, in whole milliseconds.
        return monotonic() * 1000 + self._offset_ms

    def is_stale(self) -> bool:
        """Whether it is time for another reading."""
        return monotonic() - self._read_at > _STALE_S

    async def read(self, ask: Callable[[], Awaitable[Any]]) -> None:
        """Read it from what ``ask`` returns, the reply to ``TIME``, on a connection where nothing else waits.

        Take the quickest of a few readings: half of what it took is what the clock may be wrong by.
        """
        quickest_s = math.inf
        for _ in range(_READINGS):
            before = monotonic()
            seconds, micros = await ask()
            if (took_s := monotonic() - before) < quickest_s:
                quickest_s = took_s
                self._set(before, seconds, micros)
            if took_s < _ROUND_S / 10:
                return

    def take(self, before: float, reply: Any) -> None:
        """Read it from the reply to a ``TIME`` that was sent at ``before``, unless that waited for others."""
        if not isinstance(reply, Exception) and monotonic() - before < _ROUND_S:
            self._set(before, reply[0], reply[1])

    def _set(self, before: float, seconds: bytes, micros: bytes) -> None:
        self._read_at = monotonic()
        server_ms = int(seconds) * 1000 + int(micros) / 1000
        self._offset_ms = server_ms - (before + self._read_at) / 2 * 1000
