"""Batching: the size of batches, how many run at once, and how long an incomplete one waits."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from time import monotonic

from ..claim import Claim
from .policies.batch_capacity import BatchCapacity, BatchRun
from .policies.fairness import StreamSharing
from .settings import ConsumerSettings

_QUICK_S = 0.002
"""While batches are this short, the next one is always claimed ahead: no request waits longer than this for a slot."""
_AVERAGE_WEIGHT = 0.7
"""Weight of the average run time against that of one more request."""
_MIXED_BATCH_SIZE = 8
"""Size of quick batches while the load is mixed: they cost the work around each item. With 8 instead of 16, the 99th
percentile of HTTP requests beside no-op items was 3.7 ms instead of 4.6 ms, at two thirds of the items per second.
"""


class Batching:
    """Assembles the batches of one replica from its claims. Only for the loop in which they run.

    Args:
        settings: the present settings.
        sharing: whether the load is mixed. If it is, nothing is claimed ahead.
        now_ms: Unix time in milliseconds by the broker's clock.
        on_lingered: called when an incomplete batch has waited long enough for more requests.
        on_nearly_free: called when a batch is about to end, so that the next one can be claimed.
    """

    def __init__(
        self,
        settings: ConsumerSettings,
        sharing: StreamSharing,
        now_ms: Callable[[], float],
        *,
        on_lingered: Callable[[], None],
        on_nearly_free: Callable[[], None],
    ) -> None:
        self._settings, self._sharing, self._now_ms = settings, sharing, now_ms
        self._on_lingered, self._on_nearly_free = on_lingered, on_nearly_free
        self._capacity = BatchCapacity(settings.concurrency)
        self.loading: set[Claim] = set()
        """Claims whose large bodies are being fetched."""
        self._awaited: set[Claim] | None = None
        """The claims among them that an incomplete batch waits for."""
        self._run_s = 1.0
        """Average run time of a call, in which a slow call counts at once and a quick one slowly."""
        self._is_fetching, self._wanted = False, 0
        """Whether a claim that does not block is in flight, and for how many entries."""
        self._fetch_began_s: float | None = None
        self._found_too_few = False
        """Whether the last claim that did not block found fewer entries than there was room for."""
        self._linger: asyncio.TimerHandle | None = None
        self._lingered = False
        self._nearly_free: asyncio.TimerHandle | None = None

    def apply(self, settings: ConsumerSettings) -> None:
        """Apply a changed configuration."""
        self._settings = settings
        self._capacity.resize(settings.concurrency, monotonic())

    def close(self) -> None:
        """Cancel the timers."""
        self._stop_lingering()
        self._stop_watching()

    # -- claiming

    @property
    def is_busy(self) -> bool:
        """Whether all slots are occupied, so that new claims must wait for the end of a batch."""
        return self._capacity.free <= 0

    @property
    def is_quick(self) -> bool:
        """Whether calls are so short that the next batch is always claimed ahead."""
        return self._run_s <= _QUICK_S

    @property
    def may_block(self) -> bool:
        """Whether the next claim may wait at the broker until a request is published.

        A claim made while no slot is free must not: it would get a request that an idle replica could start.
        """
        return not self.is_busy or self.is_quick

    def room(self, waiting: int) -> int:
        """Return how many more requests to claim when ``waiting`` claims are in no batch yet."""
        size = self._settings.batch_size
        if self.is_quick and not self._settings.batch_wait_s and self._sharing.is_mixed(monotonic()):
            size = min(size, _MIXED_BATCH_SIZE)
        slots = self._capacity.free
        if slots <= 0:
            slots = self._slots_ahead()
            if self._found_too_few and not self.may_block:
                return 0
        return slots * size - waiting - len(self.loading)

    def needs_more(self, waiting: int) -> bool:
        """Return whether to claim more requests before the next batch starts with the ``waiting`` claims."""
        return 0 < waiting < self._settings.batch_size and not self.is_quick and not self._sharing.is_mixed(monotonic())

    def fetch_began(self, up_to: int) -> None:
        """Record that a claim was sent which does not block: an incomplete batch waits for its result."""
        self._is_fetching, self._wanted, self._fetch_began_s = True, up_to, monotonic()

    def fetch_ended(self, claimed: int) -> None:
        """Record that a claim returned ``claimed`` entries. Has no effect if it was one that may block."""
        if not self._is_fetching:
            return
        self._is_fetching, self._found_too_few = False, claimed < self._wanted
        if 2 * claimed < self._settings.batch_size:
            self._fetch_began_s = None  # too few for a measurement
        self._measure_fetch()

    def loaded(self, claim: Claim) -> None:
        """Record that the body of a claim was fetched, or that it cannot be."""
        self.loading.discard(claim)
        if self._awaited is not None:
            self._awaited.discard(claim)
        self._measure_fetch()

    # -- running

    def next(self, waiting: deque[Claim]) -> list[Claim]:
        """Remove the next batch from the waiting claims and return it; it is empty if no batch should start now."""
        if not waiting:
            return []
        is_full = len(waiting) >= self._settings.batch_size
        if self._capacity.free <= 0:
            # A thread continues with the next job of its queue without a switch to the loop.
            if not (is_full and self._settings.is_blocking and not self.is_quick and self._slots_ahead() > 0):
                return []
        elif not is_full and (self._is_fetching or self._awaits_bodies() or self._lingers(waiting[0])):
            return []
        self._lingered, self._awaited = False, None
        self._stop_lingering()
        return [waiting.popleft() for _ in range(min(self._settings.batch_size, len(waiting)))]

    def start(self, size: int) -> BatchRun:
        """Record that a batch of ``size`` requests was passed to user code."""
        run = self._capacity.start(size, monotonic())
        self.watch()
        return run

    def end(self, run: BatchRun) -> None:
        """Record that all requests of a batch have replies."""
        if run.took_s > 0:
            old = _AVERAGE_WEIGHT**run.size
            self._run_s = max(run.took_s, old * self._run_s + (1 - old) * run.took_s)
        self._found_too_few = False
        self._capacity.end(run, monotonic())
        self.watch()

    def holds_up(self, waiting: int) -> bool:
        """Whether requests wait behind running batches."""
        return self.is_busy and (waiting > 0 or self._capacity.queued > 0)

    def patience_s(self, unpredictable_s: float) -> float:
        """Return how long claims may still wait; ``unpredictable_s`` if the ends of batches cannot be predicted."""
        patience_s = None if self.is_quick else self._capacity.patience_s(monotonic())
        return unpredictable_s if patience_s is None else patience_s

    def overran(self, least_s: float) -> None:
        """Record that the running batch takes ``least_s`` or more."""
        self._run_s = max(self._run_s, least_s)

    def watch(self) -> None:
        """Schedule ``on_nearly_free`` for when the next running batch is about to end."""
        self._stop_watching()
        if self._capacity.free > 0 or self.is_quick:
            return
        now_s = monotonic()  # the loop's clock may have a resolution of only a millisecond
        if (at_s := self._capacity.next_nearly_free_s(now_s)) is not None:
            self._nearly_free = asyncio.get_running_loop().call_later(at_s - now_s, self._on_timer)

    def _slots_ahead(self) -> int:
        """Return how many batches to claim beyond those that can start at once."""
        if self._sharing.is_mixed(monotonic()):
            return 0
        if self.is_quick:
            return 1 - self._capacity.queued
        return self._capacity.nearly_free(monotonic())

    def _on_timer(self) -> None:
        self._nearly_free = None
        self._found_too_few = False
        self._on_nearly_free()
        self.watch()

    def _measure_fetch(self) -> None:
        if self._fetch_began_s is not None and not self._is_fetching and not self.loading:
            self._capacity.record_fetch(monotonic() - self._fetch_began_s)
            self._fetch_began_s = None

    def _awaits_bodies(self) -> bool:
        # Only for bodies that were being fetched when the batch could first have started: new ones come all the time.
        if self._awaited is None:
            self._awaited = self.loading.copy()
        return bool(self._awaited)

    def _lingers(self, first: Claim) -> bool:
        # The wait counts from the first entry of the batch.
        if self._settings.batch_wait_s <= 0 or self._lingered:
            return False
        if self._linger is None:
            left_s = self._settings.batch_wait_s - (self._now_ms() - first.claimed_ms) / 1000
            self._linger = asyncio.get_running_loop().call_later(max(0.0, left_s), self._end_linger)
        return True

    def _stop_lingering(self) -> None:
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None

    def _stop_watching(self) -> None:
        if self._nearly_free is not None:
            self._nearly_free.cancel()
            self._nearly_free = None

    def _end_linger(self) -> None:
        self._linger, self._lingered = None, True
        self._on_lingered()
