"""Queue depth of a backend, counted at the broker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from ..transport.commands import Script
from ..transport.connection import RedisConnection
from ..wire.keys import Keys
from .group.member import GROUP
from .queued_bytes import SMALL

# KEYS: the streams, the records of sizes. ARGV: the group, the least charge of a request. Returns the numbers of
# unsettled entries and of pending ones, and the bytes that the unsettled ones are charged for.
_DEPTH = Script("""#!lua flags=no-writes
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
    """The requests of one backend, of all callers."""

    unsettled: int
    """Requests that wait for a replica, or that replicas hold."""
    in_progress: int
    """Requests that replicas hold."""
    queued_bytes: int = 0
    """The bytes of all unsettled requests, as ``max_queued_bytes`` counts them."""


async def read_depth(connection: RedisConnection, keys: Keys, backend: str) -> QueueDepth:
    """Count the requests of ``backend``. Raises `BrokerUnavailable`."""
    read = [keys.requests(backend), keys.batch(backend), keys.sizes(backend)]
    reply = await connection.run_script(_DEPTH, read, [GROUP, SMALL], repeat=True)
    unsettled, held, queued_bytes = cast("list[int]", reply)
    # A request that was withdrawn while it ran is still pending, but no longer on its stream.
    return QueueDepth(unsettled=unsettled, in_progress=min(held, unsettled), queued_bytes=queued_bytes)
