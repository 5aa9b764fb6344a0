"""Load shedding: skips requests that would miss their deadline while they run.

When requests expire in the queue, the oldest live request is about to expire as well. Running it wastes a slot, and so
does every request behind it: the replica would be busy without answering any request in time. While requests expire,
this policy therefore also skips those whose remaining time is shorter than a typical run.
"""

from __future__ import annotations

_OVERLOAD_S = 1.0
"""How long the backend counts as overloaded after a request expired."""

_RUN_TIME_MARGIN = 1.5
"""Assume that a request may run this many times as long as the average."""

_REPLY_LATENCY_MS = 5.0
"""Upper bound of the time that a reply needs to reach its caller."""

_HALF_LIFE_S = 1.0
"""Half-life of the average run time while no request finishes: the skipped requests may be faster ones."""

_SMOOTHING = 0.3
"""Weight of the newest run time in the exponential moving average."""


class LoadShedding:
    """Decides for one replica whether a claimed request is worth starting. Pure: the caller passes the clock."""

    def __init__(self) -> None:
        self._average_run_ms = 0.0
        self._last_finish_s = 0.0
        self._overloaded_until_s = 0.0

    def should_start(self, left_ms: float, now_s: float) -> bool:
        """Return whether to start a request whose deadline is ``left_ms`` away."""
        if left_ms <= 0:
            self._overloaded_until_s = now_s + _OVERLOAD_S
            return False
        if now_s >= self._overloaded_until_s:
            return True
        expected_run_ms = self._average_run_ms * 0.5 ** ((now_s - self._last_finish_s) / _HALF_LIFE_S)
        if left_ms < _RUN_TIME_MARGIN * expected_run_ms + _REPLY_LATENCY_MS:
            self._overloaded_until_s = now_s + _OVERLOAD_S
            return False
        return True

    def record_finish(self, run_ms: float, left_ms: float, now_s: float) -> None:
        """Record that a request ran for ``run_ms`` and finished ``left_ms`` before its deadline."""
        self._average_run_ms = (
            (1 - _SMOOTHING) * self._average_run_ms + _SMOOTHING * run_ms if self._average_run_ms else run_ms
        )
        self._last_finish_s = now_s
        # A late finish counts as an expiry: if other replicas skip nearly expired requests, this replica may never
        # claim an expired one.
        if left_ms <= 0:
            self._overloaded_until_s = now_s + _OVERLOAD_S
