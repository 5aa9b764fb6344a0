"""Defaults taken out again, for the case that measures their cost.

Without it there is nobody who would notice a dead replica, no limit to a queue, no deadline, and all requests have the
same id. It is taken out here alone: Penstock has no switch for it.

What appends the requests is one of two: a plain ``XADD`` for each, or a script for all of a tick, as Penstock has it,
that counts nothing.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from penstock.broker.queue.group.replica_lease import ReplicaLease
from penstock.broker.queue.leases import Lease
from penstock.broker.queue.publisher import Publisher, _hand_out
from penstock.broker.transport.commands import Script
from penstock.proxy import request_ids

ENVIRONMENT = "PENSTOCK_BENCH_BARE"
_FOR_GOOD_MS = 3_600_000


_APPEND = Script("""#!lua
local out = {}
local i = 1
while i <= #ARGV do
  out[#out + 1] = redis.call('XADD', KEYS[1], '*', 'v', '1', 'id', ARGV[i], 'by', ARGV[i + 1], 'h', ARGV[i + 2],
    ARGV[i + 3], ARGV[i + 4])
  i = i + 5
end
return out
""")


def is_asked_for() -> bool:
    return ENVIRONMENT in os.environ


def take_the_defaults_out() -> None:
    """Do so in this process."""
    Lease.start = _take_for_good  # type: ignore[method-assign]
    ReplicaLease.start = _acquire_once  # type: ignore[method-assign]
    append = {"xadd": _append_each, "script": _append_all}[os.environ[ENVIRONMENT]]
    Publisher._flush = append  # type: ignore[method-assign]
    request_ids.request_id_of = lambda headers: b"0"


def _take_for_good(lease: Any) -> None:
    """Instead of a thread that renews it."""
    lease._connection._redis.set(lease._key, "1", px=_FOR_GOOD_MS)
    lease._ended.set()


async def _acquire_once(lease: Any, *_: Any) -> None:
    """Instead of renewing it. No other replica redelivers anything, as none renews its lease."""
    await lease.renew()


def _append_each(publisher: Any) -> None:
    for stream, entries in _streams(publisher):
        for entry, then in entries:
            publisher._connection.post(then, "XADD", stream, "*", *entry.fields())


def _append_all(publisher: Any) -> None:
    for stream, entries in _streams(publisher):
        args: list[Any] = []
        for entry, _ in entries:
            args += (entry.id, entry.caller, entry.header, *entry.body_field())
        hand_out = partial(_hand_out, [then for _, then in entries], publisher._connection.url)
        publisher._connection.post_script(hand_out, _APPEND, [stream], args)


def _streams(publisher: Any) -> list[tuple[str, list[Any]]]:
    """Take the entries of this tick from the publisher."""
    tick, publisher._tick = publisher._tick, {}
    return [(publisher._keys.requests(backend), entries) for (backend, *_), entries in tick.items()]
