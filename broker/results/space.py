"""Space accounting of kept requests: how many bytes the records and results of a backend take.

Records and results expire by themselves, at times that no script sees. So their bytes are counted in buckets, each
named by the time at which all that it counts has expired, and a bucket whose time has passed is deleted. The count is
at most a hundredth of a lifetime late, and an entry that was lost cannot hold space for ever.

A request is counted when it has ended. Before that it is one of the unsettled requests, whose number is limited.
"""

from __future__ import annotations

from ..transport.commands import Script

RECORD_BYTES = 1024
"""The bytes that a kept request is charged for its record and its key, besides its result."""

_SWEEP_EVERY_MS = 1_000
"""Least time between two sweeps of old buckets."""

# Lua: counts ``bytes`` that expire ``ttl`` milliseconds after ``now``, in the hash with the buckets. The bucket is the
# wider the longer that is.
CHARGE = """
local function charge(space, now, ttl, bytes)
  local width = math.max(1000, math.floor(ttl / 100))
  local bucket = string.format('%.0f', math.ceil((now + ttl) / width) * width)
  if redis.call('HINCRBY', space, bucket, bytes) == bytes then redis.call('PEXPIRE', space, 2 * ttl + width) end
  redis.call('HINCRBY', space, 'total', bytes)
end
"""

# Lua: deletes the buckets of ``space`` whose time has passed. Scripts have it where they need it: to define a function
# costs as much as a command.
SWEEP = f"""
local function sweep(space, now)
  if now - (redis.call('HGET', space, 'swept') or 0) < {_SWEEP_EVERY_MS} then return end
  local all, total = redis.call('HGETALL', space), 0
  if #all == 0 then return end
  for i = 1, #all, 2 do
    local until_ms = tonumber(all[i])
    if until_ms and until_ms <= now then
      redis.call('HDEL', space, all[i])
    elseif until_ms then
      total = total + all[i + 1]
    end
  end
  redis.call('HSET', space, 'total', total, 'swept', now)
end
"""

# Lua: the time in milliseconds.
NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

# Deletes old buckets. KEYS: the space.
SWEEP_ONCE = Script(f"""#!lua flags=allow-oom
{NOW}
{SWEEP}
sweep(KEYS[1], now)
return 0
""")
