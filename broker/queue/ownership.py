"""Ownership: an exclusive lease, which gives an instance or a batch job one owner at a time.

Unlike the lease of a replica (``broker/queue/leases.py``), it is renewed over the connection of its owner.
"""

from __future__ import annotations

from ..transport.commands import Script
from ..transport.connection import RedisConnection

# Acquires or renews the lease. KEYS: the lease. ARGV: the owner, milliseconds. Returns 0 if it has another owner.
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
    """Acquire or renew the lease for ``ttl_s`` seconds; return False if another owner holds it."""
    return bool(await connection.run_script(_OWN, [key], [owner, int(ttl_s * 1000)], repeat=True))


async def release_ownership(connection: RedisConnection, key: str, owner: str) -> None:
    """Release the lease if ``owner`` holds it."""
    await connection.run_script(_DISOWN, [key], [owner], repeat=True)
