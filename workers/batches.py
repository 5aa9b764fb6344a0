"""Batches for code that takes them: how large, how many at a time, and how long an incomplete one waits for more."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from .held import Held


class Batches:
    """Makes the batches of one replica of what is claimed and waits. Only for its loop."""

    def __init__(self, now_ms: Callable[[], float], on_lingered: Callable[[], None]) -> None:
        """``on_lingered`` is called when a batch that was too small has waited for long enough."""
        self._now_ms, self._on_lingered = now_ms, on_lingered
        self.running = 0
        self._linger: asyncio.TimerHandle | None = None
        self._lingered = False

    def configure(self, size: int, at_a_time: int, wait_s: float) -> None:
        self._size, self._at_a_time, self.wait_s = size, at_a_time, wait_s

    @property
    def lingering(self) -> bool:
        """A batch waits for more entries."""
        return self._linger is not None

    def next(self, waiting: deque[Held]) -> list[Held]:
        """Take the next batch off what waits; it is empty if none is to start now."""
        if not waiting or self.running >= self._at_a_time:
            return []
        # The linger counts from the first entry of the batch, and only an incomplete batch lingers.
        if len(waiting) < self._size and self.wait_s > 0 and not self._lingered:
            if self._linger is None:
                left_s = self.wait_s - (self._now_ms() - waiting[0].claimed_ms) / 1000
                self._linger = asyncio.get_running_loop().call_later(max(0.0, left_s), self._end_linger)
            return []
        self._lingered = False
        self.close()
        return [waiting.popleft() for _ in range(min(self._size, len(waiting)))]

    def close(self) -> None:
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None

    def _end_linger(self) -> None:
        self._linger, self._lingered = None, True
        self._on_lingered()
