"""One replica as a member of a consumer group, for tests."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any
from unittest.mock import patch

from penstock.broker.queue.consumer_group import ConsumerGroup
from penstock.broker.queue.group import replica_lease
from penstock.broker.queue.group.pending_entries import RedeliveredEntry
from penstock.broker.queue.group.replica_lease import ReplicaLease
from penstock.broker.queue.leases import RENEW_S
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys
from penstock.broker.wire.requests import Entry

TAG = "model"
Joining = Callable[..., Awaitable["Replica"]]
Publish = Callable[..., Awaitable[list[bytes]]]
CountLeft = Callable[[], Awaitable[tuple[int, int]]]


class Replica:
    """One replica as a member of the consumer group."""

    def __init__(self, commands: RedisConnection, reads: RedisConnection, keys: Keys, name: str) -> None:
        self.name = name
        self.group = ConsumerGroup(commands, reads, keys, TAG, name)
        self._commands, self._lease = commands, keys.alive(TAG, name)

    async def claim(self, up_to: int = 10) -> dict[bytes, str]:
        """Return the claimed entries: entry ref to request id."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.group.claimer.claim(up_to, future.set_result)
        result = await future
        if isinstance(result, Exception):
            raise result
        return {ref: Entry.of(fields).id for ref, fields in result}

    async def claim_one(self) -> None:
        """Claim one entry, readable or not."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.group.claimer.claim(1, future.set_result)
        assert len(await future) == 1

    async def pending(self) -> dict[bytes, str | None]:
        pending = await self.group.pending.reclaim(await self.group.pending.own_refs())
        return {one.ref: None if one.fields is None else Entry.of(one.fields).id for one in pending}

    async def live(self, *, since_s: float = 5.0, renewed_s: float = 0.0) -> None:
        """Hold a lease that was renewed from ``since_s`` to ``renewed_s`` seconds ago."""
        await hold_lease(self.group.lease, since_s=since_s, renewed_s=renewed_s)

    async def die(self) -> None:
        """Delete the lease, as its expiry does."""
        await self._commands.send("DEL", self._lease)

    async def redeliver(self, *dead: str) -> RedeliveredEntry | None:
        """Claim an entry of replicas that may be dead."""
        return await self.group.pending.claim_redelivered([name.encode() for name in dead])


async def hold_lease(lease: ReplicaLease, *, since_s: float = 5.0, renewed_s: float = 0.0) -> None:
    """Renew a lease as from ``since_s`` to ``renewed_s`` seconds ago."""
    ago_s = since_s
    while True:
        with patch.object(replica_lease, "monotonic", lambda: time.monotonic() - ago_s):  # noqa: B023 - called at once
            await lease.renew()
        if ago_s <= renewed_s:
            return
        ago_s = max(renewed_s, ago_s - RENEW_S)
