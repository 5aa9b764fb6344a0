"""Scheduling: which claims start and when, in a replica's slots.

A claim starts at once, unless user code takes batches, a quarantine is in progress, or a claim of both streams returned
more entries than there are free slots. Claims that wait behind a slow call are given back, as another replica may be
idle.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Protocol

from ...broker.queue.stats import RunStats
from ...broker.wire.replies import Reply
from ..claim import Claim
from ..executing.runner import Runner
from .batching import Batching
from .in_progress import InProgress
from .kept_claims import KeptClaims
from .policies.capacity import Capacity
from .policies.fairness import StreamSharing
from .settings import ConsumerSettings

_STUCK_S = 0.025
"""How long claims may wait for a call whose end cannot be predicted, before they are given back."""


class ReplyHandler(Protocol):
    """The interface of the consumer to its scheduler."""

    def on_reply(self, claim: Claim, reply: Reply) -> None:
        """Finish a claim whose slot is free now."""
        ...

    def finish(self, claim: Claim, reply: Reply) -> None:
        """Finish a claim of a batch. Never raises."""
        ...

    def claim(self, *, block: bool = True) -> None:
        """Claim more entries if there is room. Without ``block``, only those that wait already."""
        ...

    def give_back(self, claims: Sequence[Claim]) -> None:
        """Give claims back that have not started."""
        ...


class Scheduler:
    """Starts the claims of one replica. Only for the loop in which it is made."""

    def __init__(
        self,
        runner: Runner,
        in_progress: InProgress,
        sharing: StreamSharing,
        settings: ConsumerSettings,
        now_ms: Callable[[], float],
        replies: ReplyHandler,
        kept: KeptClaims,
    ) -> None:
        self._kept = kept
        self._runner, self._in_progress, self._sharing, self._replies = runner, in_progress, sharing, replies
        self._loop = asyncio.get_running_loop()
        self.batching = Batching(
            settings, sharing, now_ms, on_lingered=self.start_waiting, on_nearly_free=replies.claim
        )
        self.capacity = Capacity(settings.concurrency, is_blocking=settings.is_blocking)
        self.batch_size = settings.batch_size
        """Most requests in one call; 0 where user code takes one request at a time."""
        self.run_stats = RunStats()
        self.is_quarantining = False
        self.is_crowded = False
        """Whether the last claim returned more entries than there were free slots."""
        self._last_finish_s = 0.0
        self._stuck_timer: asyncio.TimerHandle | None = None
        self._near_end_timer: asyncio.TimerHandle | None = None
        """Fires shortly before the running call ends."""

    def apply(self, settings: ConsumerSettings) -> None:
        """Apply a changed configuration."""
        self.batch_size = settings.batch_size
        self.capacity.concurrency = settings.concurrency
        self.batching.apply(settings)

    def close(self) -> None:
        """Cancel the timers."""
        self.batching.close()
        for timer in (self._stuck_timer, self._near_end_timer):
            if timer is not None:
                timer.cancel()

    def room(self) -> int:
        """Return how many more claims there is room for; negative if there are more claims than slots."""
        if self.batch_size:
            return self.batching.room(len(self._in_progress.waiting))
        claims = len(self._in_progress.claims)
        if self._in_progress.delayed:
            claims -= len(self._in_progress.delayed)
        # No prefetch while batch items wait: an interactive request that arrives now would wait behind one of them.
        is_busy = claims > 0 and not self._sharing.is_active
        return self.capacity.limit(monotonic(), is_busy=is_busy) - claims

    # -- starting

    def offer(self, claim: Claim) -> None:
        """Start a claim, or let it wait for a full batch, a free slot, or the end of a quarantine."""
        if claim.quarantine_ended is None and (self.is_quarantining or self.batch_size or self.is_crowded):
            self._in_progress.waiting.append(claim)
        else:
            self._start([claim])

    def offer_again(self, claim: Claim) -> None:
        """Offer a claim for its next attempt. Unlike a new one, it was not claimed for a slot that is free."""
        if not self.batch_size and self.room() < 0:
            self.is_crowded = True
        self.offer(claim)
        self.start_waiting()

    def start_redelivered(self, claims: Sequence[Claim]) -> None:
        """Start claims of redelivered entries, in as few calls as possible."""
        size = max(1, self.batch_size)
        for start in range(0, len(claims), size):
            self._start(claims[start : start + size])

    def start_waiting(self) -> None:
        """Start waiting claims as far as possible: in batches, if user code takes batches."""
        waiting = self._in_progress.waiting
        if not waiting:
            return
        if self.is_quarantining:
            self._watch_for_slowness()
        elif self.batch_size:
            while batch := self.batching.next(waiting):
                self._start_batch(batch)
            if self.batching.holds_up(len(waiting)):
                self._watch_for_slowness()
        else:
            while waiting and (not self.is_crowded or len(waiting) + self.room() > 0):
                self._start([waiting.popleft()])
            if waiting:
                self._watch_for_slowness()
            else:
                self.is_crowded = False

    def fill_up(self) -> None:
        """Claim waiting entries for an incomplete batch that is about to start."""
        if self.batch_size and self.batching.needs_more(len(self._in_progress.waiting)):
            self._replies.claim(block=False)

    def _start(self, claims: Sequence[Claim]) -> None:
        if self.batch_size:
            self._start_batch(claims)
            return
        (claim,) = claims
        if claim.entry.keep_bytes is not None:
            self._kept.start(claims)
        claim.running = self._runner.run(claims, self._replies.on_reply)
        capacity = self.capacity
        if capacity.is_blocking:
            if self._in_progress.occupying > capacity.concurrency:
                self._watch_for_slowness()
            elif capacity.concurrency == 1:
                self._predict_end()

    def _start_batch(self, batch: Sequence[Claim]) -> None:
        run, left = self.batching.start(len(batch)), len(batch)
        done: list[tuple[Claim, Reply]] = []

        def finish_done() -> None:
            finished = done.copy()
            done.clear()
            try:
                for claim, reply in finished:
                    self._replies.finish(claim, reply)
            finally:
                if left == 0:
                    self.start_waiting()
                    self._replies.claim()

        def on_reply(claim: Claim, reply: Reply) -> None:
            nonlocal left
            left -= 1
            done.append((claim, reply))
            run.took_s = max(run.took_s, reply.run_ms / 1000)
            if left > 0:
                if len(done) == 1:
                    self._loop.call_soon(finish_done)
                return
            self.batching.end(run)
            try:
                self.fill_up()
                # The replies of this batch take longer to write than the next one to start. Code as quick as that would
                # only compete with them for the interpreter lock.
                if not self.batching.is_quick:
                    self.start_waiting()
            finally:
                finish_done()

        self.run_stats.count_batch(len(batch))
        self._kept.start(batch)
        run.call = running = self._runner.run(batch, on_reply)
        for claim in batch:
            claim.running = running

    # -- run times

    def record_run(self, claim: Claim, run_ms: float) -> None:
        """Record how long user code ran for a claim that is still in progress."""
        self.capacity.record_run(run_ms / 1000, is_streaming=claim.is_streaming)
        if not self.batch_size and self.capacity.is_serial and self._in_progress.occupying > 1:
            self._predict_end()  # of the next call, whose request was claimed before

    def record_finish(self, now_s: float) -> None:
        """Record that a slot became free, by the loop's clock."""
        self._last_finish_s = now_s

    def _predict_end(self) -> None:
        """Schedule the next claim shortly before the end of the call that begins now, if that is predictable."""
        if self._near_end_timer is not None:
            self._near_end_timer.cancel()
            self._near_end_timer = None
        now_s = monotonic()  # the loop's clock may have a resolution of only a millisecond
        if (claim_at_s := self.capacity.call_began(now_s)) is not None:
            self._near_end_timer = self._loop.call_later(claim_at_s - now_s, self._replies.claim)

    # -- giving back

    def _watch_for_slowness(self) -> None:
        """Schedule a check that no claim waits behind a slow call while another replica may be idle."""
        if self._stuck_timer is None:
            self._stuck_timer = self._loop.call_later(self._patience_s(_STUCK_S), self._on_stuck)

    def _patience_s(self, unpredictable_s: float) -> float:
        if self.batch_size:
            return self.batching.patience_s(unpredictable_s)
        return self.capacity.patience_s(monotonic(), unpredictable_s)

    def _on_stuck(self) -> None:
        self._stuck_timer = None
        if self.batch_size:
            any_wait = self.batching.holds_up(len(self._in_progress.waiting))
        else:
            any_wait = self._in_progress.occupying > self.capacity.concurrency
        if not any_wait and not self.is_quarantining:
            return
        if self._patience_s(self._last_finish_s + _STUCK_S - self._loop.time()) > 0:
            self._watch_for_slowness()
            return
        self.batching.overran(self.capacity.record_overrun())
        self.recall_unstarted()

    def recall_unstarted(self) -> None:
        """Give back all claims that have not started, those that wait for a thread included."""
        waiting = list(self._in_progress.waiting)
        self._in_progress.waiting.clear()
        self.is_crowded = False
        if waiting:
            self._replies.give_back(waiting)
        if self.capacity.is_blocking:
            for claim in list(self._in_progress.claims.values()):
                if claim.running is not None and claim.quarantine_ended is None:
                    claim.is_recalled = claim.running.recall(claim)
