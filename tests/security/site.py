"""An instance whose every part is a user of its own, under the rules of ``docs/security.md``."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from penstock.broker.registry.records import BackendRecord, BackendSpec, Change, EndpointRecord
from penstock.broker.registry.store import Registry
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys
from penstock.proxy.proxy import Proxy
from penstock.workers.executing.user_code import dump
from penstock.workers.serving import Serving
from tests.support.guarded import Guarded

KEYS = Keys("default")
CONFIG: dict[str, Any] = {"max_queued_requests": 10_000, "max_deliveries": 3}


def echo(request: Any) -> Any:
    return request.data


async def slowly(request: Any) -> Any:
    await asyncio.sleep(0.3)
    return request.data


class Site:
    """An instance whose every part is a user of its own."""

    def __init__(self, broker: Guarded, registry: Registry, parts: AsyncExitStack) -> None:
        self.broker, self.registry, self._parts = broker, registry, parts

    async def serve(self, target: Any, tag: str = "f", replicas: int = 1, **config: Any) -> list[Serving]:
        code = await self.registry.put_code(dump(target))
        backend = BackendRecord(tag=tag, version="1", code=code, config=BackendSpec(**{**CONFIG, **config}))
        endpoint = EndpointRecord(name=tag, route=f"/{tag}", methods=("GET", "POST"), traffic={tag: 1.0})
        await self.registry.change(lambda seen: Change({tag: backend}, {tag: endpoint}))
        started = [Serving(self.broker.url("replica"), "default", tag, f"{tag}#{n}") for n in range(replicas)]
        for replica in started:
            self._parts.push_async_callback(replica.drain, 0.0)
            await replica.ready()
        return started

    async def proxy(self) -> str:
        proxy = Proxy(self.broker.url("proxy"), "default", "p", {"port": 0})
        self._parts.push_async_callback(proxy.drain, 0.2)
        return str((await proxy.ready())["url"])

    async def declare(self, tag: str = "f", **config: Any) -> BackendRecord:
        """Make a backend and its endpoint, without anybody to serve it."""
        backend = BackendRecord(tag=tag, version="1", code="", config=BackendSpec(**{**CONFIG, **config}))
        endpoint = EndpointRecord(name=tag, traffic={tag: 1.0})
        await self.registry.change(lambda seen: Change({tag: backend}, {tag: endpoint}))
        return backend


@asynccontextmanager
async def open_site(broker: Guarded) -> AsyncGenerator[Site]:
    async with AsyncExitStack() as parts:
        connection = await RedisConnection(broker.url("owner")).open()
        parts.push_async_callback(connection.close)
        yield Site(broker, Registry(connection, KEYS), parts)
