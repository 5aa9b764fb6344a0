"""Queue depth of a backend, counted at the broker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from ...transport.commands import Script
from ...transport.connection import RedisConnection
from ...wire.keys import Keys
from ..group.member import GROUP
from ..queued_bytes import SMALL

# KEYS: the streams, the records of sizes. ARGV: the group, the least charge of a request. Returns the numbers of
# unsettled entries and of pending ones, the bytes that the unsettled ones are charged for, and the ages of the oldest
# entry and of the oldest one that no replica has claimed, in milliseconds; 0 for a user without the right to read them.
_DEPTH = Script("""#!lua flags=no-writes
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function age(stream, after)
  if not redis.acl_check_cmd('XRANGE', stream, '-', '+') then return 0 end
  local first = redis.call('XRANGE', stream, after, '+', 'COUNT', 1)[1]
  return first and math.max(0, now - string.match(first[1], '^%d+')) or 0
end
local unsettled, held, oldest, oldest_queued = 0, 0, 0, 0
for s = 1, 2 do
  local stream = KEYS[s]
  unsettled = unsettled + redis.call('XLEN', stream)
  if redis.call('EXISTS', stream) == 1 then
    local after = '-'
    for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
      if group[2] == ARGV[1] then
        held = held + group[6]
        after = '(' .. group[8]
      end
    end
    oldest, oldest_queued = math.max(oldest, age(stream, '-')), math.max(oldest_queued, age(stream, after))
  end
end
return {unsettled, held, unsettled * ARGV[2] + (redis.call('HGET', KEYS[3], 'total') or 0), oldest, oldest_queued}
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
    oldest_s: float = 0.0
    """The age of the oldest request; 0 if there is none, or the Redis user may not read the streams."""
    oldest_queued_s: float = 0.0
    """The age of the oldest request that no replica has claimed, likewise."""


async def read_depth(connection: RedisConnection, keys: Keys, backend: str) -> QueueDepth:
    """Count the requests of ``backend``. Raises `BrokerUnavailable`."""
    read = [keys.requests(backend), keys.batch(backend), keys.sizes(backend)]
    reply = await connection.run_script(_DEPTH, read, [GROUP, SMALL], repeat=True)
    unsettled, held, queued_bytes, oldest_ms, oldest_queued_ms = cast("list[int]", reply)
    # A request that was withdrawn while it ran is still pending, but no longer on its stream.
    return QueueDepth(
        unsettled=unsettled,
        in_progress=min(held, unsettled),
        queued_bytes=queued_bytes,
        oldest_s=oldest_ms / 1000,
        oldest_queued_s=oldest_queued_ms / 1000,
    )
