"""Redelivery: entries of replicas that died, and entries that others gave back.

An entry whose holder died is a suspect: nothing runs beside it but other suspects, and before the death that would
convict it, nothing at all. So whoever is convicted has caused that death, and what was beside it is answered.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from functools import partial
from time import monotonic

from ...broker.errors import BrokerRefused, BrokerUnavailable, WireError
from ...broker.queue.consumer_group import ConsumerGroup, RedeliveredEntry
from ...broker.wire.requests import Entry
from ...handles.errors import DeliveryLimitExceeded
from .claim import Claim
from .consumer import Consumer
from .settlement import Settlement
from .stray_claims import StrayClaims

log = logging.getLogger(__name__)

_LOOK_S = 0.5
_DROP_LETTERS_S = 60.0
_TOGETHER = 25
"""So many suspects run at once while they have deaths to spare. One by one, the hundred that async code has in progress
would keep their replica from all else for a hundred times as long as one takes.
"""


class Redelivery:
    """Finds what a consumer can take over, and has it run there."""

    def __init__(
        self, consumer: Consumer, claims: ConsumerGroup, answers: Settlement, strays: StrayClaims, backend: str
    ) -> None:
        self._consumer, self._claims, self._answers, self._backend = consumer, claims, answers, backend
        self._strays = strays
        self._own_suspects: list[RedeliveredEntry] = []
        """Redelivered entries that were adopted and then lost: still to be run."""

    async def keep_looking(self) -> None:
        """Look for them until the replica drains, at short intervals and when it is woken."""
        drop_at_s = 0.0
        while not self._consumer.draining:
            self._consumer.wake.clear()
            try:
                if monotonic() >= drop_at_s:
                    await self._claims.drop_old_letters(self._consumer.max_dead_letters)
                    drop_at_s = monotonic() + _DROP_LETTERS_S
                held = len(self._consumer.held)
                orphans, returned, own = await self._claims.look()
                if orphans:
                    await self._break_off_orphans()
                    await self._nurse()
                if self._strays.may_exist(own, held) and (redelivered := await self._strays.take_all()):
                    await self._nurse(redelivered)
                while returned and (room := self._consumer.room()) > 0 and not self._consumer.draining:
                    wanted = min(room, self._consumer.claim_size)
                    retaken = await self._claims.retake(wanted)
                    for place, fields in retaken:
                        self._consumer.take(place, fields)
                    returned = len(retaken) if len(retaken) == wanted else 0
                    self._consumer.returned = returned > 0
                    self._consumer.fill_up()
                    self._consumer.start_unstarted()
                self._consumer.returned = returned > 0
                self._consumer.ask()
            except (BrokerUnavailable, BrokerRefused) as e:
                log.debug("cannot look for orphans of %r: %s", self._backend, e)
            except Exception:  # or this replica would take over nothing any more
                log.exception("cannot take over entries of backend %r", self._backend)
            # Apart from each other, so that replicas do not all look in the same moment.
            pause_s = _LOOK_S * random.uniform(0.6, 1.0)
            waking = asyncio.ensure_future(self._consumer.wake.wait())
            try:
                await asyncio.wait([waking], timeout=pause_s)
            finally:
                waking.cancel()

    async def _break_off_orphans(self) -> None:
        """End the answers that had begun to stream when their replica died: there is nothing of them to run."""
        while (taken := await self._claims.adopt(streamed=True)) is not None:
            await self._end_orphan(taken)

    async def _end_orphan(self, taken: RedeliveredEntry) -> None:
        if (entry := await self._read(taken)) is None:
            return
        self._answers.break_off(taken.entry, entry, "its replica died")
        self._claims.forget_history(taken.entry)
        self._claims.forget_streamed(taken.entry)

    async def _nurse(self, own: Sequence[RedeliveredEntry] = ()) -> None:
        """Run all suspects that there are, those among its ``own`` first, and claim nothing meanwhile."""
        self._own_suspects = list(own)
        self._consumer.nursing = True
        try:
            while not self._consumer.draining:
                if not await self._until_alone():
                    return
                if not await self._run_some():
                    return
        finally:
            self._consumer.nursing = False
            self._consumer.start_unstarted()
            self._consumer.ask()

    async def _run_some(self) -> bool:
        """Run some of those that have deaths to spare together, or one that has none alone; False: there are none."""
        together: list[RedeliveredEntry] = []
        try:
            while len(together) < min(_TOGETHER, self._consumer.capacity) and not self._consumer.draining:
                taken = self._own_suspects.pop() if self._own_suspects else await self._claims.adopt()
                if taken is None:
                    break
                if taken.streamed:
                    await self._end_orphan(taken)
                elif taken.deliveries >= self._consumer.max_deliveries:
                    await self._convict(taken)
                elif taken.deliveries == self._consumer.max_deliveries - 1:
                    # Those that wait here in our name can spare the death that it may be.
                    await self._run([taken])
                else:
                    together.append(taken)
        except (BrokerUnavailable, BrokerRefused) as e:
            # What is in our name by now is run all the same: nobody else would look for it.
            log.debug("cannot take over more of %r: %s", self._backend, e)
        if self._consumer.draining:
            self._claims.give_back([taken.entry for taken in together])
            return False
        await self._run(together)
        return bool(together)

    async def _until_alone(self) -> bool:
        """Wait until nothing is in progress here; False if the orphans found another home meanwhile."""
        while len(self._consumer.held) > len(self._consumer.unstarted):
            self._consumer.idle.clear()
            try:
                await asyncio.wait_for(self._consumer.idle.wait(), _LOOK_S)
            except asyncio.TimeoutError:
                found_another_home = not self._own_suspects and not (await self._claims.look()).orphans
                if found_another_home or self._consumer.draining:
                    return False
        return True

    async def _run(self, suspects: list[RedeliveredEntry]) -> None:
        """Run them at once, and return when all are answered."""
        ends: list[asyncio.Event] = []
        at_hand: list[Claim] = []
        for taken in suspects:
            entry = await self._read(taken)
            if entry is None or (held := self._consumer.hold(taken.entry, entry)) is None:
                continue
            held.suspect = end = asyncio.Event()
            ends.append(end)
            if not entry.large:
                at_hand.append(held)
                continue
            await self._consumer.load_body(held)
            if taken.entry not in self._consumer.held:
                end.set()
        self._consumer.start_suspects(at_hand)
        for end in ends:
            await end.wait()
        for taken in suspects:
            self._claims.forget_history(taken.entry)

    async def _read(self, taken: RedeliveredEntry) -> Entry | None:
        """Return what was taken over; None, and it is a dead letter, if it cannot be read."""
        try:
            return Entry.of(taken.fields)
        except WireError as e:
            await self._claims.bury(taken, str(e), max_dead_letters=self._consumer.max_dead_letters)
            return None

    async def _convict(self, taken: RedeliveredEntry) -> None:
        """Tell the caller that every replica which took the request died, and put it among the dead letters."""
        if (entry := await self._read(taken)) is None:
            return
        error = DeliveryLimitExceeded(self._backend, entry.shown_id, taken.deliveries, self._consumer.max_deliveries)
        log.error("%s", error)
        tell = partial(self._answers.tell, entry, error)
        await self._claims.bury(taken, str(error), tell, max_dead_letters=self._consumer.max_dead_letters)
