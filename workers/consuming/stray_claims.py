"""Stray claims: entries that are pending in this replica's name and that the replica does not hold.

They are left by a claim whose reply was lost with its connection, and would be left by a fault in the claim loop. Their
consumer is alive, so no other replica redelivers them. The replica searches for them after each reconnect, and every
few seconds. An idle replica has no new ones, so it searches more seldom.
"""

from __future__ import annotations

import asyncio
import time

from ...broker.queue.consumer_group import ConsumerGroup
from ...broker.queue.group.pending_entries import Reclaimed, RedeliveredEntry
from .consumer import Consumer

_EVERY_S = 3.0
"""Least time between two searches."""

_IDLE_EVERY_S = 30.0
"""Time between two searches of a replica that has claimed nothing since one that found nothing pending."""

_IDLE_MS = 2_000
"""Entries that were claimed more recently may still be on their way."""
assert _EVERY_S > _IDLE_MS / 1000, "what was claimed before the last search is old enough for this one"


class StrayClaims:
    """Finds stray claims and passes them to the consumer. Only for the loop of the consumer."""

    def __init__(self, consumer: Consumer, group: ConsumerGroup) -> None:
        self._consumer, self._in_progress, self._group = consumer, consumer.in_progress, group
        self._searching = asyncio.Lock()
        self._next_at_s = self._idle_until_s = 0.0
        self._taken = -1
        """How many claims had been taken at the last search; -1 if others may have left stray claims since."""
        self._is_idle = False
        """Whether nothing was claimed between the last two searches, so that the last one saw all that is pending."""

    def is_search_due(self) -> bool:
        """Return whether to search now. The answer is no for the next seconds after it was yes."""
        now_s = time.monotonic()
        if now_s < self._next_at_s:
            return False
        taken, self._taken = self._taken, self._consumer.claims_taken
        if taken == self._taken and now_s < self._idle_until_s:
            return False
        self._is_idle = taken == self._taken
        self._idle_until_s = 0.0  # until a search has found nothing
        self._next_at_s = now_s + _EVERY_S
        return True

    def note_other_claims(self) -> None:
        """Note that this replica has claimed entries of others, whose claims are not counted."""
        self._taken, self._idle_until_s = -1, 0.0

    async def recover_fresh(self) -> None:
        """Pass the consumer the stray claims that may run at once. For after a reconnect."""
        await self._recover(0)

    async def recover(self) -> list[RedeliveredEntry]:
        """Pass the consumer the stray claims that may run at once.

        Returns the others: entries that were redelivered to this replica, which must run in quarantine.
        """
        return [entry.as_redelivered() for entry in await self._recover(_IDLE_MS) if not entry.is_fresh]

    def _note_none_pending(self) -> None:
        if self._is_idle and self._taken == self._consumer.claims_taken:
            self._idle_until_s = time.monotonic() + _IDLE_EVERY_S

    async def _recover(self, idle_ms: int) -> list[Reclaimed]:
        """Return all stray claims after passing the fresh ones to the consumer; none if the replica drains."""
        async with self._searching:
            while True:
                with self._in_progress.recording_released() as released:
                    pending = await self._group.pending.own_refs(idle_ms)
                    if idle_ms and not pending:
                        self._note_none_pending()
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
