"""Redelivery of entries whose replica died, and of entries that other replicas gave back.

Redelivered entries run in quarantine: only other redelivered entries run at the same time. An entry whose next death
would exhaust ``max_deliveries`` runs alone, so a request that becomes a dead letter has caused its last death itself,
and the requests that ran beside it before get their replies.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from time import monotonic

from ...broker.errors import BrokerRefused, BrokerUnavailable, WireError
from ...broker.queue.consumer_group import ConsumerGroup
from ...broker.queue.group.pending_entries import RedeliveredEntry
from ...broker.queue.signals import ENTRIES_RETURNED, died
from ...broker.transport.clock import on_grid
from ...broker.wire.requests import Entry
from ...handles.errors import DeliveryLimitExceeded
from ..claim import Claim
from .consumer import Consumer
from .settlement import Settlement
from .stray_claims import StrayClaims

log = logging.getLogger(__name__)

_SCAN_EVERY_S = (3.0, 5.0)
"""Bounds of the random time between two searches for stray claims. Nothing else depends on it."""

_RECOUNT_EVERY_S = 0.5
"""Time between two looks at whether other replicas have redelivered all entries meanwhile."""

_TELL_RETURNED_EVERY_S = 2.0
"""Least time between two signals of a replica without room that entries given back by others still wait."""

_RETRY_S = 0.5

_TIDY_EVERY_S = 60.0
"""Time between two attempts of one replica to delete dead consumers."""

_DROP_LETTERS_EVERY_S = 60.0
"""Time between two removals of old dead letters."""

_MAX_CONCURRENT = 25
"""Redelivered entries that run at once while each may die at least once more. Async code may have a hundred requests
in progress; running them one by one would keep the replica from new requests for a hundred times as long as one takes.
"""


class Redelivery:
    """Finds entries to redeliver and runs them on one consumer.

    The replicas of a backend take turns to look for dead ones (`ReplicaLease`); a signal sends what one of them finds
    to the others. ``scan_soon`` is set when there may be something to do here; each scan clears it.
    """

    def __init__(
        self,
        consumer: Consumer,
        group: ConsumerGroup,
        settlement: Settlement,
        strays: StrayClaims,
        backend: str,
        scan_soon: asyncio.Event,
        send: Callable[[bytes], None],
        now_ms: Callable[[], float],
    ) -> None:
        """``send`` sends a signal to all replicas of the backend, ``now_ms`` is the broker's clock."""
        self._consumer, self._in_progress = consumer, consumer.in_progress
        self._group, self._settlement, self._backend = group, settlement, backend
        self._strays, self._scan_soon, self._send, self._now_ms = strays, scan_soon, send, now_ms
        self._dead: dict[bytes, None] = {}
        """Replicas that may have died and left entries, oldest first."""
        self._may_have_returned = True
        """Whether replicas may have given back entries: also before this replica received signals."""
        self._tell_returned_at_s = 0.0
        self._sweeping: asyncio.Task[None] | None = None
        self._tidy_at_s = monotonic() + random.uniform(0.0, _TIDY_EVERY_S)
        self._own_redelivered: list[RedeliveredEntry] = []
        """Stray claims of this replica that are redelivered entries and have not run yet."""

    @property
    def is_looking(self) -> bool:
        """Whether a look for dead replicas is in progress."""
        return self._sweeping is not None and not self._sweeping.done()

    def take_turn(self) -> None:
        """Look for dead replicas: it is this replica's turn.

        Not in the scan, which may take as long as a redelivered entry runs: the others depend on what is found.
        """
        if not self.is_looking:
            self._sweeping = asyncio.get_running_loop().create_task(self._sweep(), name="sweep")

    def close(self) -> None:
        """Cancel what runs beside the scan."""
        if self._sweeping is not None:
            self._sweeping.cancel()

    def note_dead(self, replicas: Iterable[bytes]) -> None:
        """Note that replicas have died and left entries, as another replica has found."""
        self._dead.update(dict.fromkeys(replicas))
        self._scan_soon.set()

    def note_returned(self) -> None:
        """Note that entries were given back."""
        self._may_have_returned = True
        self._scan_soon.set()

    async def scan_until_drained(self) -> None:
        """Scan whenever ``scan_soon`` is set, and every few seconds, until the replica drains."""
        drop_at_s = 0.0
        while not self._consumer.is_draining:
            self._scan_soon.clear()
            # Random, so that the replicas do not all scan at the same moment, but some do.
            pause_s = on_grid(random.uniform(*_SCAN_EVERY_S), self._now_ms())
            try:
                if monotonic() >= drop_at_s:
                    await self._group.dead_letters.drop_oldest(self._consumer.settings.max_dead_letters)
                    await self._consumer.kept.sweep()
                    drop_at_s = monotonic() + _DROP_LETTERS_EVERY_S
                if self._dead:
                    self._strays.note_other_claims()
                    await self._redeliver()
                if self._strays.is_search_due() and (own := await self._strays.recover()):
                    await self._run_in_quarantine(own)
                if self._may_have_returned or self._consumer.returned_wait:
                    self._may_have_returned = False
                    self._strays.note_other_claims()
                    await self._consumer.claim_returned()
                self._consumer.claim()
            except (BrokerUnavailable, BrokerRefused) as e:
                pause_s = _RETRY_S
                log.debug("cannot scan for expired consumers of backend %r: %s", self._backend, e)
            except Exception:  # an escaping error would end redelivery on this replica
                log.exception("cannot redeliver entries of backend %r", self._backend)
            waking = asyncio.ensure_future(self._scan_soon.wait())
            try:
                await asyncio.wait([waking], timeout=pause_s)
            finally:
                waking.cancel()

    async def _sweep(self) -> None:
        """Look for dead replicas, and send the names of those that have left entries to the others."""
        try:
            if monotonic() >= self._tidy_at_s:
                self._tidy_at_s = monotonic() + _TIDY_EVERY_S
                await self._group.pending.tidy()
            dead, has_returned = await self._group.pending.sweep()
        except (BrokerUnavailable, BrokerRefused) as e:
            log.debug("cannot look for dead replicas of backend %r: %s", self._backend, e)
            return
        if dead:
            self._send(died(dead))
            self.note_dead(dead)
        if has_returned:
            self.note_returned()
            if not self._consumer.could_claim and monotonic() >= self._tell_returned_at_s:
                self._tell_returned_at_s = monotonic() + _TELL_RETURNED_EVERY_S
                self._send(ENTRIES_RETURNED)

    async def _redeliver(self) -> None:
        """Redeliver the entries of dead replicas, as far as there are any left."""
        try:
            if await self._group.pending.are_left(self._dead):
                await self._break_off_streams()
                await self._run_in_quarantine()
        finally:
            # Whatever is left is found again at the next turn.
            self._dead.clear()

    async def _break_off_streams(self) -> None:
        """Break off the streamed replies of dead replicas. They cannot be continued, so nothing runs again."""
        pending = self._group.pending
        while (redelivered := await pending.claim_redelivered(self._dead, streamed=True)) is not None:
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
                    else await self._group.pending.claim_redelivered(self._dead)
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
            if not await self._in_progress.wait_until_empty(_RECOUNT_EVERY_S):
                none_left = not self._own_redelivered and not await self._group.pending.are_left(self._dead)
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
