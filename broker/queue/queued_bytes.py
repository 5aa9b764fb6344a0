"""Byte accounting of a backend's queue: the bytes of its unsettled requests, exact at any number of callers.

A request is charged for its header and its body, and for at least `SMALL` bytes. The charge of a queue is therefore
``SMALL`` for each entry on its streams, plus the bytes of larger requests beyond that. Only larger requests have a
record: a field of one hash for each backend. The script that appends the entry writes it, and the script that removes
the entry deletes it, so neither a death nor a repeated command counts an entry twice. The first `SET_ASIDE` requests
are always charged, even if there are fewer, so that publishing to a short queue need not read the records.

The body of a large request (claim check) is stored before its entry is appended. Its bytes are reserved before that,
so that bodies of refused requests never reach the broker. A reservation expires if its caller dies.
"""

from __future__ import annotations

import hashlib

from ..transport.commands import Script

SMALL = 4 * 1024
"""The least charge of a request, in bytes."""

SET_ASIDE = 16
"""The number of small requests that are always charged, so that they can be published without reading the records."""

NO_LIMIT = 2**53
"""A limit that no queue reaches; the largest integer up to which Lua counts exactly."""

RESERVATION_S = 60
"""Expiry of a reservation that its caller does not use: the longest time for storing the largest body."""

_CHECK_S = 1
"""While requests are refused for their size, the records are checked this often for entries that are gone."""

# A Lua function that deletes the records of entries or reservations, and subtracts their bytes from the total.
RELEASE = """
local function release(records, refs)
  local freed = 0
  for _, ref in ipairs(refs) do
    local held = redis.call('HGET', records, ref)
    if held then
      redis.call('HDEL', records, ref)
      freed = freed + string.match(held, '^%d+')
    end
  end
  if freed > 0 and redis.call('HINCRBY', records, 'total', -freed) <= 0 then redis.call('DEL', records) end
end
"""

# A Lua function that deletes the records of expired reservations, and of entries that something other than Penstock's
# scripts removed, such as XTRIM. Returns the new total, or nothing if it was called within the last second. Entries
# older than the oldest entry of their stream are gone. A user without the right to read the streams only sees whether
# they are empty. Scripts define this function only where they need it: defining it costs as much as a command.
RECOUNT = f"""
local function recount(records, requests, batch)
  local time = redis.call('TIME')
  local now, total, first = time[1] * 1000 + math.floor(time[2] / 1000), 0, {{}}
  if now - (redis.call('HGET', records, 'checked') or 0) < {_CHECK_S * 1000} then return nil end
  for s, stream in ipairs({{requests, batch}}) do
    if redis.acl_check_cmd('XRANGE', stream, '-', '+') then
      local oldest = redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
      if oldest then
        local ms, n = string.match(oldest[1], '^(%d+)-(%d+)$')
        first[s] = {{tonumber(ms), tonumber(n)}}
      end
    elseif redis.call('XLEN', stream) > 0 then
      first[s] = {{0, 0}}
    end
  end
  local all = redis.call('HGETALL', records)
  for i = 1, #all, 2 do
    local ref, bytes, since = all[i], string.match(all[i + 1], '^(%d+):?(%d*)$')
    if ref ~= 'total' and ref ~= 'checked' then
      local gone
      if since ~= '' then
        gone = now - since > {RESERVATION_S * 1000}
      else
        local on_batch, ms, n = string.match(ref, '^(b?)(%d+)-(%d+)$')
        local oldest = first[on_batch == 'b' and 2 or 1]
        ms, n = tonumber(ms), tonumber(n)
        gone = not oldest or ms < oldest[1] or (ms == oldest[1] and n < oldest[2])
      end
      if gone then redis.call('HDEL', records, ref) else total = total + bytes end
    end
  end
  redis.call('HSET', records, 'total', total, 'checked', now)
  return total
end
"""

# A Lua function that returns the age of the oldest entry of two streams, in milliseconds; 0 for a user without the
# right to read them.
OLDEST = """
local function oldest_ms(requests, batch)
  local time, oldest = redis.call('TIME'), 0
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  for _, stream in ipairs({requests, batch}) do
    local may_read = redis.acl_check_cmd('XRANGE', stream, '-', '+')
    local first = may_read and redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
    if first then oldest = math.max(oldest, now - string.match(first[1], '^%d+')) end
  end
  return oldest
end
"""

# Reserves room for a request whose body is about to be stored. KEYS: the interactive stream, the batch stream, the
# records. ARGV: the limit of requests, the limit of bytes, the request's id, its bytes. Returns nothing if it fits;
# else the numbers that _PUBLISH of broker/queue/publisher.py returns for a refused request.
RESERVE = Script(f"""#!lua
{RECOUNT}
{OLDEST}
local reservation, bytes = 'r:' .. redis.sha1hex(ARGV[3]), tonumber(ARGV[4])
if redis.call('HEXISTS', KEYS[3], reservation) == 1 then return {{}} end
local depth = redis.call('XLEN', KEYS[1]) + redis.call('XLEN', KEYS[2])
local used = {SMALL} * math.max(depth, {SET_ASIDE - 1}) + (redis.call('HGET', KEYS[3], 'total') or 0)
if depth >= tonumber(ARGV[1]) then return {{depth, oldest_ms(KEYS[1], KEYS[2])}} end
if used + bytes > tonumber(ARGV[2]) then
  local total = recount(KEYS[3], KEYS[1], KEYS[2])
  if total then used = {SMALL} * math.max(depth, {SET_ASIDE - 1}) + total end
  if used + bytes > tonumber(ARGV[2]) then return {{-1 - used, oldest_ms(KEYS[1], KEYS[2])}} end
end
local time = redis.call('TIME')
redis.call('HSET', KEYS[3], reservation, ARGV[4] .. ':' .. time[1] .. string.sub('000000' .. time[2], -6, -4))
redis.call('HINCRBY', KEYS[3], 'total', ARGV[4])
return {{}}
""")

# Deletes records. KEYS: the records. ARGV: entry refs, or names of reservations.
FORGET = Script(f"""#!lua flags=allow-oom
{RELEASE}
release(KEYS[1], ARGV)
return 0
""")

# Deletes an entry and its record. KEYS: the stream, the records. ARGV: the entry's id, its ref.
WITHDRAW = Script(f"""#!lua flags=allow-oom
{RELEASE}
release(KEYS[2], {{ARGV[2]}})
return redis.call('XDEL', KEYS[1], ARGV[1])
""")


def most_bytes(limit_bytes: int) -> int:
    """Return the most bytes of one request, header and body, that a queue with this limit admits."""
    return limit_bytes - (SET_ASIDE - 1) * SMALL


def reservation_of(request: bytes) -> bytes:
    """Return the name of a request's reservation among the records. No entry ref begins with ``r:``.

    It does not reveal the request's id, which is the secret of a call: callers of the same backend can read the
    records.
    """
    return b"r:" + hashlib.sha1(request, usedforsecurity=False).hexdigest().encode()
