"""Stats of a backend: counters that its replicas add to sums at the broker.

A replica regularly adds what it has counted since the last time. So the sums outlive replicas, and never decrease
unless the broker loses its data.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import add
from typing import cast, get_args

from ..transport.commands import Arg, Script
from ..transport.connection import RedisConnection
from ..wire.keys import Keys
from .counts.caller_counts import CallerCount, read_caller_counts
from .counts.queue_depth import read_depth
from .dead_letter_limits import DEAD_FIELD, DROPPED_FIELD

TIME_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of the buckets of queue times and run times."""

_BOUNDS_MS = tuple(bound * 1000 for bound in TIME_BOUNDS_S)
_COUNTED = ("served", "failed", "retried", "batched", "skipped", "redelivered", "lease_losses")
"""Counters that have the same name in `RunStats` and in the sums."""
_RUN_US, _QUEUE_US = b"run_us", b"queue_us"
_RAN, _QUEUED = b"ran:", b"queued:"
"""The beginning of the names of the buckets of run times and queue times; the index of the bucket follows."""
_BATCHES = b"batches:"
"""The beginning of the names of batch counters; the upper bound of the size of their batches follows."""

# KEYS: the sums. ARGV: names of counters, each followed by the number to add.
_ADD = Script("""#!lua flags=allow-oom
for i = 1, #ARGV, 2 do redis.call('HINCRBY', KEYS[1], ARGV[i], ARGV[i + 1]) end
""")


def _no_counts() -> list[int]:
    return [0] * (len(TIME_BOUNDS_S) + 1)


@dataclass(slots=True)
class RunStats:
    """The counters of one replica since they were last added to the sums."""

    served: int = 0
    """Requests with a reply that is not an error."""
    failed: int = 0
    """Requests whose reply is an error."""
    run_ms: float = 0.0
    """The run time of all requests. Each request of a batch counts the whole time of the batch."""
    batched: int = 0
    """Requests that ran in batches."""
    batches: dict[int, int] = field(default_factory=dict[int, int])
    """Numbers of batches, by the smallest power of two that is not less than their size."""
    retried: int = 0
    """Attempts that failed and are followed by another one."""
    skipped: int = 0
    """Requests that were not started, as they had missed their deadline or would have missed it."""
    redelivered: int = 0
    """Deliveries of requests whose replica had died."""
    lease_losses: int = 0
    """How often the replica's lease expired although it lived."""
    queue_ms: float = 0.0
    """The time that all requests waited between being published and being run."""
    ran: list[int] = field(default_factory=_no_counts)
    """Numbers of requests by the bucket of their run time, the last for longer ones than all bounds."""
    queued: list[int] = field(default_factory=_no_counts)
    """The same by their queue time."""

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in _COUNTED)

    def count_times(self, queue_ms: float, run_ms: float) -> None:
        """Count the times of a request."""
        self.run_ms += run_ms
        self.queue_ms += queue_ms
        self.ran[bisect_left(_BOUNDS_MS, run_ms)] += 1
        self.queued[bisect_left(_BOUNDS_MS, queue_ms)] += 1

    def count_batch(self, size: int) -> None:
        bound = 1 << (size - 1).bit_length()
        self.batches[bound] = self.batches.get(bound, 0) + 1
        self.batched += size

    def add(self, other: RunStats) -> None:
        """Add the counters of ``other``."""
        for name in (*_COUNTED, "run_ms", "queue_ms"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.ran = list(map(add, self.ran, other.ran))
        self.queued = list(map(add, self.queued, other.queued))
        for bound, count in other.batches.items():
            self.batches[bound] = self.batches.get(bound, 0) + count


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendStats:
    """The stats of one backend, over all callers, and over all replicas since it was created."""

    queued: int
    """Requests that wait for a replica."""
    in_progress: int
    """Requests that replicas hold."""
    queued_bytes: int
    """The bytes of both, as ``max_queued_bytes`` counts them."""
    dead_letters: int
    dead_letters_dropped: int
    """Dead letters that were dropped because there were too many, or because they were too old."""
    dead_lettered: dict[str, int]
    """All requests that became dead letters, by reason."""
    served: int
    failed: int
    retried: int
    run_s: float
    batched: int
    batches: dict[int, int]
    skipped: int
    redelivered: int
    lease_losses: int
    ran: list[int]
    """See `RunStats` for these."""
    queue_s: float
    waited: list[int]
    """``queue_ms`` and ``queued`` of `RunStats`."""
    refused: int
    expired: int
    cancelled: int
    """See `CallerCount` for these."""
    oldest_s: float
    """The age of the oldest request, waiting or running; 0 if there is none."""
    oldest_queued_s: float
    """The age of the oldest request that waits for a replica."""


async def add_stats(connection: RedisConnection, keys: Keys, backend: str, stats: RunStats) -> None:
    """Add ``stats`` to the sums of ``backend``.

    Raises:
        FateUnknown: the connection broke; the broker may have added them.
        BrokerUnavailable: the broker has not added them.
    """
    sums = {name.encode(): getattr(stats, name) for name in _COUNTED}
    sums |= {_RUN_US: round(stats.run_ms * 1000), _QUEUE_US: round(stats.queue_ms * 1000)}
    sums |= {_BATCHES + b"%d" % bound: count for bound, count in stats.batches.items()}
    for prefix, counts in ((_RAN, stats.ran), (_QUEUED, stats.queued)):
        sums |= {prefix + b"%d" % bucket: count for bucket, count in enumerate(counts)}
    args: list[Arg] = [item for pair in sums.items() if pair[1] for item in pair]
    await connection.run_script(_ADD, [keys.done(backend)], args)


async def read_stats(connection: RedisConnection, keys: Keys, backend: str) -> BackendStats:
    """Return the stats of ``backend``. Raises `BrokerUnavailable`."""
    load, dead, flat, ended = await asyncio.gather(
        read_depth(connection, keys, backend),
        connection.send("XLEN", keys.dead(backend), repeat=True),
        connection.send("HGETALL", keys.done(backend), repeat=True),
        read_caller_counts(connection, keys, backend),
    )
    done = dict(zip(flat[::2], map(int, cast("list[bytes]", flat[1::2])), strict=True))
    return BackendStats(
        queued=load.unsettled - load.in_progress,
        in_progress=load.in_progress,
        queued_bytes=load.queued_bytes,
        dead_letters=int(dead),
        dead_letters_dropped=done.get(DROPPED_FIELD, 0),
        dead_lettered={
            name[len(DEAD_FIELD) :].decode(): count for name, count in done.items() if name.startswith(DEAD_FIELD)
        },
        **{name: done.get(name.encode(), 0) for name in _COUNTED},
        **{name: ended.get(name, 0) for name in get_args(CallerCount)},
        run_s=done.get(_RUN_US, 0) / 1e6,
        queue_s=done.get(_QUEUE_US, 0) / 1e6,
        ran=_buckets(done, _RAN),
        waited=_buckets(done, _QUEUED),
        oldest_s=load.oldest_s,
        oldest_queued_s=load.oldest_queued_s,
        batches={int(name[len(_BATCHES) :]): count for name, count in done.items() if name.startswith(_BATCHES)},
    )


def _buckets(done: Mapping[bytes, int], prefix: bytes) -> list[int]:
    return [done.get(prefix + b"%d" % bucket, 0) for bucket in range(len(TIME_BOUNDS_S) + 1)]
