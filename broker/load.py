"""How much a backend has to do, as its broker counts it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from .claims import GROUP
from .commands import Script
from .connection import Connection
from .keys import Keys

# KEYS: the streams. ARGV: the group. Answers how many entries are unsettled, and how many of them replicas hold.
_LOAD = Script("""#!lua flags=no-writes
local unsettled, held = 0, 0
for _, stream in ipairs(KEYS) do
  unsettled = unsettled + redis.call('XLEN', stream)
  if redis.call('EXISTS', stream) == 1 then
    for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
      if group[2] == ARGV[1] then held = held + group[6] end
    end
  end
end
return {unsettled, held}
""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests of one backend, over all callers."""

    unsettled: int
    """Waiting and running."""
    in_progress: int
    """Those of them that replicas hold."""


async def load_of(connection: Connection, keys: Keys, backend: str) -> Load:
    """Count the requests of ``backend``. Raises `BrokerUnavailable`."""
    streams = [keys.requests(backend), keys.batch(backend)]
    unsettled, held = cast("list[int]", await connection.run_script(_LOAD, streams, [GROUP], repeat=True))
    # What a caller withdrew while it ran is still held, and no longer counted.
    return Load(unsettled=unsettled, in_progress=min(held, unsettled))
