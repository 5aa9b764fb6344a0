from collections.abc import Awaitable, Callable

import pytest

from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys
from penstock.broker.wire.requests import Entry, Header
from tests.broker.conftest import Connect
from tests.broker.queue.replica import TAG, Joining, Replica


@pytest.fixture
def join(broker_url: str, commands: RedisConnection, connect: Connect, keys: Keys) -> Joining:
    """Makes replicas with a lease."""

    async def join(name: str) -> Replica:
        replica = Replica(commands, await connect(broker_url), keys, name)
        await replica.group.ensure()
        await replica.live()
        return replica

    return join


@pytest.fixture
def publish(commands: RedisConnection, keys: Keys) -> Callable[..., Awaitable[list[bytes]]]:
    async def publish(*ids: str) -> list[bytes]:
        return [
            await commands.send("XADD", keys.requests(TAG), "*", *Entry(id_, "me", Header()).fields()) for id_ in ids
        ]

    return publish


@pytest.fixture
def left(commands: RedisConnection, keys: Keys) -> Callable[[], Awaitable[tuple[int, int]]]:
    """Counts the entries on the stream, and the pending ones."""

    async def left() -> tuple[int, int]:
        pending = await commands.send("XPENDING", keys.requests(TAG), "replicas")
        return await commands.send("XLEN", keys.requests(TAG)), pending[0]

    return left
