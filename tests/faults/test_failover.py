"""Another server becomes the primary, and the connections to the old one stay open: every part follows."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest

from penstock import handles
from penstock.handles.calls.shared_client import SharedClient
from penstock.handles.errors import BrokerUnavailable
from penstock.proxy.proxy import Proxy
from tests.faults.conftest import Scale, StartClient
from tests.faults.injected.failover import Pair, pair
from tests.faults.load.backends import Journal
from tests.faults.load.table import Row, Table
from tests.faults.load.traffic import traffic
from tests.faults.test_deaths import check, every, serve_work
from tests.support.waiting import wait_until_async
from tests.workers.serving import declared, serving

RECOVERED_S = 5.0
BUSY_S = 5.0
"""What other programs of the machine may add to that."""


@pytest.fixture
def brokers_in_turn() -> Iterator[Pair]:
    with pair() as brokers:
        yield brokers


class Way:
    """Calls ``call`` again and again, and keeps when it was answered."""

    def __init__(self, call: Callable[[str], Awaitable[Any]]) -> None:
        self._call = call
        self.answered_at = 0.0
        self.answered = self.refused = 0
        self.wrong: list[object] = []

    async def run(self) -> None:
        while True:
            name = f"r{self.answered + self.refused}"
            try:
                answer = await self._call(name)
            except BrokerUnavailable:
                self.refused += 1
                await asyncio.sleep(0.02)
            else:
                if answer == name:
                    self.answered_at = time.monotonic()
                    self.answered += 1
                else:
                    self.wrong.append(answer)


async def test_every_kind_of_connection_follows_the_primary(
    brokers_in_turn: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    url = brokers_in_turn.url
    held, release = asyncio.Event(), asyncio.Event()
    runs = 0

    async def work(request: Any) -> Any:
        nonlocal runs
        if request.data == "held":
            runs += 1
            held.set()
            await release.wait()
        return request.data

    def in_batches() -> list[Any]:
        with handles.connect(url) as connection:
            return [result.value for result in connection.batch("echo", job="failover", window=8).map(items())]

    going_on = threading.Event()

    def items() -> Iterator[int]:
        for n in range(400):
            if n == 200:
                going_on.wait(60)
            yield n

    async with declared(url), serving(url, work, max_concurrent_queries=20), httpx.AsyncClient(timeout=30) as http:
        proxy = Proxy(url, "default", "p", {"port": 0})
        base = (await proxy.ready())["url"]
        connection = await asyncio.to_thread(handles.connect, url)
        sync = await asyncio.to_thread(connection.get_handle, "echo")
        asyncio_handle = connection.get_handle("echo", sync=False)

        async def by_http(name: str) -> str:
            response = await http.post(f"{base}/echo", json=name)
            if response.status_code == 503:
                assert int(response.headers["retry-after"]) >= 1
                raise BrokerUnavailable(url, "503")
            return response.text

        async def by_sync_handle(name: str) -> Any:
            return await asyncio.wrap_future(sync.remote(name))

        async def by_asyncio_handle(name: str) -> Any:
            return await (await asyncio_handle.remote(name))

        async def health() -> int:
            return (await http.get(f"{base}/-/healthz")).status_code

        ways = [Way(call) for call in (by_http, by_sync_handle, by_asyncio_handle)]
        calling = [asyncio.ensure_future(way.run()) for way in ways]
        batch = asyncio.ensure_future(asyncio.to_thread(in_batches))
        accepted = asyncio.ensure_future(by_asyncio_handle("held"))
        await asyncio.wait_for(held.wait(), 20)
        await wait_until_async(lambda: all(way.answered > 5 for way in ways))
        assert await health() == 200

        async def is_unhealthy() -> bool:
            return await health() == 503

        caplog.clear()
        await asyncio.to_thread(brokers_in_turn.demote)
        await wait_until_async(is_unhealthy)
        await asyncio.to_thread(brokers_in_turn.promote)
        promoted_at = brokers_in_turn.promoted_at
        await wait_until_async(lambda: all(way.answered_at > promoted_at for way in ways))
        took_s = time.monotonic() - promoted_at
        going_on.set()
        release.set()
        assert await asyncio.wait_for(batch, 60) == list(range(400))
        assert await asyncio.wait_for(accepted, 30) == "held"
        await wait_until_async(lambda: not brokers_in_turn.clients_of_the_replica())
        left_s = time.monotonic() - promoted_at
        assert await health() == 200
        for task in calling:
            task.cancel()
        await asyncio.wait(calling)
        assert [way.wrong for way in ways] == [[], [], []]
        assert [task for task in calling if not task.cancelled()] == []
        print(f"answered {took_s:.2f} s after the promotion, all connections moved after {left_s:.2f} s")
        assert took_s < RECOVERED_S + BUSY_S
        assert left_s < RECOVERED_S + 2 * BUSY_S
        assert runs == 1
        warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert [record.exc_info for record in warnings if record.exc_info] == []
        assert len(warnings) == 1, [record.getMessage() for record in warnings]
        await (await SharedClient.get(url, "default")).close()
        await asyncio.to_thread(connection.close)
        await proxy.drain(1.0)


async def test_a_proxy_that_starts_at_a_demoted_server_waits_for_the_primary(brokers_in_turn: Pair) -> None:
    await asyncio.to_thread(brokers_in_turn.demote)
    proxy = Proxy(brokers_in_turn.url, "default", "p", {"port": 0})
    starting = asyncio.ensure_future(proxy.ready())
    await wait_until_async(lambda: brokers_in_turn.visits > 3)
    assert not starting.done()
    await asyncio.to_thread(brokers_in_turn.promote)
    base = (await asyncio.wait_for(starting, 30))["url"]
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"{base}/-/healthz")).status_code == 200
    await proxy.drain(1.0)


# -- whole instances


def test_failovers_with_open_connections_lose_nothing(
    start: StartClient, brokers_in_turn: Pair, journal: Journal, scale: Scale, table: Table
) -> None:
    client = start(redis_url=brokers_in_turn.url)
    serve_work(client, journal)

    def fail_over() -> None:
        brokers_in_turn.demote()
        time.sleep(0.5)
        brokers_in_turn.promote()

    with traffic(client, rate=scale.rate, for_s=scale.for_s) as load:
        count = every(load, scale.every_s, fail_over)
    seen = load.outcomes
    twice = check(seen, journal)
    table.add(Row.of("failover, connections left open", scale.for_s, seen, twice=twice, notes=f"{count} failovers"))
    assert count > 0
    assert set(seen.refused) <= {"BrokerUnavailable"}
    assert len(seen.cut) == 0
    client.shutdown()
