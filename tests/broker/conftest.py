from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.registry.store import Registry
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys

Connect = Callable[..., Awaitable[RedisConnection]]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Opens connections that are closed after the test."""
    async with AsyncExitStack() as connections:

        async def connect(url: str, patience_s: float | None = None, **options: Any) -> RedisConnection:
            connection = await RedisConnection(url, **options).open()
            connections.push_async_callback(connection.close)
            if patience_s is not None:
                connection.patience_s = patience_s  # not before: a busy machine takes its time to connect
            return connection

        yield connect


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    """A server of the test's own, to be hurt."""
    with EmbeddedServer.start() as server:
        yield server


@pytest.fixture
def keys() -> Keys:
    return Keys("test")


@pytest.fixture
async def commands(broker_url: str, connect: Connect, keys: Keys) -> AsyncIterator[RedisConnection]:
    """A connection to each kind of broker in turn; what the test leaves in the instance of `keys` is erased."""
    connection = await connect(broker_url)
    yield connection
    await Registry(connection, keys).erase()
