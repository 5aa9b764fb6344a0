"""Fairness between interactive requests and batch items: a pure function and its state.

Interactive requests go first, and batch items get what they leave, but never less than a share of all that is claimed
while there are any. Room comes in whole places, often one at a time: what a share of it leaves over is a credit for the
next claim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BATCH_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Fairness:
    """What batch items have coming to them."""

    share: float = BATCH_SHARE
    """Of all that is claimed while batch items wait, 0 to 1."""
    credit: float = 0.0
    """Places that they should have had by now and had not; less than one after each claim that had enough items."""

    def owed(self, room: int) -> int:
        """Return how many of ``room`` places the next claim must leave to batch items, if there are as many."""
        return min(room, math.floor(self.credit + self.share * room + _ROUNDING))

    def after(self, interactive: int, batch: int, *, waiting: bool) -> Fairness:
        """Return what is owed after a claim of so many of each; nothing if no batch item was left ``waiting``.

        What they got beyond their share, as nobody else wanted it, is not held against them.
        """
        if not waiting:
            return Fairness(self.share)
        return Fairness(self.share, max(0.0, self.credit + self.share * (interactive + batch) - batch))


_ROUNDING = 1e-9
