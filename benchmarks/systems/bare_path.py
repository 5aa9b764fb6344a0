"""What users get by default, taken out again: for the case that shows what it costs.

Without it there is nobody who would notice a dead replica, no limit to a queue, no deadline, and all requests have the
same id. It is taken out here alone: Penstock has no switch for it.
"""

from __future__ import annotations

import os
from typing import Any

from penstock.broker.lease import Lease
from penstock.broker.publishing import Publisher
from penstock.proxy import request_ids

ENVIRONMENT = "PENSTOCK_BENCH_BARE"
_FOR_GOOD_MS = 3_600_000


def is_asked_for() -> bool:
    return os.environ.get(ENVIRONMENT) == "1"


def take_the_defaults_out() -> None:
    """Do so in this process."""
    Lease.start = _take_for_good  # type: ignore[method-assign]
    Publisher._flush = _append_each  # type: ignore[method-assign]
    request_ids.request_id_of = lambda headers: b"0"


def _take_for_good(lease: Any) -> None:
    """Instead of a thread that renews it."""
    lease._redis.set(lease._key, "1", px=_FOR_GOOD_MS)
    lease._ended.set()


def _append_each(publisher: Any) -> None:
    """Instead of the script that counts what is unsettled: a plain ``XADD``, one write for all of a tick as there."""
    tick, publisher._tick = publisher._tick, {}
    for (backend, _, batch), entries in tick.items():
        stream = publisher._keys.batch(backend) if batch else publisher._keys.requests(backend)
        for fields, then in entries:
            publisher._connection.post(then, "XADD", stream, "*", *fields)
