"""Capacity of a replica whose code takes one request at a time: how many requests it may hold.

Quick blocking code holds a few milliseconds of work ahead, so that its thread does not wait for the next claim. Slow
code holds nothing ahead, so that no request waits behind a slow call while another replica is idle. The exception is
the last moment of a call whose end is predictable (``prefetch.py``).

Pure: the caller passes the clock.
"""

from __future__ import annotations

import math

from .prefetch import CallTimePredictor

SLOW_S = 0.010
"""Run time from which on a call is slow."""

_MAX_AHEAD = 64
_AHEAD_S = 0.002
"""Most requests, and most seconds of work, that wait in a replica for the thread of quick blocking code."""

_SMOOTHING = 0.3
"""Weight of the newest run time in the average, unless it is longer: a slow call counts at once."""


class Capacity:
    """The slots of one replica, and how long calls occupy them."""

    def __init__(self, concurrency: int, *, is_blocking: bool) -> None:
        self.concurrency, self.is_blocking = concurrency, is_blocking
        self._run_s = 1.0
        self._call_times = CallTimePredictor()

    @property
    def is_serial(self) -> bool:
        """Whether calls run one after the other on one thread, so that their ends can be predicted."""
        return self.is_blocking and self.concurrency == 1

    def limit(self, now_s: float, *, is_busy: bool) -> int:
        """Return how many requests the replica may hold.

        With ``is_busy``, the next request may be prefetched when the running call is about to end.
        """
        if self.is_blocking and self._run_s <= SLOW_S:
            return self.concurrency + max(1, min(_MAX_AHEAD, int(_AHEAD_S / max(self._run_s, 1e-6))))
        if is_busy and self._call_times.nears_end(now_s):
            return self.concurrency + 1
        return self.concurrency

    def call_began(self, now_s: float) -> float | None:
        """Record that a serial call begins. Return when to claim the next request; None if that is not predictable."""
        return self._call_times.begin(now_s) if self._run_s > SLOW_S else None

    def record_run(self, run_s: float, *, is_streaming: bool) -> None:
        """Record that a call took ``run_s``."""
        self._run_s = max(run_s, (1 - _SMOOTHING) * self._run_s + _SMOOTHING * run_s)
        if self.is_serial:
            # A stream may run on the loop and leave the thread free, but no other call may begin there yet.
            self._call_times.end(math.inf if is_streaming else run_s)

    def record_overrun(self) -> float:
        """Record that the running call is slow, and return the run time that is assumed from now on, in seconds."""
        self._run_s = max(self._run_s, 2 * SLOW_S)
        return self._run_s

    def patience_s(self, now_s: float, unpredictable_s: float) -> float:
        """Return how long a request may still wait for a slot; ``unpredictable_s`` if the end is unpredictable."""
        return self._call_times.patience_s(now_s, unpredictable_s=unpredictable_s)
