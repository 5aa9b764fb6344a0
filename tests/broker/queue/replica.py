"""One replica as a member of a consumer group, for tests."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from penstock.broker.queue.consumer_group import ConsumerGroup
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

    async def live(self) -> None:
        await self._commands.send("SET", self._lease, "1", "PX", 60_000)

    async def die(self) -> None:
        """Delete the lease, as its expiry does."""
        await self._commands.send("DEL", self._lease)
