"""Counts of kept requests: by endpoint, how many are queued and running, and how many have ended in each final state.

Every script that changes the state of a kept request counts the change as well, so that counting needs no command of
its own. Final states count all requests since the backend was created, also those whose results have expired.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import cast

from ..transport.connection import RedisConnection
from ..wire.kept import CANCELLED, FAILED, QUEUED, RUNNING, SUCCEEDED
from ..wire.keys import Keys

STATES = (QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED)

# Lua: adds the changes in the table ``moved``, by the state and the endpoint, to the counts.
ADD_MOVED = """
for name, change in pairs(moved) do
  if change ~= 0 then redis.call('HINCRBY', counts, name, change) end
end
"""


async def read_kept_counts(
    connection: RedisConnection, keys: Keys, backend: str, *, unsettled: int
) -> dict[str, dict[str, int]]:
    """Return the counts of ``backend`` by endpoint and state.

    A record that expires before its request has run stays counted as queued. So without an ``unsettled`` request of the
    backend none is counted as queued or running.

    Raises:
        BrokerUnavailable: Redis cannot be reached.
    """
    flat = cast("list[bytes]", await connection.send("HGETALL", keys.submitted(backend), repeat=True))
    counts: dict[str, dict[str, int]] = {}
    for name, count in zip(flat[::2], flat[1::2], strict=True):
        state, _, endpoint = name.decode(errors="replace").partition(":")
        if state not in STATES:
            continue  # any caller may write here
        is_present = state not in (QUEUED, RUNNING) or unsettled > 0
        counts.setdefault(endpoint, dict.fromkeys(STATES, 0))[state] = max(0, int(count)) if is_present else 0
    return counts


def sum_by_endpoint(backends: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """Return the sums of the counts of several backends, by endpoint and state."""
    sums: dict[str, Counter[str]] = {}
    for endpoints in backends:
        for endpoint, counts in endpoints.items():
            sums.setdefault(endpoint, Counter()).update(counts)
    return {endpoint: {state: counts[state] for state in STATES} for endpoint, counts in sorted(sums.items())}
