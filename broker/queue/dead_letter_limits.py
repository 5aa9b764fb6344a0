"""Limits of a backend's dead letters: how many are kept, and for how long. The oldest are dropped, and counted."""

from __future__ import annotations

from typing import Literal

from ..transport.commands import Script

MAX_AGE_S = 14 * 24 * 3600
"""Replicas drop dead letters that are older, once a minute."""

BODY_TTL_MS = (MAX_AGE_S + 24 * 3600) * 1000
"""Expiry of the large body of a dead letter, and of a request without a deadline, which may become one. The letter is
dropped earlier, with its body.
"""

DROPPED_FIELD = b"dead_dropped"
"""The field of the backend's sums that counts dropped dead letters; see ``broker/queue/stats.py``."""

DEAD_FIELD = b"dead:"
"""The beginning of the fields that count all dead letters by reason; a `DeadLetterReason` follows."""

DeadLetterReason = Literal["poison", "unreadable"]
"""The reason of a dead letter: every replica that ran it died, or it cannot be read."""

# A Lua function that drops the oldest of ``letters`` until there are at most ``most`` and none exceeds the age limit.
# Large bodies, whose keys begin with ``bodies``, are dropped with their letters. Returns how many were dropped.
DROP_OLDEST = f"""
local function drop_oldest(letters, sums, most, bodies)
  local time, dropped, left = redis.call('TIME'), 0, redis.call('XLEN', letters)
  local earliest = time[1] * 1000 - {MAX_AGE_S * 1000}
  while left > 0 do
    local letter = redis.call('XRANGE', letters, '-', '+', 'COUNT', 1)[1]
    if left <= most and tonumber(string.match(letter[1], '^%d+')) >= earliest then break end
    local id, large
    for i = 1, #letter[2], 2 do
      if letter[2][i] == 'id' then id = letter[2][i + 1] end
      if letter[2][i] == 'large' then large = letter[2][i + 1] == '1' end
    end
    if id and large then redis.call('UNLINK', bodies .. id) end
    redis.call('XDEL', letters, letter[1])
    dropped, left = dropped + 1, left - 1
  end
  if dropped > 0 then redis.call('HINCRBY', sums, '{DROPPED_FIELD.decode()}', dropped) end
  return dropped
end
"""

# KEYS: the dead letters, the backend's sums. ARGV: the most letters to keep, the beginning of the keys of bodies.
DROP = Script(f"""#!lua flags=allow-oom
{DROP_OLDEST}
return drop_oldest(KEYS[1], KEYS[2], tonumber(ARGV[1]), ARGV[2])
""")
