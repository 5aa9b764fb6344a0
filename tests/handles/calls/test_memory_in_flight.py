"""Memory that a caller holds for each call in flight, counted by tracemalloc."""

import asyncio
import gc
import tracemalloc
from typing import Any, cast

import pytest

from penstock.broker.wire import exact_json
from penstock.handles import AsyncServeHandle
from penstock.handles.calls.shared_client import SharedClient
from tests.handles.site import INSTANCE, Site

CALLS = 2_000


def held_bytes() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize("options", [{}, {"timeout_s": 600}, {"shard_key": "me"}])
async def test_a_call_in_flight_takes_little_memory(site: Site, options: dict[str, Any]) -> None:
    site.declare("ask")
    handle = cast("Any", AsyncServeHandle(site.url, INSTANCE, "ask")).options(**options)

    async def queue(count: int) -> list[asyncio.Future[Any]]:
        return [future for _ in range(count // 100) for future in await asyncio.gather(*(call() for _ in range(100)))]

    async def call() -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = await handle.remote({"n": 1})
        return future

    warm = await queue(200)  # what is made once: the connection, the headers of the handle, the checked futures
    tracemalloc.start()
    try:
        before = held_bytes()
        futures = await queue(CALLS)
        per_call = (held_bytes() - before) / CALLS
    finally:
        tracemalloc.stop()
    assert per_call < 1_200
    for future in warm + futures:
        future.cancel()
    await (await SharedClient.get(site.url, INSTANCE)).close()


@pytest.mark.parametrize("length", [0, 1, 100, 1_000, 10_000, 100_000])
def test_compacted_json_is_the_same_and_takes_no_more_than_needed(length: int) -> None:
    written = exact_json.dumps("a" * length)
    tracemalloc.start()
    try:
        compacted = exact_json.compact(written)
        copied = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert compacted == written
    assert copied < len(written) + 200
