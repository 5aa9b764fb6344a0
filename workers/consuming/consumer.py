"""The consumer of one replica: claims entries, has them run, replies and settles.

A request passes through its parts in this order:

1. `ClaimLoop` claims entries when there is room.
2. `EntryReader` makes a `Claim` of each and holds it in `InProgress`.
3. `Scheduler` passes the claim to the `Runner`, alone or in a batch.
4. The runner calls `Consumer.on_reply`, which passes the reply to `Settlement`, releases the claim and claims more.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial

from ...broker.queue.consumer_group import ConsumerGroup
from ...broker.queue.stats import RunStats
from ...broker.transport.connection import RedisConnection
from ...broker.wire.entry_ref import queued_ms
from ...broker.wire.keys import Keys
from ...broker.wire.replies import Reply
from ...broker.wire.requests import Entry
from ..claim import Claim
from ..executing.errors import failed_reply
from ..executing.runner import Runner
from .claim_loop import ClaimLoop
from .entry_reader import EntryReader
from .in_progress import InProgress
from .kept_claims import KeptClaims
from .policies.fairness import StreamSharing
from .policies.load_shedding import LoadShedding
from .retries import Retries
from .scheduling import Scheduler
from .settings import ConsumerSettings
from .settlement import Settlement
from .stream_sender import StreamSender

log = logging.getLogger(__name__)


class Consumer:
    """The claims of one replica, from claiming each entry to settling it. Only for the loop in which it is made.

    The runner must have started. ``scan_soon`` is set when there may be an entry to redeliver.
    """

    def __init__(
        self,
        runner: Runner,
        commands: RedisConnection,
        group: ConsumerGroup,
        settlement: Settlement,
        keys: Keys,
        backend: str,
        replica: str,
        scan_soon: asyncio.Event,
    ) -> None:
        self._runner, self._commands, self._group, self._settlement = runner, commands, group, settlement
        self._backend, self._replica = backend, replica
        self._scan_soon = scan_soon
        self._loop = asyncio.get_running_loop()
        self.settings = settings = ConsumerSettings.of(runner)
        self.in_progress = InProgress()
        self.kept = KeptClaims(commands, keys, group.replies, backend, replica, runner.config)
        self.stream_sender = StreamSender(commands, group, self.kept)
        self.retries = Retries(group.attempts, self.in_progress, runner.config, commands.now_ms)
        sharing = StreamSharing(settings.batch_share)
        self._sharing, self._load_shedding = sharing, LoadShedding()
        self._scheduler = Scheduler(runner, self.in_progress, sharing, settings, commands.now_ms, self, self.kept)
        self._reader = EntryReader(
            commands,
            group,
            settlement,
            self.in_progress,
            self._scheduler,
            self._load_shedding,
            self,
            settings,
            keys,
            backend,
            replica,
            self.kept,
            self.retries,
        )
        self._claim_loop = ClaimLoop(group, self._reader, self._scheduler, sharing, settings, backend, scan_soon)
        self._recalled: list[bytes] = []
        """Refs of the entries to give back in this loop tick."""

    @property
    def is_draining(self) -> bool:
        return self._claim_loop.is_draining

    @property
    def could_claim(self) -> bool:
        """Whether a claim should be in flight: there is room, and neither a quarantine nor draining forbids it."""
        return self._claim_loop.could_claim

    @property
    def claims_answered(self) -> int:
        """The number of claims that the broker has answered, also with no entry or with an error."""
        return self._claim_loop.claims_answered

    @property
    def claims_taken(self) -> int:
        """The number of claims that returned entries or an error."""
        return self._claim_loop.claims_taken

    @property
    def run_stats(self) -> RunStats:
        """The counters since they were last taken."""
        return self._scheduler.run_stats

    def take_run_stats(self) -> RunStats:
        """Return the counters, and start new ones."""
        run_stats, self._scheduler.run_stats = self._scheduler.run_stats, RunStats()
        return run_stats

    def reconfigure(self) -> None:
        """Apply the runner's changed configuration."""
        self.settings = settings = ConsumerSettings.of(self._runner)
        self._sharing.set_batch_share(settings.batch_share)
        self.kept.apply(self._runner.config)
        self.retries.apply(self._runner.config)
        for part in (self._scheduler, self._reader, self._claim_loop):
            part.apply(settings)
        self.claim()

    async def drain(self, timeout_s: float) -> bool:
        """Stop claiming, give back claims that have not started, and finish the others.

        Returns False if some of it was still running after ``timeout_s`` seconds.
        """
        self.stop_claiming()
        self._scheduler.recall_unstarted()
        if waiting := self.retries.cancel_all():
            self.give_back(waiting)
        return await self.in_progress.wait_until_empty(timeout_s)

    def stop_claiming(self) -> None:
        self._claim_loop.is_draining = True

    def close(self) -> None:
        """Drop all claims; streamed replies break off."""
        self._scheduler.close()
        self._reader.close()
        self._claim_loop.close()
        self.retries.close()
        self.kept.close()
        for writer in self.stream_sender.writers:
            claim = writer.claim
            if not claim.is_released:
                self._settlement.break_off(claim, "its replica was stopped")
                self.in_progress.release(claim)
            writer.stop()
        self.stream_sender.close()

    # -- claiming

    def claim(self, *, block: bool = True) -> None:
        """Claim if there is room; without ``block``, only entries that are waiting already."""
        self._claim_loop.claim(block=block)

    @property
    def returned_wait(self) -> bool:
        """Whether replicas have given back entries that no replica has claimed since, as far as is known here."""
        return self._claim_loop.returned_wait

    async def claim_returned(self) -> None:
        """Claim the entries that replicas have given back, as far as there is room.

        Raises:
            BrokerUnavailable: Redis cannot be reached.
            BrokerRefused: Redis answered with an error.
        """
        await self._claim_loop.claim_returned()

    def hold(self, entries: Sequence[tuple[bytes, list[bytes] | None]]) -> None:
        """Hold stray claims, and start as many as may start."""
        self._reader.read(entries)
        self._scheduler.start_waiting()

    @contextmanager
    def quarantine(self) -> Generator[None, None, None]:
        """Claim nothing, and start only redelivered entries."""
        self._scheduler.is_quarantining = True
        try:
            yield
        finally:
            self._scheduler.is_quarantining = False
            self._scheduler.start_waiting()
            self.claim()

    async def run_redelivered(self, entries: Sequence[tuple[bytes, Entry]]) -> None:
        """Run redelivered entries concurrently, and return when all are settled."""
        done_events: list[asyncio.Event] = []
        ready: list[Claim] = []
        for ref, entry in entries:
            claim = self._reader.hold(ref, entry, self._commands.now_ms(), self._loop.time())
            if claim is None:
                continue
            claim.quarantine_ended = done = asyncio.Event()
            done_events.append(done)
            if not entry.large:
                ready.append(claim)
                continue
            await self._reader.load_body(claim)
            if claim.is_released:
                done.set()
        self._scheduler.start_redelivered(ready)
        for done in done_events:
            await done.wait()

    # -- finishing

    def on_reply(self, claim: Claim, reply: Reply) -> None:
        """Finish a claim whose slot is free now, and claim more."""
        self.finish(claim, reply)
        try:
            if self._scheduler.is_crowded:
                self._scheduler.start_waiting()
        finally:
            self._claim_loop.claim()

    def finish(self, claim: Claim, reply: Reply) -> None:
        """Reply, settle and release the claim. Never raises."""
        if claim.is_released:
            return
        spans, claim.spans = claim.spans, None
        if spans is not None:
            spans.end_run(reply)
        try:
            self._conclude(claim, reply)
        except Exception as e:
            entry = claim.entry
            log.exception("cannot send the reply to request %s of backend %r", entry.shown_id, self._backend)
            # Reply with an error instead, which can be sent.
            failed = failed_reply(entry, e, self._replica)
            failed.queue_ms = reply.queue_ms
            if entry.keep_bytes is not None:
                self.kept.finish(claim, failed)
            else:
                if entry.caller:
                    self._settlement.reply(claim, failed)
                self._settlement.settle(claim)
            self.in_progress.release(claim)
        finally:
            if spans is not None:
                spans.end_reply()
            if claim.quarantine_ended is not None:
                claim.quarantine_ended.set()
            if self._claim_loop.returned_wait:
                self._scan_soon.set()

    def reply_early(self, claim: Claim, reply: Reply) -> None:
        """Send the reply to a request whose code goes on. `on_reply` settles it when the code has ended.

        A kept request is not replied to early: its result is stored and its entry settled in one step.
        """
        entry = claim.entry
        if entry.caller and entry.keep_bytes is None and not (claim.is_released or claim.is_replied):
            claim.is_replied = True
            reply.queue_ms = queued_ms(claim.ref, self._commands.now_ms() - reply.run_ms)
            self._settlement.reply_early(claim, reply)

    def _conclude(self, claim: Claim, reply: Reply) -> None:
        now_s = self._loop.time()
        self._scheduler.record_finish(now_s)
        was_cancelled = reply.error is not None and reply.error["kind"] == "RequestCancelled"
        if was_cancelled and claim.is_recalled:
            self.in_progress.release(claim)
            self._give_back_together(claim.ref)
            return
        # An application may respond with an error of its own to the exception that is retried.
        has_failed = claim.retry is not None and (reply.error is not None or reply.status >= 500)
        if has_failed and (due_ms := self.retries.next_due_ms(claim)):
            self._record_run(claim, reply, now_s, is_retried=True)
            self._try_again(claim, due_ms)
            return
        if not was_cancelled:
            self._record_run(claim, reply, now_s)
            if claim.entry.caller and not claim.is_replied:
                self._settlement.reply(claim, reply)
        if claim.entry.keep_bytes is None:
            self._settlement.settle(claim)
        else:
            self.kept.finish(claim, reply)
        if claim.entry.attempts:
            self.retries.forget(claim)
        self.in_progress.release(claim)
        if claim.is_streaming:
            self._commands.join_write(partial(self.stream_sender.end, claim))
        if not self.in_progress.claims:
            self._commands.flush_if_idle()

    def _try_again(self, claim: Claim, due_ms: int) -> None:
        """Free the slot of a claim until its next attempt; if this replica drains, let another one make that."""
        done = claim.quarantine_ended
        self.retries.begin(claim, due_ms)
        if self.is_draining:
            self.in_progress.release(claim)
            self._give_back_together(claim.ref)
        else:
            self.retries.wait(claim, self._reader.start_again)
        if done is not None:
            done.set()

    def _record_run(self, claim: Claim, reply: Reply, now_s: float, *, is_retried: bool = False) -> None:
        run_ms, deadline_ms = reply.run_ms, claim.entry.header.deadline_ms
        self._scheduler.record_run(claim, run_ms)
        now_ms = self._commands.now_ms()
        queue_ms = reply.queue_ms = queued_ms(claim.ref, now_ms - run_ms)
        left_ms = deadline_ms - now_ms if deadline_ms else math.inf
        self._load_shedding.record_finish(run_ms, left_ms, now_s)
        run_stats = self._scheduler.run_stats
        if is_retried:
            run_stats.retried += 1
        elif reply.error is None:
            run_stats.served += 1
        else:
            run_stats.failed += 1
        run_stats.count_times(queue_ms, run_ms)

    # -- withdrawing and giving back

    def withdraw(self, ref: bytes) -> None:
        """Drop a request that its caller withdrew: it is not started if it waits, and cancelled if it runs."""
        claim = self.in_progress.claims.get(ref)
        if claim is None:
            self.in_progress.remember_withdrawn(ref)
        elif claim.running is not None:
            claim.is_withdrawn = True
            claim.running.cancel(claim)
        elif self.retries.cancel(claim):
            self._drop_withdrawn(claim)
        elif claim in self.in_progress.waiting:
            self.in_progress.waiting.remove(claim)
            self._drop_withdrawn(claim)
            self.claim()

    def _drop_withdrawn(self, claim: Claim) -> None:
        if claim.entry.keep_bytes is None:
            self._settlement.settle(claim)
        else:
            self.kept.cancel(claim)
        self.retries.forget(claim)
        self.in_progress.release(claim)

    def give_back(self, claims: Sequence[Claim]) -> None:
        """Release claims that have not started, so that any replica may claim their entries."""
        for claim in claims:
            self.in_progress.release(claim)
        self._give_back([claim.ref for claim in claims])

    def _give_back_together(self, ref: bytes) -> None:
        """Give an entry back, in one command with others of this loop tick."""
        if not self._recalled:
            self._loop.call_soon(self._give_back_recalled)
        self._recalled.append(ref)

    def _give_back_recalled(self) -> None:
        refs, self._recalled = self._recalled, []
        self._give_back(refs)

    def _give_back(self, refs: Sequence[bytes]) -> None:
        self._group.acknowledger.give_back(refs)
        self._claim_loop.returned_wait = True
