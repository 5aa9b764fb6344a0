"""Redelivery of entries whose replica died, and of entries that other replicas gave back.

Redelivered entries run in quarantine: only other redelivered entries run at the same time. An entry whose next death
would exhaust ``max_deliveries`` runs alone, so a request that becomes a dead letter has caused its last death itself,
and the requests that ran beside it before get their replies.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from functools import partial
from time import monotonic

from ...broker.errors import BrokerRefused, BrokerUnavailable, WireError
from ...broker.queue.consumer_group import ConsumerGroup
from ...broker.queue.group.pending_entries import RedeliveredEntry
from ...broker.wire.requests import Entry
from ...handles.errors import DeliveryLimitExceeded
from ..claim import Claim
from .consumer import Consumer
from .settlement import Settlement
from .stray_claims import StrayClaims

log = logging.getLogger(__name__)

_SCAN_EVERY_S = 0.5
"""Longest time between two scans for entries to redeliver."""

_DROP_LETTERS_EVERY_S = 60.0
"""Time between two removals of old dead letters."""

_MAX_CONCURRENT = 25
"""Redelivered entries that run at once while each may die at least once more. Async code may have a hundred requests
in progress; running them one by one would keep the replica from new requests for a hundred times as long as one takes.
"""


class Redelivery:
    """Finds entries to redeliver and runs them on one consumer.

    ``scan_soon`` is set when there may be one; each scan clears it.
    """

    def __init__(
        self,
        consumer: Consumer,
        group: ConsumerGroup,
        settlement: Settlement,
        strays: StrayClaims,
        backend: str,
        scan_soon: asyncio.Event,
    ) -> None:
        self._consumer, self._in_progress = consumer, consumer.in_progress
        self._group, self._settlement, self._backend = group, settlement, backend
        self._strays, self._scan_soon = strays, scan_soon
        self._own_redelivered: list[RedeliveredEntry] = []
        """Stray claims of this replica that are redelivered entries and have not run yet."""

    async def scan_until_drained(self) -> None:
        """Scan at short intervals, and whenever ``scan_soon`` is set, until the replica drains."""
        drop_at_s = 0.0
        while not self._consumer.is_draining:
            self._scan_soon.clear()
            try:
                if monotonic() >= drop_at_s:
                    await self._group.dead_letters.drop_oldest(self._consumer.settings.max_dead_letters)
                    await self._consumer.kept.sweep()
                    drop_at_s = monotonic() + _DROP_LETTERS_EVERY_S
                held = len(self._in_progress)
                expired, returned, pending = await self._group.pending.count()
                if expired:
                    await self._break_off_streams()
                    await self._run_in_quarantine()
                if self._strays.may_exist(pending, held) and (own := await self._strays.recover()):
                    await self._run_in_quarantine(own)
                await self._consumer.claim_returned(returned)
            except (BrokerUnavailable, BrokerRefused) as e:
                log.debug("cannot scan for expired consumers of backend %r: %s", self._backend, e)
            except Exception:  # an escaping error would end redelivery on this replica
                log.exception("cannot redeliver entries of backend %r", self._backend)
            # Random, so that the replicas do not all scan at the same moment.
            pause_s = _SCAN_EVERY_S * random.uniform(0.6, 1.0)
            waking = asyncio.ensure_future(self._scan_soon.wait())
            try:
                await asyncio.wait([waking], timeout=pause_s)
            finally:
                waking.cancel()

    async def _break_off_streams(self) -> None:
        """Break off the streamed replies of dead replicas. They cannot be continued, so nothing runs again."""
        while (redelivered := await self._group.pending.claim_redelivered(streamed=True)) is not None:
            await self._break_off_stream(redelivered)

    async def _break_off_stream(self, redelivered: RedeliveredEntry) -> None:
        if (entry := await self._read(redelivered)) is None:
            return
        self._settlement.break_off(Claim(redelivered.ref, entry), "its replica died")
        self._group.pending.forget_history(redelivered.ref)
        self._group.replies.forget_streamed(redelivered.ref)

    async def _run_in_quarantine(self, own: Sequence[RedeliveredEntry] = ()) -> None:
        """Run redelivered entries in isolation until none is left, ``own`` first; claim nothing meanwhile."""
        self._own_redelivered = list(own)
        with self._consumer.quarantine():
            while not self._consumer.is_draining:
                if not await self._wait_until_alone():
                    return
                if not await self._run_next():
                    return

    async def _run_next(self) -> bool:
        """Run the next redelivered entries: several that may die again together, or one on its last delivery alone.

        Returns False if no entry is left or the replica drains.
        """
        settings = self._consumer.settings
        together: list[RedeliveredEntry] = []
        try:
            while len(together) < min(_MAX_CONCURRENT, settings.capacity) and not self._consumer.is_draining:
                redelivered = (
                    self._own_redelivered.pop()
                    if self._own_redelivered
                    else await self._group.pending.claim_redelivered()
                )
                if redelivered is None:
                    break
                if redelivered.streamed:
                    await self._break_off_stream(redelivered)
                elif redelivered.deliveries >= settings.max_deliveries:
                    await self._reject_poison_request(redelivered)
                elif redelivered.deliveries == settings.max_deliveries - 1:
                    # Entries in `together` wait meanwhile, pending: they can afford another death of this replica.
                    await self._run([redelivered])
                else:
                    together.append(redelivered)
        except (BrokerUnavailable, BrokerRefused) as e:
            # Run the entries that were claimed before: no other replica redelivers them while this one is alive.
            log.debug("cannot redeliver more entries of backend %r: %s", self._backend, e)
        if self._consumer.is_draining:
            self._group.acknowledger.give_back([redelivered.ref for redelivered in together])
            return False
        await self._run(together)
        return bool(together)

    async def _wait_until_alone(self) -> bool:
        """Wait until no request runs here.

        Returns False if other replicas redelivered all entries meanwhile, or this replica drains.
        """
        while self._in_progress.any_started:
            if not await self._in_progress.wait_until_empty(_SCAN_EVERY_S):
                none_left = not self._own_redelivered and not (await self._group.pending.count()).expired
                if none_left or self._consumer.is_draining:
                    return False
        return True

    async def _run(self, redelivered: Sequence[RedeliveredEntry]) -> None:
        """Run the entries concurrently, and return when all are settled."""
        self._consumer.run_stats.redelivered += len(redelivered)
        read = [(claimed.ref, await self._read(claimed)) for claimed in redelivered]
        await self._consumer.run_redelivered([(ref, entry) for ref, entry in read if entry is not None])
        for claimed in redelivered:
            if claimed.ref not in self._in_progress:  # else it waits for its next attempt
                self._group.pending.forget_history(claimed.ref)

    async def _read(self, redelivered: RedeliveredEntry) -> Entry | None:
        """Return the decoded entry. One that cannot be read becomes a dead letter, and the result is None."""
        try:
            return Entry.of(redelivered.fields)
        except WireError as e:
            await self._group.dead_letters.add(
                redelivered, str(e), max_dead_letters=self._consumer.settings.max_dead_letters
            )
            return None

    async def _reject_poison_request(self, redelivered: RedeliveredEntry) -> None:
        """Make a dead letter of a poison request, and reply with `DeliveryLimitExceeded`."""
        if (entry := await self._read(redelivered)) is None:
            return
        settings = self._consumer.settings
        error = DeliveryLimitExceeded(self._backend, entry.shown_id, redelivered.deliveries, settings.max_deliveries)
        log.error("%s", error)
        refuser = self._settlement if entry.keep_bytes is None else self._consumer.kept
        refuse = partial(refuser.refuse, Claim(redelivered.ref, entry), error)
        await self._group.dead_letters.add(
            redelivered, str(error), refuse, reason="poison", max_dead_letters=settings.max_dead_letters
        )
        if entry.attempts:
            self._group.attempts.forget(redelivered.ref)
