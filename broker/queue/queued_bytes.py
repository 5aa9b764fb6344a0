"""Byte accounting of a backend's queue: how much memory its unsettled requests take, exact at the broker.

A request is charged for its head and its body, wherever the body lies, and for at least `SMALL` bytes. The charge of a
queue is therefore ``SMALL`` for each entry on its streams plus what larger requests take beyond that. Only these have a
record: a field of one hash for each backend, written by the script that appends the entry and deleted by the script
that removes it, so that neither a death nor a repeated command can count one twice. The first `SET_ASIDE` requests of
a queue are charged as if they were there, so that a short queue of small requests costs nothing more.

The body of a large request (claim check) is stored before its entry is appended. Its bytes are reserved before that, so
that bodies of refused requests never reach the broker. A reservation lapses when its caller dies.
"""

from __future__ import annotations

import hashlib

from ..transport.commands import Script

SMALL = 4 * 1024
"""The least that a request is charged, in bytes."""

SET_ASIDE = 16
"""The room of so many small requests is always charged, so that they can be published without a look at the records."""

NO_LIMIT = 2**53
"""More than any queue can have, and still exact in Lua."""

RESERVATION_S = 60
"""How long a reservation holds that its caller does not use: the time that the largest body may take to be stored."""

_CHECK_S = 1
"""While requests are refused for their size, look this often for records whose entry is gone."""

# Deletes the records of ``refs``, and what they held from the total.
RELEASE = """
local function release(records, places)
  local freed = 0
  for _, place in ipairs(places) do
    local held = redis.call('HGET', records, place)
    if held then
      redis.call('HDEL', records, place)
      freed = freed + string.match(held, '^%d+')
    end
  end
  if freed > 0 and redis.call('HINCRBY', records, 'total', -freed) <= 0 then redis.call('DEL', records) end
end
"""

# Forgets the records of entries that something else than our scripts removed, such as XTRIM, and of reservations that
# lapsed; returns the new total, or nothing if it was called within the last second. What lies before the oldest entry
# of its stream is gone; a user that may not read the streams only sees whether they are empty. Scripts define this
# function only where they need it: to define it costs as much as a command.
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
    local place, bytes, since = all[i], string.match(all[i + 1], '^(%d+):?(%d*)$')
    if place ~= 'total' and place ~= 'checked' then
      local gone
      if since ~= '' then
        gone = now - since > {RESERVATION_S * 1000}
      else
        local on_batch, ms, n = string.match(place, '^(b?)(%d+)-(%d+)$')
        local oldest = first[on_batch == 'b' and 2 or 1]
        ms, n = tonumber(ms), tonumber(n)
        gone = not oldest or ms < oldest[1] or (ms == oldest[1] and n < oldest[2])
      end
      if gone then redis.call('HDEL', records, place) else total = total + bytes end
    end
  end
  redis.call('HSET', records, 'total', total, 'checked', now)
  return total
end
"""

# Returns how many milliseconds ago the oldest entry of two streams was accepted; 0 to a user that may not read them.
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

# Reserves room for the body of a request that is about to be stored and published. KEYS: the interactive stream, the
# batch stream, the records. ARGV: the limit of requests, the limit of bytes, the request's id, its bytes. Answers
# nothing if it fits; else what _PUBLISH of broker/queue/publisher.py answers for a refused request.
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

# Deletes records. KEYS: the records. ARGV: places, or reservations.
FORGET = Script(f"""#!lua flags=allow-oom
{RELEASE}
release(KEYS[1], ARGV)
return 0
""")

# Takes an entry from its stream, with its record. KEYS: the stream, the records. ARGV: the entry's id, its place.
WITHDRAW = Script(f"""#!lua flags=allow-oom
{RELEASE}
release(KEYS[2], {{ARGV[2]}})
return redis.call('XDEL', KEYS[1], ARGV[1])
""")


def most_bytes(limit_bytes: int) -> int:
    """Return how many bytes the head and the body of one request may have under a queue's limit."""
    return limit_bytes - (SET_ASIDE - 1) * SMALL


def reservation_of(request: bytes) -> bytes:
    """Return the name of a request's reservation among the records. No place of an entry begins like it.

    It does not show the request's id, which is the secret of a call: callers of the same backend may read the records.
    """
    return b"r:" + hashlib.sha1(request, usedforsecurity=False).hexdigest().encode()
