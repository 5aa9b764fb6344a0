"""Just-in-time prefetch for blocking code: claims the next request shortly before the running call ends.

A replica whose calls take longer than 10 ms does not prefetch, so that no request waits behind a slow call while
another replica is idle. The price is a gap after every call: a round trip for the claim and two thread hand-overs. When
recent calls took nearly the same time, the end of the running call is predictable, and the claim is sent just early
enough to be answered at that moment. An idle replica still wins, because its claim is already waiting.

Used only for code that runs one call at a time. Concurrent calls fill each other's gaps, and a batch that is claimed
early has less time to fill up.
"""

from __future__ import annotations

from collections import deque

_SAMPLE_SIZE = 8
"""Number of consecutive calls that must agree before a prediction is made."""
_MAX_SPREAD_S = 0.002
"""Largest difference between the shortest and the longest of them."""
_MAX_CALL_S = 0.1
"""Longest call worth predicting: after longer ones the gap is a negligible share."""
_CLAIM_LEAD_S = 0.002
"""Time that a claim needs on a busy machine with a nearby broker, including the lateness of a timer."""
_TIMER_S = 0.0015
"""Largest error of a timer, early or late: uvloop's timers and clock have a resolution of 1 ms."""
assert _CLAIM_LEAD_S > _TIMER_S, "a claim must be sent before the call ends"
_MAX_OVERRUN_S = 0.005
"""A prefetched request waits this long after the predicted end of a call that overruns its longest predecessor."""


class CallTimePredictor:
    """Predicts when the running call ends from the durations of previous ones. Pure: the caller passes the clock."""

    def __init__(self) -> None:
        self._durations_s: deque[float] = deque(maxlen=_SAMPLE_SIZE)
        self._claim_at_s = self._overdue_at_s = 0.0
        self._is_predictable = False

    def begin(self, now_s: float) -> float | None:
        """Record that a call begins. Return when to claim the next request; None if its end cannot be predicted."""
        shortest_s, longest_s = min(self._durations_s, default=0.0), max(self._durations_s, default=0.0)
        self._is_predictable = (
            len(self._durations_s) == _SAMPLE_SIZE
            and longest_s - shortest_s <= _MAX_SPREAD_S
            and longest_s <= _MAX_CALL_S
        )
        if not self._is_predictable:
            return None
        self._claim_at_s = now_s + max(0.0, shortest_s - _CLAIM_LEAD_S)
        self._overdue_at_s = now_s + longest_s + _MAX_OVERRUN_S
        return self._claim_at_s

    def end(self, run_s: float) -> None:
        """Record that the call ended after ``run_s``."""
        self._durations_s.append(run_s)
        self._is_predictable = False

    def nears_end(self, now_s: float) -> bool:
        """Return whether the running call is about to end; False if it overran, as its end is then unpredictable."""
        return self._is_predictable and self._claim_at_s - _TIMER_S <= now_s < self._overdue_at_s

    def patience_s(self, now_s: float, *, unpredictable_s: float) -> float:
        """Return how long a request may still wait for the running call; ``unpredictable_s`` without a prediction."""
        return max(0.0, self._overdue_at_s - now_s) if self._is_predictable else unpredictable_s
