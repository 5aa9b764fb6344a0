"""A Redis with a small ``proto-max-bulk-len``: longer bodies are refused, and no other call is affected."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from redis import Redis

from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.errors import ConfigError
from penstock.broker.registry.records import BackendRecord, Change, EndpointRecord
from penstock.handles.calls.shared_client import SharedClient
from penstock.handles.connection import Connection
from penstock.handles.errors import BackendError, PayloadTooLarge
from penstock.proxy.proxy import Proxy
from tests.handles.site import INSTANCE, Site

MIB = 1024 * 1024
TOO_LONG = 2 * MIB
SAID = rf"{TOO_LONG} bytes or more \(the most that Redis may take by its proto-max-bulk-len is {TOO_LONG - 1}\)"


@pytest.fixture
def redis_url() -> Iterator[str]:
    """A server with a limit of 1 MiB, for the fixtures of this file."""
    with EmbeddedServer.start() as server:
        with Redis.from_url(server.url) as redis:
            redis.config_set("proto-max-bulk-len", "1mb")
        yield server.url


def connections_made(url: str) -> int:
    with Redis.from_url(url) as redis:
        return int(redis.info("stats")["total_connections_received"])


async def slowly(request: Any) -> int:
    await asyncio.sleep(0.2)
    return len(request.data)


def answer_with(request: Any) -> str:
    return "x" * int(request.data)


def test_a_body_that_is_too_long_is_refused_and_other_calls_are_answered(site: Site, connected: Connection) -> None:
    site.serve(slowly)
    ask = connected.get_handle("ask")
    beside = [ask.remote("x" * n) for n in range(50)]
    with pytest.raises(PayloadTooLarge, match=SAID):
        ask.remote("x" * TOO_LONG).result(timeout=60)
    beside += [ask.remote("x" * n) for n in range(50, 100)]
    assert [future.result(timeout=60) for future in beside] == list(range(100))
    assert ask.remote("x" * MIB).result(timeout=60) == MIB


def test_a_length_that_was_refused_once_is_not_sent_again(site: Site, connected: Connection) -> None:
    site.serve(slowly)
    ask = connected.get_handle("ask")
    with pytest.raises(PayloadTooLarge):
        ask.remote("x" * TOO_LONG).result(timeout=60)
    ask.remote("x").result(timeout=60)  # connected again
    before = connections_made(site.url)
    for longer in range(20):
        with pytest.raises(PayloadTooLarge, match=f"{TOO_LONG + longer} bytes"):
            ask.remote("x" * (TOO_LONG + longer)).result(timeout=60)
    assert connections_made(site.url) == before + 1  # the one that counts


def test_a_batch_continues_without_the_items_that_are_too_long(site: Site, connected: Connection) -> None:
    site.serve(slowly, max_concurrent_queries=50)
    items = ["x" * (TOO_LONG if n % 10 == 5 else n) for n in range(40)]
    results = list(connected.batch("ask").map(items))
    assert [type(result.error) for result in results if result.index % 10 == 5] == [PayloadTooLarge] * 4
    assert [result.get() for result in results if result.index % 10 != 5] == [n for n in range(40) if n % 10 != 5]


def test_a_reply_that_is_too_long_is_an_error_of_the_backend(site: Site, connected: Connection) -> None:
    site.serve(answer_with)
    ask = connected.get_handle("ask")
    for _ in range(2):  # the second time the replica knows the limit
        with pytest.raises(BackendError, match=f"PayloadTooLarge: the body has {SAID}"):
            ask.remote(TOO_LONG).result(timeout=60)
    assert ask.remote(MIB).result(timeout=60) == "x" * MIB


async def test_a_body_that_is_too_long_is_a_413_over_http(redis_url: str) -> None:
    owner = await SharedClient.get(redis_url, INSTANCE)
    backend = BackendRecord(tag="f", version="1", code="")
    endpoint = EndpointRecord(name="e", route="/e", methods=("POST",), traffic={"f": 1.0})
    await owner.registry.change(lambda seen: Change({"f": backend}, {"e": endpoint}))
    proxy = Proxy(redis_url, INSTANCE, "p", {"port": 0})
    report = await proxy.ready()
    async with httpx.AsyncClient(base_url=str(report["url"]), timeout=60) as http:
        for _ in range(2):
            answer = await http.post("/e", content=bytes(TOO_LONG))
            assert answer.status_code == 413
            assert answer.json()["error"]["type"] == "PayloadTooLarge"
    await proxy.drain(0.2)
    await owner.close()


async def test_code_that_is_too_long_is_refused_when_it_is_deployed(redis_url: str) -> None:
    owner = await SharedClient.get(redis_url, INSTANCE)
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"{TOO_LONG} bytes of code .* is {TOO_LONG - 1} or less\)"):
            await owner.registry.put_code(bytes(TOO_LONG))
    digest = await owner.registry.put_code(bytes(MIB))
    assert await owner.registry.get_code(digest) == bytes(MIB)
    await owner.close()
