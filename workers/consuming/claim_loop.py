"""Claim loop: claims entries whenever the replica has room, at most one claim at a time.

Claims are small and overlap with running calls, so that a slow request never holds up others while a replica is idle.
The broker's reply to a claim is a continuation of the connection's read, not a task: a small request causes no task
switch but those of user code.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from time import monotonic
from typing import Any

from ...broker.errors import BrokerRefused, BrokerUnavailable
from ...broker.queue.consumer_group import ConsumerGroup
from ...broker.wire.entry_ref import is_batch
from .entry_reader import EntryReader
from .policies.fairness import StreamSharing
from .scheduling import Scheduler
from .settings import ConsumerSettings

log = logging.getLogger(__name__)

_CLAIM = 16
"""Usual size of a claim. Larger ones make convoys: 8 to 16 were 15 to 20 % faster at 100 connections than 100."""

_MAX_CLAIM = 64
"""Largest size. A claim that came back full is followed by one twice as large, up to this: with 1,000 requests in
flight, 64 at a time saved a sixth of the CPU per request of replica, broker and caller, and a third for blocking code.
"""

_RETRY_S = 0.2


class ClaimLoop:
    """Claims entries for one replica. Only for the loop in which it is made.

    ``scan_soon`` is set when there is room and other replicas have given back entries: these are older than unclaimed
    ones, and redelivery claims them.
    """

    def __init__(
        self,
        group: ConsumerGroup,
        reader: EntryReader,
        scheduler: Scheduler,
        sharing: StreamSharing,
        settings: ConsumerSettings,
        backend: str,
        scan_soon: asyncio.Event,
    ) -> None:
        self._group, self._reader, self._scheduler, self._sharing = group, reader, scheduler, sharing
        self._backend = backend
        self._scan_soon = scan_soon
        self._loop = asyncio.get_running_loop()
        self._max_size = self._next_size = max(_CLAIM, settings.batch_size)
        self._is_claiming = False
        self._retry: asyncio.Task[None] | None = None
        self.is_draining = False
        self.claims_answered = 0
        """The number of claims that the broker has answered, also with no entry or with an error."""
        self.claims_taken = 0
        """The number of claims that returned entries or an error: entries of this replica may be pending since."""
        self.returned_wait = False
        """Whether replicas have given back entries that no replica has claimed since, as far as is known here."""

    @property
    def could_claim(self) -> bool:
        """Whether a claim should be in flight: there is room, and neither a quarantine nor draining forbids it."""
        scheduler = self._scheduler
        if scheduler.is_quarantining or self.is_draining or (scheduler.batch_size and scheduler.batching.is_busy):
            return False
        return scheduler.room() > 0

    def apply(self, settings: ConsumerSettings) -> None:
        """Apply a changed configuration."""
        self._max_size = self._next_size = max(_CLAIM, settings.batch_size)

    def close(self) -> None:
        """Stop retrying."""
        if self._retry is not None:
            self._retry.cancel()

    def claim(self, *, block: bool = True) -> None:
        """Claim if there is room; without ``block``, only entries that are waiting already."""
        scheduler = self._scheduler
        if self._is_claiming or scheduler.is_quarantining or self.is_draining:
            return
        if (room := scheduler.room()) <= 0:
            return
        if self.returned_wait:
            self._scan_soon.set()
            return
        self._is_claiming = True
        is_sharing = self._sharing.is_active
        up_to = min(room, self._max_size if is_sharing else self._next_size)
        if scheduler.batch_size:
            block = block and scheduler.batching.may_block
            if is_sharing or not block:
                scheduler.batching.fetch_began(up_to)
        if is_sharing:
            owed = self._sharing.owed(up_to)
            self._group.claimer.claim_shared(up_to, owed, partial(self._on_claimed_shared, up_to, owed))
        else:
            self._group.claimer.claim(up_to, partial(self._on_claimed, up_to), block=block)

    async def claim_returned(self) -> None:
        """Claim the entries that replicas have given back, as far as there is room.

        Raises:
            BrokerUnavailable: Redis cannot be reached.
            BrokerRefused: Redis answered with an error.
        """
        scheduler = self._scheduler
        self.returned_wait = True
        while self.returned_wait and (room := scheduler.room()) > 0 and not self.is_draining:
            up_to = min(room, self._max_size)
            entries = await self._group.claimer.claim_returned(up_to)
            self._reader.read(entries)
            self.returned_wait = len(entries) == up_to
            scheduler.fill_up()
            scheduler.start_waiting()
        self.claim()

    def _on_claimed(self, up_to: int, result: Any) -> None:
        room = None
        try:
            self._next_size = self._max_size
            if not self._scheduler.batch_size and not isinstance(result, Exception) and len(result) >= up_to:
                self._next_size = min(max(2 * up_to, _CLAIM), _MAX_CLAIM)
            if result and not isinstance(result, Exception) and is_batch(result[-1][0]):
                # Each stream may have returned ``up_to`` entries. Interactive requests come first.
                self._sharing.is_active = True
                if not self._scheduler.batch_size:
                    room = max(0, self._scheduler.room())
        finally:
            self._receive(result, room)

    def _on_claimed_shared(self, up_to: int, owed: int, result: Any) -> None:
        try:
            if isinstance(result, Exception):
                self._sharing.is_active = False
            else:
                batch = sum(is_batch(ref) for ref, _ in result)
                self._sharing.record_claim(up_to, owed, len(result) - batch, batch, monotonic())
        finally:
            self._receive(result, None)

    def _receive(self, result: Any, room: int | None) -> None:
        """Hold all entries of a claim, and start as many as there is ``room`` for; all of them if it is None."""
        self._is_claiming = False
        self.claims_answered += 1
        if result:
            self.claims_taken += 1
        scheduler = self._scheduler
        if isinstance(result, Exception):
            if self.is_draining:
                return
            self._is_claiming = True  # until the retry
            self._retry = self._loop.create_task(self._retry_claim(result))
            scheduler.batching.fetch_ended(0)
            scheduler.start_waiting()
            return
        if self.is_draining:  # the claim was sent before
            if result:
                self._group.acknowledger.give_back([ref for ref, _ in result])
            return
        try:
            if room is not None and room < len(result):
                self._reader.read(result[:room])
                scheduler.is_crowded = True
                self._reader.read(result[room:])
            else:
                self._reader.read(result)
            scheduler.batching.fetch_ended(len(result))
            scheduler.start_waiting()
        finally:
            if len(result) == 1:
                # After the reply of a quick call, which its caller is waiting for: one write then carries both.
                self._loop.call_soon(self.claim)
            else:
                self.claim()

    async def _retry_claim(self, error: Exception) -> None:
        if isinstance(error, BrokerRefused) and error.message.startswith("NOGROUP"):
            log.warning("the consumer group of backend %r is gone: creating it again", self._backend)
        elif not isinstance(error, BrokerUnavailable):
            log.error("cannot claim from backend %r: %s", self._backend, error)
        try:
            await asyncio.sleep(_RETRY_S)
            await self._group.ensure()
        except (BrokerUnavailable, BrokerRefused) as e:
            log.debug("cannot create the consumer group of backend %r: %s", self._backend, e)
        finally:
            self._is_claiming = False
            self.claim()
