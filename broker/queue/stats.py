"""Stats of a backend: counters that its replicas add to sums at the broker.

A replica regularly adds what it has counted since the last time. So the sums outlive replicas, and never decrease
unless the broker loses its data.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import cast

from ..transport.commands import Arg, Script
from ..transport.connection import RedisConnection
from ..wire.keys import Keys
from .dead_letter_limits import DROPPED_FIELD
from .queue_depth import read_depth

_SERVED, _FAILED, _RETRIED, _RUN_US, _BATCHED = b"served", b"failed", b"retried", b"run_us", b"batched"
_BATCHES = b"batches:"
"""The beginning of the names of batch counters; the upper bound of the size of their batches follows."""

# KEYS: the sums. ARGV: names of counters, each followed by the number to add.
_ADD = Script("""#!lua flags=allow-oom
for i = 1, #ARGV, 2 do redis.call('HINCRBY', KEYS[1], ARGV[i], ARGV[i + 1]) end
""")


@dataclass(slots=True)
class RunStats:
    """The counters of one replica since they were last added to the sums."""

    served: int = 0
    """Requests with a reply that is not an error."""
    failed: int = 0
    """Requests whose reply is an error."""
    run_ms: float = 0.0
    """The run time of all attempts. Each request of a batch counts the whole time of the batch."""
    batched: int = 0
    """Requests that ran in batches."""
    batches: dict[int, int] = field(default_factory=dict[int, int])
    """Numbers of batches, by the smallest power of two that is not less than their size."""
    retried: int = 0
    """Attempts that failed and are followed by another one."""

    def __bool__(self) -> bool:
        return bool(self.served or self.failed or self.retried or self.batched)

    def count_batch(self, size: int) -> None:
        bound = 1 << (size - 1).bit_length()
        self.batches[bound] = self.batches.get(bound, 0) + 1
        self.batched += size

    def add(self, other: RunStats) -> None:
        """Add the counters of ``other``."""
        self.served += other.served
        self.failed += other.failed
        self.retried += other.retried
        self.run_ms += other.run_ms
        self.batched += other.batched
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
    served: int
    failed: int
    retried: int
    run_s: float
    batched: int
    batches: dict[int, int]
    """See `RunStats` for these."""


async def add_stats(connection: RedisConnection, keys: Keys, backend: str, stats: RunStats) -> None:
    """Add ``stats`` to the sums of ``backend``.

    Raises:
        FateUnknown: the connection broke; the broker may have added them.
        BrokerUnavailable: the broker has not added them.
    """
    args: list[Arg] = [_SERVED, stats.served, _FAILED, stats.failed, _RUN_US, round(stats.run_ms * 1000)]
    if stats.retried:
        args += [_RETRIED, stats.retried]
    if stats.batched:
        args += [_BATCHED, stats.batched]
        for bound, count in stats.batches.items():
            args += [_BATCHES + b"%d" % bound, count]
    await connection.run_script(_ADD, [keys.done(backend)], args)


async def read_stats(connection: RedisConnection, keys: Keys, backend: str) -> BackendStats:
    """Return the stats of ``backend``. Raises `BrokerUnavailable`."""
    load, dead, flat = await asyncio.gather(
        read_depth(connection, keys, backend),
        connection.send("XLEN", keys.dead(backend), repeat=True),
        connection.send("HGETALL", keys.done(backend), repeat=True),
    )
    done = dict(zip(flat[::2], map(int, cast("list[bytes]", flat[1::2])), strict=True))
    return BackendStats(
        queued=load.unsettled - load.in_progress,
        in_progress=load.in_progress,
        queued_bytes=load.queued_bytes,
        dead_letters=int(dead),
        dead_letters_dropped=done.get(DROPPED_FIELD, 0),
        served=done.get(_SERVED, 0),
        failed=done.get(_FAILED, 0),
        retried=done.get(_RETRIED, 0),
        run_s=done.get(_RUN_US, 0) / 1e6,
        batched=done.get(_BATCHED, 0),
        batches={int(name[len(_BATCHES) :]): count for name, count in done.items() if name.startswith(_BATCHES)},
    )
