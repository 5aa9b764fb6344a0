"""Claim watch: for how long a replica has had room and has not claimed.

A healthy replica that has room always has a claim under way, and the broker answers that within seconds, if only with
nothing or with an error. No answer to a claim for longer than that means that the claim loop has stopped.
"""

from __future__ import annotations

from ....broker.transport.session import BLOCK_MS, STALL_S

OBSERVE_S = 0.5
"""Seconds between observations."""

STOPPED_AFTER_S = 10.0
"""A claim loop without an answer for so long has stopped: a server that does not answer is given up sooner."""

_LONGEST_STEP_S = 2 * OBSERVE_S
"""What one observation can add: while user code blocks the loop, answers wait to be read."""

assert STOPPED_AFTER_S > BLOCK_MS / 1000 + STALL_S


class ClaimWatch:
    """Measures it from observations. Pure: the caller passes the clock."""

    def __init__(self) -> None:
        self._answered = -1
        self._observed_at_s = 0.0
        self._stopped_s = 0.0

    @property
    def has_stopped(self) -> bool:
        return self._stopped_s >= STOPPED_AFTER_S

    def observe(self, answered: int, could_claim: bool, now_s: float) -> None:
        """Record that ``answered`` claims have been answered by ``now_s``, and whether the replica could claim."""
        if could_claim and answered == self._answered:
            self._stopped_s += min(now_s - self._observed_at_s, _LONGEST_STEP_S)
        else:
            self._stopped_s = 0.0
        self._answered, self._observed_at_s = answered, now_s
