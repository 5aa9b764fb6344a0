"""A fleet of a hundred replicas of one backend, of which some die."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from penstock.broker.queue.group.pending_entries import PendingEntries, Swept
from penstock.broker.queue.leases import TTL_S
from penstock.broker.transport.session import IDLE_BLOCK_MS
from penstock.workers.replica import Replica
from tests.support.waiting import wait_until_async
from tests.workers.serving import TAG, Client, calling, serving, start_killable

FLEET = 100
PROMISED_S = 3.0
"""After the death of a replica, its requests are answered within this time."""
BUSY_S = 5.0
"""What a busy machine may add."""


@asynccontextmanager
async def fleet(url: str, function: Any, count: int) -> AsyncGenerator[None]:
    """Replicas in this loop whose leases prove deaths."""
    replicas: list[Replica] = []
    ended = asyncio.Event()

    async def run() -> None:
        async with serving(url, function) as replica:
            replicas.append(replica)
            await ended.wait()

    running = [asyncio.create_task(run()) for _ in range(count)]
    try:
        await wait_until_async(lambda: len(replicas) == count and all(map(_is_trusted, replicas)), timeout_s=60)
        yield
    finally:
        ended.set()
        await asyncio.gather(*running)


def _is_trusted(replica: Replica) -> bool:
    held_since_s = replica.lease_held_since_s
    return held_since_s is not None and asyncio.get_running_loop().time() - held_since_s > TTL_S


async def _is_settled(client: Client) -> bool:
    return await client.depth() == 0 and await client.claimed() == 0


async def _claimed(client: Client, count: int) -> bool:
    return await client.claimed() == count


async def _redelivery_s(client: Client, url: str, function: Any, count: int) -> float:
    """Kill a replica with requests while so many others are idle; return after how many seconds all have replies."""
    dying = await start_killable(url, "never")
    answers = [client.call(b"%d" % n)[1] for n in range(5)]
    await wait_until_async(lambda: _claimed(client, 5))
    async with fleet(url, function, count):
        await dying.kill()
        killed_s = asyncio.get_running_loop().time()
        assert {reply.status for reply in await asyncio.gather(*answers)} == {200}
        took_s = asyncio.get_running_loop().time() - killed_s
        await wait_until_async(lambda: _is_settled(client))
    return took_s


async def test_requests_of_a_replica_that_is_killed_in_a_fleet_are_answered_in_time(redis_url: str) -> None:
    ran: Counter[bytes] = Counter()

    async def count(request: Any) -> None:
        ran[request.data] += 1

    async with calling(redis_url) as client:
        assert await _redelivery_s(client, redis_url, count, FLEET - 1) < PROMISED_S + BUSY_S
    assert set(ran.values()) == {1}


async def test_redelivery_does_not_depend_on_a_replica_that_looks_and_never_finds(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if each replica of half the fleet died in its turn."""
    sweep, stuck = PendingEntries.sweep, set[int]()

    async def hang_at_times(pending: PendingEntries) -> Swept:
        if id(pending) in stuck or len(stuck) < 10:
            stuck.add(id(pending))
            await asyncio.Event().wait()
        return await sweep(pending)

    async def answer(request: Any) -> None:
        """Do nothing."""

    async with calling(redis_url) as client:
        monkeypatch.setattr(PendingEntries, "sweep", hang_at_times)
        assert await _redelivery_s(client, redis_url, answer, 20) < 10 * PROMISED_S + BUSY_S


async def test_a_fleet_that_is_busy_with_long_calls_leaves_the_redelivery_to_the_idle_replica(redis_url: str) -> None:
    release = threading.Event()
    done: list[bytes] = []

    def hold(request: Any) -> None:
        if request.data == b"long":
            release.wait(60)
        done.append(request.data)

    async with calling(redis_url) as client:
        dying = await start_killable(redis_url, "never")
        lost = [client.call(b"lost")[1] for _ in range(3)]
        await wait_until_async(lambda: _claimed(client, 3))
        async with fleet(redis_url, hold, 6):
            long = [client.call(b"long")[1] for _ in range(5)]
            await wait_until_async(lambda: _claimed(client, 8))
            await dying.kill()
            try:
                assert {reply.status for reply in await asyncio.wait_for(asyncio.gather(*lost), 20)} == {200}
                assert done == [b"lost"] * 3
            finally:
                release.set()
            await asyncio.gather(*long)
            await wait_until_async(lambda: _is_settled(client))


async def test_a_replica_has_three_connections(redis_url: str) -> None:
    async with calling(redis_url) as client:
        before = len(await client.redis.client_list())
        async with fleet(redis_url, len, 10):
            assert len(await client.redis.client_list()) - before == 30


async def test_an_idle_replica_reads_seldom(redis_url: str) -> None:
    """A reading that waits in vain, and the record of the backend that is read in case a signal was lost."""

    async def reads(client: Client) -> int:
        stats = await client.redis.info("commandstats")
        return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("xread", "xreadgroup", "hget"))

    async with calling(redis_url) as client, fleet(redis_url, len, 10):
        before, began_s = await reads(client), asyncio.get_running_loop().time()
        await wait_until_async(lambda: asyncio.get_running_loop().time() > began_s + IDLE_BLOCK_MS / 1000)
        after, took_s = await reads(client), asyncio.get_running_loop().time() - began_s
        # Once more at the beginning of the period, and once for each reading that ends in it; and the client's own.
        assert after - before <= 10 * 2 * (1 + took_s * 1000 / IDLE_BLOCK_MS) + 2 * took_s


async def test_a_replica_reads_again_when_its_other_connection_was_lost(redis_url: str) -> None:
    """Its server may be another one by now, or silent, which a reading that waits notices late."""

    async def echo(request: Any) -> Any:
        return request.data

    async with calling(redis_url) as client, serving(redis_url, echo) as replica:
        ids = {one["name"]: one["id"] for one in await client.redis.client_list()}
        claims, name = f"penstock-{replica.replica}-claims", f"penstock-{replica.replica}"
        await client.redis.client_kill_filter(_id=ids[name])

        async def read_again() -> bool:
            return ids[claims] not in {one["id"] for one in await client.redis.client_list()}

        await wait_until_async(read_again)
        assert (await client.call(b"x")[1]).body == b"x"


async def test_a_request_that_another_tool_has_claimed_is_redelivered(redis_url: str) -> None:
    """Its consumer has no lease."""

    async def echo(request: Any) -> Any:
        return request.data

    async with calling(redis_url) as client:
        call, answer = client.call(b"x")
        await call.accepted()
        stream = client.caller.keys.requests(TAG)
        await client.redis.xgroup_create(stream, "replicas", "0")
        assert await client.redis.xreadgroup("replicas", "tool", {stream: ">"})
        async with fleet(redis_url, echo, 1):
            assert (await asyncio.wait_for(answer, 20)).body == b"x"
