"""Stray claims: entries that are pending in this replica's name and that the replica does not hold.

A claim whose reply was lost with its connection leaves them, and so would any fault in the claim loop. Their consumer
is alive, so no other replica redelivers them. They are searched for after each reconnect, and every few seconds if the
number of pending entries differs from the number of those held.
"""

from __future__ import annotations

import asyncio
import random
import time

from ...broker.queue.consumer_group import ConsumerGroup
from ...broker.queue.group.pending_entries import RedeliveredEntry
from .consumer import Consumer

_EVERY_S = (3.0, 5.0)
"""Bounds of the random time between two searches."""

_IDLE_MS = 2_000
"""What was claimed less long ago may be on its way here."""


class StrayClaims:
    """Finds stray claims and passes them to the consumer. Only for the loop of the consumer."""

    def __init__(self, consumer: Consumer, group: ConsumerGroup) -> None:
        self._consumer, self._in_progress, self._group = consumer, consumer.in_progress, group
        self._searching = asyncio.Lock()
        self._next_at_s = 0.0

    def may_exist(self, pending: int, held: int) -> bool:
        """Return whether to search now: the broker has counted ``pending`` entries when ``held`` were held."""
        now_s = time.monotonic()
        if pending == held or now_s < self._next_at_s:
            return False
        self._next_at_s = now_s + random.uniform(*_EVERY_S)
        return True

    async def take_fresh(self) -> None:
        """Pass the consumer the entries that were claimed for the first time and lost. For after a reconnect."""
        await self._take(0, redelivered=False)

    async def take_all(self) -> list[RedeliveredEntry]:
        """Pass the consumer the entries that were claimed some time ago and lost.

        Returns the entries that were redelivered to this replica: those must run in quarantine.
        """
        return await self._take(_IDLE_MS, redelivered=True)

    async def _take(self, idle_ms: int, *, redelivered: bool) -> list[RedeliveredEntry]:
        async with self._searching:
            while True:
                with self._in_progress.recording_released() as released:
                    pending = await self._group.pending.own_refs(idle_ms)
                    lost = [ref for ref in pending if ref not in self._in_progress and ref not in released]
                    found = await self._group.pending.reclaim(lost) if lost else []
                if not self._group.acknowledger.has_waiting:
                    break
                # A settlement that was refused is to be sent again: its entry is still pending, and must not run again.
        found = [one for one in found if one.ref not in self._in_progress and one.ref not in released]
        fresh = [(one.ref, one.fields) for one in found if one.is_fresh]
        if self._consumer.is_draining:
            self._group.acknowledger.give_back([ref for ref, _ in fresh])
            return []
        self._consumer.take_over(fresh)
        return [one.as_redelivered() for one in found if not one.is_fresh] if redelivered else []
