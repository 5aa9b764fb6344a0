"""Fairness between interactive requests and batch items.

Interactive requests come first. Batch items get the slots that these leave, but never less than a share of all claims
while any batch item waits. Slots come in whole numbers and often one at a time, so what the share leaves over is a
credit for the next claim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ....broker.registry.records import DEFAULTS

_MIXED_S = 1.0
"""How long the load counts as mixed after an interactive request, while batch items wait."""


@dataclass(frozen=True, slots=True)
class Fairness:
    """The slots that batch items are owed. Immutable: each claim returns the next state."""

    share: float = DEFAULTS.batch_share
    """The share of batch items in all that is claimed while any wait, 0 to 1."""
    credit: float = 0.0
    """Slots that batch items were owed and did not get; less than one after each claim that had enough items."""

    def owed(self, room: int) -> int:
        """Return how many of ``room`` slots the next claim must leave to batch items, if there are as many."""
        return min(room, math.floor(self.credit + self.share * room + _ROUNDING))

    def after(self, interactive: int, batch: int, *, waiting: bool) -> Fairness:
        """Return the state after a claim of so many of each; nothing is owed if no batch item was left ``waiting``.

        Slots beyond their share, which no interactive request wanted, are not subtracted from what they are owed.
        """
        if not waiting:
            return Fairness(self.share)
        return Fairness(self.share, max(0.0, self.credit + self.share * (interactive + batch) - batch))


_ROUNDING = 1e-9


class StreamSharing:
    """How one replica divides its claims between the two streams of its backend. Pure: the caller passes the clock."""

    def __init__(self, batch_share: float) -> None:
        self.is_active = False
        """Whether batch items were waiting at the last claim."""
        self._fairness = Fairness(batch_share)
        self._mixed_until_s = 0.0

    def set_batch_share(self, batch_share: float) -> None:
        """Set the share of batch items; the number owed to them starts from zero."""
        self._fairness = Fairness(batch_share)

    def owed(self, up_to: int) -> int:
        """Return how many of ``up_to`` slots the next claim must leave to batch items."""
        return self._fairness.owed(up_to)

    def record_claim(self, up_to: int, owed: int, interactive: int, batch: int, now_s: float) -> None:
        """Record a claim of both streams, which had room for ``up_to`` entries and owed batch items ``owed``."""
        self.is_active = interactive + batch == up_to and batch >= owed
        if interactive:
            self._mixed_until_s = now_s + _MIXED_S
        self._fairness = self._fairness.after(interactive, batch, waiting=self.is_active)

    def is_mixed(self, now_s: float) -> bool:
        """Return whether batch items wait and interactive requests come as well.

        The next interactive request then waits behind everything that was claimed before it, so nothing should be
        claimed ahead.
        """
        return self.is_active and now_s < self._mixed_until_s
