"""Load shedding: skips requests that would miss their deadline while they run.

When requests expire in the queue, the oldest that has not is about to. To run it would be in vain, and so for each one
after it: the replica would be busy all the time and nobody would be answered in time. So, while requests expire, those
that would do so while they run are left as well.
"""

from __future__ import annotations

_HURRY_S = 1.0
"""Requests expire in the queue for so long after one did."""
_SHARE = 1.5
"""What a request takes may be more than the average."""
_WAY_MS = 5.0
"""What a reply needs to its caller, at most."""
_BELIEVED_S = 1.0
"""Half of the average is believed when no request has ended for so long: those that are left may be of another kind."""
_NEW = 0.3


class LoadShedding:
    """What one replica has seen lately."""

    def __init__(self) -> None:
        self._average_ms = 0.0
        self._saw_at_s = 0.0
        self._hurry_until_s = 0.0

    def are_good(self, left_ms: float, now_s: float) -> bool:
        """Say whether to start a request that has ``left_ms`` until its deadline."""
        if left_ms <= 0:
            self._hurry_until_s = now_s + _HURRY_S
            return False
        if now_s >= self._hurry_until_s:
            return True
        believed_ms = self._average_ms * 0.5 ** ((now_s - self._saw_at_s) / _BELIEVED_S)
        if left_ms < _SHARE * believed_ms + _WAY_MS:
            self._hurry_until_s = now_s + _HURRY_S
            return False
        return True

    def saw(self, run_ms: float, left_ms: float, now_s: float) -> None:
        """Learn how long a request took, and that it was answered ``left_ms`` before its deadline."""
        self._average_ms = (1 - _NEW) * self._average_ms + _NEW * run_ms if self._average_ms else run_ms
        self._saw_at_s = now_s
        # Where other replicas leave what is about to expire, we may never meet what has.
        if left_ms <= 0:
            self._hurry_until_s = now_s + _HURRY_S
