"""Queue depth of a backend, counted at the broker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from ..transport.commands import Script
from ..transport.connection import RedisConnection
from ..wire.keys import Keys
from .group.member import GROUP
from .queued_bytes import SMALL

# KEYS: the streams, the records of sizes. ARGV: the group. Answers how many entries are unsettled, how many of them
# replicas hold, and the bytes that they are charged for.
_LOAD = Script("""#!lua flags=no-writes
local unsettled, held = 0, 0
for s = 1, 2 do
  local stream = KEYS[s]
  unsettled = unsettled + redis.call('XLEN', stream)
  if redis.call('EXISTS', stream) == 1 then
    for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
      if group[2] == ARGV[1] then held = held + group[6] end
    end
  end
end
return {unsettled, held, unsettled * ARGV[2] + (redis.call('HGET', KEYS[3], 'total') or 0)}
""")


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueDepth:
    """Requests of one backend, over all callers."""

    unsettled: int
    """Waiting and running."""
    in_progress: int
    """Those of them that replicas hold."""
    queued_bytes: int = 0
    """What the unsettled ones take, as ``max_queued_bytes`` counts it."""


async def read_depth(connection: RedisConnection, keys: Keys, backend: str) -> QueueDepth:
    """Count the requests of ``backend``. Raises `BrokerUnavailable`."""
    found = [keys.requests(backend), keys.batch(backend), keys.sizes(backend)]
    reply = await connection.run_script(_LOAD, found, [GROUP, SMALL], repeat=True)
    unsettled, held, queued_bytes = cast("list[int]", reply)
    # What a caller withdrew while it ran is still held, and no longer counted.
    return QueueDepth(unsettled=unsettled, in_progress=min(held, unsettled), queued_bytes=queued_bytes)
