"""A connection that is cut at a moment of one's choice: a request is answered all the same, and runs once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from penstock.broker.wire.keys import Keys
from tests.faults.injected.tcp_proxy import TcpProxy
from tests.support.waiting import wait_until_async
from tests.workers.serving import TAG, calling, serving

PHASES = ("before it is sent", "as it is sent", "while it runs", "as it is answered")


@pytest.mark.parametrize("whose", ["caller", "replica", "both"])
@pytest.mark.parametrize("phase", PHASES)
async def test_a_cut_costs_time_and_not_the_answer(redis_url: str, phase: str, whose: str) -> None:
    started, release = asyncio.Event(), asyncio.Event()
    ran: list[bytes] = []

    async def work(request: Any) -> Any:
        ran.append(request.data)
        started.set()
        await release.wait()
        return request.data

    with TcpProxy(redis_url) as callers, TcpProxy(redis_url) as replicas:
        ways = {"caller": [callers], "replica": [replicas], "both": [callers, replicas]}[whose]

        async def cut_if(now: str) -> None:
            if now != phase:
                return
            for way in ways:
                way.cut(1.0)
            await wait_until_async(lambda: all(way.cuts for way in ways))

        async with (
            calling(callers.url) as client,
            serving(replicas.url, work) as worker,
            Redis.from_url(redis_url) as redis,
        ):
            await cut_if("before it is sent")
            _, answer = client.call(b"x", timeout_s=20)
            await asyncio.sleep(0)  # it has been written, and nothing has been heard of it
            await cut_if("as it is sent")
            await asyncio.wait_for(started.wait(), 10)
            await cut_if("while it runs")
            release.set()
            await asyncio.sleep(0)
            await cut_if("as it is answered")
            assert (await asyncio.wait_for(answer, 20)).body == b"x"
            await wait_until_async(lambda: worker.in_progress == 0)

            async def is_settled() -> bool:
                return await redis.xlen(Keys("default").requests(TAG)) == 0

            await wait_until_async(is_settled)
    assert ran == [b"x"]
