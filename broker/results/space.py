"""Space accounting of kept requests: how many bytes the records and results of a backend take.

Records and results expire by themselves, at times that no script sees. So their bytes are counted in buckets, each
named by the time at which all that it counts has expired, and a bucket whose time has passed is deleted. The count is
at most a hundredth of a lifetime late, and an entry that was lost cannot hold space for ever.
"""

from __future__ import annotations

RECORD_BYTES = 1024
"""What a kept request is charged for its record and its key, with and without a result."""

PENDING_S = 7 * 24 * 3600
"""How long the record of a kept request stays while it is neither started nor finished."""

_SWEEP_EVERY_MS = 1_000

# Defines `now_ms`, and functions of the hash with the buckets: `charge` counts bytes that expire at a time, and returns
# the name of their bucket, which is the wider the longer ``lifetime_ms`` is; `discharge` undoes that; `sweep` deletes
# old buckets.
SPACE = f"""
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
local function charge(space, until_ms, lifetime_ms, bytes)
  local width = math.max(1000, math.floor(lifetime_ms / 100))
  local bucket = string.format('%.0f', math.ceil(until_ms / width) * width)
  redis.call('HINCRBY', space, bucket, bytes)
  redis.call('HINCRBY', space, 'total', bytes)
  redis.call('PEXPIRE', space, {2 * PENDING_S * 1000})
  return bucket
end
local function discharge(space, bucket, bytes)
  if bucket and redis.call('HEXISTS', space, bucket) == 1 then
    redis.call('HINCRBY', space, bucket, -bytes)
    redis.call('HINCRBY', space, 'total', -bytes)
  end
end
local function sweep(space, now)
  if now - (redis.call('HGET', space, 'swept') or 0) < {_SWEEP_EVERY_MS} then return end
  local all, total = redis.call('HGETALL', space), 0
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
