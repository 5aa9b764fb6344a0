"""Claim watch: detects a claim loop that has stopped.

A healthy replica with room always has a claim in flight, and the broker answers it within seconds: with entries, with
none, or with an error. If no claim is answered for longer than that, the claim loop has stopped.
"""

from __future__ import annotations

from ....broker.transport.session import IDLE_BLOCK_MS, IDLE_STALL_S

OBSERVE_S = 0.5
"""Seconds between observations."""

STOPPED_AFTER_S = 18.0
"""A claim loop without an answer for so long has stopped: a server that does not answer is disconnected sooner."""

_LONGEST_STEP_S = 2 * OBSERVE_S
"""Longest time that one observation adds: while user code blocks the loop, answers wait to be read."""

assert STOPPED_AFTER_S > IDLE_BLOCK_MS / 1000 + IDLE_STALL_S


class ClaimWatch:
    """Measures for how long a replica could claim and had no answer. Pure: the caller passes the clock."""

    def __init__(self) -> None:
        self._answered = -1
        self._observed_at_s = 0.0
        self._stopped_s = 0.0

    @property
    def has_stopped(self) -> bool:
        """Whether the claim loop has stopped."""
        return self._stopped_s >= STOPPED_AFTER_S

    def observe(self, answered: int, could_claim: bool, now_s: float) -> None:
        """Record that ``answered`` claims have been answered by ``now_s``, and whether the replica could claim."""
        if could_claim and answered == self._answered:
            self._stopped_s += min(now_s - self._observed_at_s, _LONGEST_STEP_S)
        else:
            self._stopped_s = 0.0
        self._answered, self._observed_at_s = answered, now_s
