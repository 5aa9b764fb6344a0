"""Just-in-time prefetch for blocking code: claims the next request shortly before the running call ends.

Blocking code whose calls take over 10 ms has nothing waiting for it, so that nobody waits behind a slow call while a
replica is idle. But then, after each call, its thread waits for a claim to be written and answered and for two
hand-overs between threads. Where calls take about as long as each other, the claim goes out so early that it is
answered when the call ends, and no earlier: which replica gets a request is still decided when one has room for it.
Replicas that are idle have asked before, and are served first.

This is for code that runs one call at a time. Of several at once each has the others to fill its gap with, and a batch
that was asked for early would be one that had less time to fill up.
"""

from __future__ import annotations

from collections import deque

_CALLS = 8
"""So many in a row must have been alike."""
_ALIKE_S = 0.002
"""They are, if the shortest and the longest are no further apart."""
_SHORT_S = 0.1
"""Of a longer call the gap behind it is too small a share to be worth anybody's waiting."""
_LEAD_S = 0.002
"""What a claim takes on a busy machine with the broker at hand, and what a timer may be late by."""
_TIMER_S = 0.0015
"""Timers may go off so much too soon, or too late: uvloop's are of whole milliseconds, by a clock of such."""
assert _LEAD_S > _TIMER_S, "a claim that goes out after the end of the call is no use"
_PATIENCE_S = 0.005
"""After the time of the longest call, whoever waits behind one that has not ended waits so long and no longer."""


class CallTimePredictor:
    """What one replica knows of how long its calls take, and so of the one that runs."""

    def __init__(self) -> None:
        self._took_s: deque[float] = deque(maxlen=_CALLS)
        self._ask_at_s = self._late_at_s = 0.0
        self._foreseen = False

    def begin(self, now_s: float) -> float | None:
        """Hear that a call begins. Return when to ask for the next request; None if that is to wait for its end."""
        shortest_s, longest_s = min(self._took_s, default=0.0), max(self._took_s, default=0.0)
        self._foreseen = len(self._took_s) == _CALLS and longest_s - shortest_s <= _ALIKE_S and longest_s <= _SHORT_S
        if not self._foreseen:
            return None
        self._ask_at_s = now_s + max(0.0, shortest_s - _LEAD_S)
        self._late_at_s = now_s + longest_s + _PATIENCE_S
        return self._ask_at_s

    def end(self, run_s: float) -> None:
        """Hear that the call has ended, and how long it took."""
        self._took_s.append(run_s)
        self._foreseen = False

    def nears_end(self, now_s: float) -> bool:
        """Say whether the running call will end in the next moment: if it is late, nobody knows when it will."""
        return self._foreseen and self._ask_at_s - _TIMER_S <= now_s < self._late_at_s

    def patience_s(self, now_s: float, *, unforeseen: float) -> float:
        """Return how long one may still wait behind the running call; ``unforeseen``, if its end was not foreseen."""
        return max(0.0, self._late_at_s - now_s) if self._foreseen else unforeseen
