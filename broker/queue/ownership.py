"""Exclusive leases: one owner at a time for an instance or a batch job.

Unlike a replica's sign of life (``broker/queue/leases.py``), such a one is renewed over the connection of its holder.
"""

from __future__ import annotations

from ..transport.commands import Script
from ..transport.connection import RedisConnection

# KEYS: owner. ARGV: who, milliseconds. Taken if nobody has it or it is ours already.
_OWN = Script("""#!lua flags=allow-oom
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
""")

_DISOWN = Script("""#!lua flags=allow-oom
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
""")


async def acquire_ownership(connection: RedisConnection, key: str, owner: str, ttl_s: float) -> bool:
    """Take or renew the lease for ``ttl_s`` seconds; False if somebody else holds it."""
    return bool(await connection.run_script(_OWN, [key], [owner, int(ttl_s * 1000)], repeat=True))


async def release_ownership(connection: RedisConnection, key: str, owner: str) -> None:
    """Let go of it, if it is ours."""
    await connection.run_script(_DISOWN, [key], [owner], repeat=True)
