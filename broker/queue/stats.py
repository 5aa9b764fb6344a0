"""Stats of a backend: counters that its replicas add up at the broker.

Replicas add what they did since they last said so. So the sums outlive them, and never go backwards, but for a broker
that loses its data.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import cast

from ..transport.commands import Arg, Script
from ..transport.connection import RedisConnection
from ..wire.keys import Keys
from .dead_letter_limits import DROPPED
from .load import read_depth

_SERVED, _FAILED, _RUN_US, _BATCHED = b"served", b"failed", b"run_us", b"batched"
_BATCHES = b"batches:"
"""Behind it stands the upper bound of how many requests each of them had."""

# KEYS: the sums. ARGV: names and what to add.
_ADD = Script("""#!lua flags=allow-oom
for i = 1, #ARGV, 2 do redis.call('HINCRBY', KEYS[1], ARGV[i], ARGV[i + 1]) end
""")


@dataclass(slots=True)
class RunStats:
    """What was done since somebody looked last."""

    served: int = 0
    failed: int = 0
    """Answered with an error."""
    run_ms: float = 0.0
    """Over requests: each of one batch counts all of its time."""
    batched: int = 0
    """Requests that ran in batches."""
    batches: dict[int, int] = field(default_factory=dict[int, int])
    """How many batches there were, by the power of two that bounds their size."""

    def __bool__(self) -> bool:
        return bool(self.served or self.failed or self.batched)

    def count_batch(self, size: int) -> None:
        bound = 1 << (size - 1).bit_length()
        self.batches[bound] = self.batches.get(bound, 0) + 1
        self.batched += size

    def take(self, other: RunStats) -> None:
        """Add what another one holds."""
        self.served += other.served
        self.failed += other.failed
        self.run_ms += other.run_ms
        self.batched += other.batched
        for bound, count in other.batches.items():
            self.batches[bound] = self.batches.get(bound, 0) + count


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendStats:
    """Of one backend, over all callers and all replicas since it was created."""

    queued: int
    in_progress: int
    queued_bytes: int
    """What both take, as ``max_queued_bytes`` counts it."""
    dead_letters: int
    dead_letters_dropped: int
    """As there were too many, or they were too old."""
    served: int
    failed: int
    run_s: float
    batched: int
    batches: dict[int, int]


async def add_stats(connection: RedisConnection, keys: Keys, backend: str, tally: RunStats) -> None:
    """Add ``tally`` to the sums of ``backend``.

    Raises:
        FateUnknown: it may have been added.
        BrokerUnavailable: it was not.
    """
    args: list[Arg] = [_SERVED, tally.served, _FAILED, tally.failed, _RUN_US, round(tally.run_ms * 1000)]
    if tally.batched:
        args += [_BATCHED, tally.batched]
        for bound, count in tally.batches.items():
            args += [_BATCHES + b"%d" % bound, count]
    await connection.run_script(_ADD, [keys.done(backend)], args)


async def read_stats(connection: RedisConnection, keys: Keys, backend: str) -> BackendStats:
    """Return the figures of ``backend``. Raises `BrokerUnavailable`."""
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
        dead_letters_dropped=done.get(DROPPED, 0),
        served=done.get(_SERVED, 0),
        failed=done.get(_FAILED, 0),
        run_s=done.get(_RUN_US, 0) / 1e6,
        batched=done.get(_BATCHED, 0),
        batches={int(name[len(_BATCHES) :]): count for name, count in done.items() if name.startswith(_BATCHES)},
    )
