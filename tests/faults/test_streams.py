"""Whatever happens to the broker in the middle of an answer that streams: it goes on, or ends with an error by name."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.queue.flow_control import WINDOW
from penstock.handles.async_handle import AsyncServeHandle
from penstock.handles.errors import BrokerUnavailable, PenstockError, StreamBroken
from tests.faults.injected.tcp_proxy import TcpProxy
from tests.proxy.site import INSTANCE
from tests.proxy.test_response_streaming import Serving, serve
from tests.support.waiting import wait_until_async

ENDS_S = 60.0
"""Nothing hangs: it is over long before that, also on a machine that is busy."""

READERS = ["handle", "http"]


class Reading:
    """Who reads one answer, from its first value to its end."""

    def __init__(self, served: Serving, url: str, reader: str) -> None:
        self.got: list[int] = []
        self.error: PenstockError | httpx.RemoteProtocolError | None = None
        values = _by_handle(url) if reader == "handle" else _by_http(served.http)
        self.task = asyncio.create_task(self._read(values))

    async def _read(self, values: AsyncIterator[int]) -> None:
        try:
            async for value in values:
                self.got.append(value)
        except (PenstockError, httpx.RemoteProtocolError) as e:
            self.error = e

    async def has(self, count: int) -> None:
        await wait_until_async(lambda: self.task.done() or len(self.got) >= count, ENDS_S)

    async def end(self) -> None:
        await asyncio.wait_for(self.task, ENDS_S)


async def _by_handle(url: str) -> AsyncIterator[int]:
    handle = AsyncServeHandle(url, INSTANCE, "s").options(stream=True)
    stream: Any = await handle.remote()
    async for value in stream:
        yield value["n"]


async def _by_http(http: httpx.AsyncClient) -> AsyncIterator[int]:
    async with http.stream("GET", "/s", timeout=ENDS_S) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            yield json.loads(line)["n"]


class Ticking:
    """A backend that counts until there is enough."""

    def __init__(self) -> None:
        self.enough, self.made, self.running = asyncio.Event(), 0, 0

    async def __call__(self, request: Any) -> AsyncIterator[dict[str, int]]:
        self.running += 1
        try:
            while not self.enough.is_set():
                yield {"n": self.made}
                self.made += 1
                await asyncio.sleep(0.001)
        finally:
            self.running -= 1


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def forgetful() -> Iterator[EmbeddedServer]:
    """A server of the test's own that has lost everything when it is started again."""
    with EmbeddedServer.start() as server:
        yield server


async def kill(broker: EmbeddedServer) -> None:
    """With -9; return when it is there again."""
    pid = broker.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await wait_until_async(lambda: broker.pid not in (None, pid), 30)


async def cut(between: TcpProxy) -> None:
    """Cut all that there is; return when it is."""
    before = between.cuts
    between.cut(1.0)
    await wait_until_async(lambda: between.cuts > before, ENDS_S)


def named(reading: Reading, caplog: pytest.LogCaptureFixture) -> bool:
    """Whether a reader was told why, or over HTTP the connection ended early and the log says why."""
    if isinstance(reading.error, httpx.RemoteProtocolError):
        return any("is cut off: " in one.getMessage() for one in caplog.records if one.name == "penstock.proxy")
    return isinstance(reading.error, (StreamBroken, BrokerUnavailable))


async def assert_all_came_or_why_not(
    reading: Reading, ticking: Ticking, served: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    """What came is in order and whole, or its reader was told; and nothing is left of it."""
    assert reading.got == list(range(len(reading.got)))
    if reading.error is None:
        assert len(reading.got) == ticking.made
    else:
        assert named(reading, caplog), reading.error
    await wait_until_async(served.is_idle, ENDS_S)
    assert ticking.running == 0


async def test_streams_go_on_after_the_broker_restarts(
    broker: EmbeddedServer, reader: str, caplog: pytest.LogCaptureFixture
) -> None:
    ticking = Ticking()
    async with serve(broker.url, "direct", ticking.__call__) as served:
        reading = Reading(served, broker.url, reader)
        await reading.has(20)
        await kill(broker)
        await reading.has(len(reading.got) + 20)
        ticking.enough.set()
        await reading.end()
        await assert_all_came_or_why_not(reading, ticking, served, caplog)
        # And the next one comes whole.
        ticking.enough.clear()
        begun_at = ticking.made
        after = Reading(served, broker.url, reader)
        await after.has(5)
        ticking.enough.set()
        await after.end()
        assert after.error is None
        assert after.got == list(range(begun_at, ticking.made))


async def test_streams_end_with_an_error_after_the_broker_lost_its_data(
    forgetful: EmbeddedServer, reader: str, caplog: pytest.LogCaptureFixture
) -> None:
    ticking = Ticking()
    async with serve(forgetful.url, "direct", ticking.__call__) as served:
        reading = Reading(served, forgetful.url, reader)
        await reading.has(20)
        await kill(forgetful)
        await reading.end()
        assert reading.got == list(range(len(reading.got)))
        assert named(reading, caplog), reading.error
        # What makes the values has heard of it too.
        await wait_until_async(lambda: ticking.running == 0 and served.worker.in_progress == 0, ENDS_S)


async def test_streams_go_on_after_every_connection_is_cut(
    redis_url: str, reader: str, caplog: pytest.LogCaptureFixture
) -> None:
    ticking = Ticking()
    with TcpProxy(redis_url) as between:
        async with serve(between.url, "direct", ticking.__call__) as served:
            reading = Reading(served, between.url, reader)
            for _ in range(3):
                await reading.has(len(reading.got) + 20)
                await cut(between)
            await reading.has(len(reading.got) + 20)
            ticking.enough.set()
            await reading.end()
            await assert_all_came_or_why_not(reading, ticking, served, caplog)


async def test_streams_survive_a_broker_without_memory(broker: EmbeddedServer, reader: str) -> None:
    """An answer of many windows is work that was accepted, and its reader's word must not be refused either."""
    full, pad, many = asyncio.Event(), "x" * 4096, 4 * WINDOW // 4096

    async def give(request: Any) -> AsyncIterator[dict[str, Any]]:
        for n in range(many):
            if n == 10:
                await full.wait()
            yield {"n": n, "pad": pad}

    async with serve(broker.url, "direct", give) as served, Redis.from_url(broker.url) as redis:
        reading = Reading(served, broker.url, reader)
        await reading.has(10)
        await redis.config_set("maxmemory", 1)
        try:
            full.set()
            await reading.end()
            assert reading.error is None
            assert reading.got == list(range(many))
            await wait_until_async(served.is_idle, ENDS_S)
        finally:
            await redis.config_set("maxmemory", 0)
