"""Stray claims: entries that are pending in this replica's name and that the replica does not hold.

They are left by a claim whose reply was lost with its connection, and would be left by a fault in the claim loop. Their
consumer is alive, so no other replica redelivers them. The replica searches for them after each reconnect, and every
few seconds.
"""

from __future__ import annotations

import asyncio
import time

from ...broker.queue.consumer_group import ConsumerGroup
from ...broker.queue.group.pending_entries import Reclaimed, RedeliveredEntry
from .consumer import Consumer

_EVERY_S = 3.0
"""Least time between two searches."""

_IDLE_MS = 2_000
"""Entries that were claimed more recently may still be on their way."""


class StrayClaims:
    """Finds stray claims and passes them to the consumer. Only for the loop of the consumer."""

    def __init__(self, consumer: Consumer, group: ConsumerGroup) -> None:
        self._consumer, self._in_progress, self._group = consumer, consumer.in_progress, group
        self._searching = asyncio.Lock()
        self._next_at_s = 0.0

    def is_search_due(self) -> bool:
        """Return whether to search now. The answer is no for the next seconds after it was yes."""
        now_s = time.monotonic()
        if now_s < self._next_at_s:
            return False
        self._next_at_s = now_s + _EVERY_S
        return True

    async def recover_fresh(self) -> None:
        """Pass the consumer the stray claims that may run at once. For after a reconnect."""
        await self._recover(0)

    async def recover(self) -> list[RedeliveredEntry]:
        """Pass the consumer the stray claims that may run at once.

        Returns the others: entries that were redelivered to this replica, which must run in quarantine.
        """
        return [entry.as_redelivered() for entry in await self._recover(_IDLE_MS) if not entry.is_fresh]

    async def _recover(self, idle_ms: int) -> list[Reclaimed]:
        """Return all stray claims after passing the fresh ones to the consumer; none if the replica drains."""
        async with self._searching:
            while True:
                with self._in_progress.recording_released() as released:
                    pending = await self._group.pending.own_refs(idle_ms)
                    lost = [ref for ref in pending if ref not in self._in_progress and ref not in released]
                    found = await self._group.pending.reclaim(lost) if lost else []
                if not self._group.acknowledger.has_waiting:
                    break
                # A refused settlement will be sent again. Its entry is still pending, and must not run again.
        found = [entry for entry in found if entry.ref not in self._in_progress and entry.ref not in released]
        fresh = [(entry.ref, entry.fields) for entry in found if entry.is_fresh]
        if self._consumer.is_draining:
            self._group.acknowledger.give_back([ref for ref, _ in fresh])
            return []
        self._consumer.hold(fresh)
        return found
