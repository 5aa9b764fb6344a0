"""Capacity of a replica that runs batches: the slots that batches occupy, and when the next one becomes free.

A batch occupies its slot from its start until all of its requests have replies, however few they are. So there is room
for the next batch only when the whole slot is free. (If room is counted request by request, it is filled behind the
running batch: batches of 20 ms then alternate between 1 and 63 requests, and requests wait for them although another
replica may be idle.)

The exception is the last moment of a running batch. Its slot counts as nearly free shortly before its predicted end, as
early as a recent claim took, large bodies included. So the next batch can start as soon as this one ends.

A thread begins the batch that is queued for it at once. The loop may learn later that the one before has ended, since
user code that computes holds the interpreter lock. So the end of that one is the moment in which its successor began.

Pure: the caller passes the clock.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

_SAMPLE_SIZE = 6
"""Number of recent batches whose durations are compared; the shortest and the longest of them are left out."""
_MIN_SAMPLE_SIZE = 4
"""Durations that are needed for a prediction."""
_SHORT_S = 0.010
"""After a batch up to this long, the next one may be claimed as early as it begins."""
_MIN_EARLY_S, _EARLY, _MAX_EARLY_S = 0.002, 0.15, 0.020
"""After a longer batch, the next one may wait for this share of its duration, within these limits. Where durations
differ by more, it is claimed for the end of the longest.
"""
_MIN_FETCH_S, _MAX_FETCH_S = 0.0005, 0.1
"""Limits of the time that a claim is expected to take."""
_TIMER_S = 0.0015
"""Largest error of a timer, early or late: the timers of uvloop have a resolution of a millisecond."""
_MAX_OVERRUN_S = 0.005
"""A batch that exceeds the longest of the sample by this much is overdue, and its end unpredictable."""
_SMOOTHING = 0.1
"""Weight of the newest claim in the average, unless it took longer: a slow claim counts at once, and for a while. The
next claim may meet code that holds the interpreter lock again, and one that is late costs more than one that is early.
"""


class Begun(Protocol):
    """A call of user code that may have begun."""

    @property
    def began_s(self) -> float:
        """When a thread began to run it; 0 if none has, as far as is known."""
        ...


class BatchRun:
    """One batch that was passed to user code: it runs, or waits in a thread's queue for the end of another."""

    __slots__ = ("call", "size", "started_s", "took_s")

    def __init__(self, size: int) -> None:
        self.size = size
        self.started_s = 0.0
        self.took_s = 0.0
        """How long user code took; 0 if it was never called."""
        self.call: Begun | None = None
        """The call of user code, once it was made."""

    def began_s(self, now_s: float) -> float:
        """Return when user code began, ``now_s`` at the latest."""
        return min(now_s, (self.call.began_s if self.call is not None else 0.0) or now_s)


class BatchCapacity:
    """The slots of one replica, each for one batch."""

    def __init__(self, slots: int = 1) -> None:
        self._slots = slots
        self._running: list[BatchRun] = []
        self._queued: deque[BatchRun] = deque()
        self._durations_s: deque[float] = deque(maxlen=_SAMPLE_SIZE)
        self._end_s = self._longest_s = 0.0
        """The shortest and the longest time that a batch is expected to take; 0 while the sample is too small."""
        self._fetch_s = _MIN_FETCH_S

    def resize(self, slots: int, now_s: float) -> None:
        """Let ``slots`` batches run at a time from now on."""
        self._slots = slots
        self._start_queued(now_s)

    @property
    def free(self) -> int:
        """The number of free slots; negative after the number of slots was reduced."""
        return self._slots - len(self._running)

    @property
    def queued(self) -> int:
        """The number of batches that were passed to user code while no slot was free."""
        return len(self._queued)

    def start(self, size: int, now_s: float) -> BatchRun:
        """Record that a batch of ``size`` requests starts, or is queued for the next free slot."""
        run = BatchRun(size)
        self._queued.append(run)
        self._start_queued(now_s)
        return run

    def end(self, run: BatchRun, now_s: float) -> None:
        """Record that all requests of a batch have replies. The oldest queued batch gets its slot."""
        if run in self._queued:  # it never started: all of its requests were cancelled
            self._queued.remove(run)
            return
        self._running.remove(run)
        ended_s = self._queued[0].began_s(now_s) if self._queued else now_s
        self._record(ended_s - run.started_s)
        self._start_queued(now_s)

    def record_fetch(self, fetch_s: float) -> None:
        """Record how long it took to claim about a batch of requests and to fetch their bodies."""
        average_s = (1 - _SMOOTHING) * self._fetch_s + _SMOOTHING * fetch_s
        self._fetch_s = min(max(fetch_s, average_s, _MIN_FETCH_S), _MAX_FETCH_S)

    def nearly_free(self, now_s: float) -> int:
        """Return how many slots are about to become free and have no queued batch."""
        return max(0, sum(self._is_ending(run, now_s) for run in self._running) - len(self._queued))

    def next_nearly_free_s(self, now_s: float) -> float | None:
        """Return when the next slot will be nearly free; None if that cannot be predicted."""
        if not self._longest_s:
            return None
        coming = [at_s for run in self._running if (at_s := self._nearly_free_at_s(run)) > now_s]
        return min(coming, default=None)

    def patience_s(self, now_s: float) -> float | None:
        """Return how long requests may still wait for a slot; None if the ends of batches cannot be predicted."""
        if not self._longest_s:
            return None
        ending = [self._overdue_at_s(run) - now_s for run in self._running if self._is_ending(run, now_s)]
        return max(ending, default=0.0)

    def _record(self, duration_s: float) -> None:
        self._durations_s.append(duration_s)
        if len(self._durations_s) < _MIN_SAMPLE_SIZE:
            return
        typical_s = sorted(self._durations_s)[1:-1]
        self._longest_s = longest_s = typical_s[-1]
        early_s = _SHORT_S if longest_s <= _SHORT_S else min(max(_MIN_EARLY_S, _EARLY * longest_s), _MAX_EARLY_S)
        self._end_s = max(typical_s[0], longest_s - early_s)

    def _start_queued(self, now_s: float) -> None:
        while self._queued and self.free > 0:
            run = self._queued.popleft()
            run.started_s = run.began_s(now_s)
            self._running.append(run)

    def _nearly_free_at_s(self, run: BatchRun) -> float:
        return run.started_s + max(0.0, self._end_s - self._fetch_s - _TIMER_S)

    def _overdue_at_s(self, run: BatchRun) -> float:
        return run.started_s + self._longest_s + _MAX_OVERRUN_S

    def _is_ending(self, run: BatchRun, now_s: float) -> bool:
        return self._longest_s > 0 and self._nearly_free_at_s(run) - _TIMER_S <= now_s < self._overdue_at_s(run)
