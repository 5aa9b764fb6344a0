"""Prefetching while a call of blocking code runs, on a real broker."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from penstock.broker.queue.group.member import GROUP, RETURNED
from penstock.workers.consuming.policies import prefetch
from penstock.workers.replica import Replica
from tests.support.waiting import wait_until_async
from tests.workers.serving import TAG, Client, calling, serving


@pytest.fixture
def seen_as_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all calls count as similar and short, however busy this machine is."""
    monkeypatch.setattr(prefetch, "_MAX_SPREAD_S", 60.0)
    monkeypatch.setattr(prefetch, "_MAX_CALL_S", 60.0)


class Steady:
    """A blocking backend whose calls take 20 ms, except for the one that waits."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.worker: Replica | None = None
        self.most_held = 0

    def function(self, request: Any) -> Any:
        if request.data == b"wait":
            self.release.wait(30)
        else:
            time.sleep(0.02)
        if self.worker is not None:
            self.most_held = max(self.most_held, self.worker.in_progress)
        return request.data

    async def becomes_known(self, client: Client, worker: Replica) -> None:
        for _ in range(10):
            await client.ask(b"x")
        self.worker = worker


@pytest.mark.usefixtures("seen_as_steady")
async def test_steady_code_has_the_next_request_when_a_call_ends(redis_url: str) -> None:
    steady = Steady()
    async with calling(redis_url) as client, serving(redis_url, steady.function) as worker:
        await steady.becomes_known(client, worker)
        replies = await asyncio.gather(*(client.ask(b"%d" % n) for n in range(20)))
        assert [reply.body for reply in replies] == [b"%d" % n for n in range(20)]
    assert steady.most_held == 2


async def test_unsteady_code_has_no_request_waiting(redis_url: str) -> None:
    most_held = 0

    def unsteady(request: Any) -> None:
        nonlocal most_held
        time.sleep(0.015 if int(request.data) % 2 else 0.06)
        most_held = max(most_held, worker.in_progress)

    async with calling(redis_url) as client, serving(redis_url, unsteady) as worker:
        await asyncio.gather(*(client.ask(b"%d" % n) for n in range(24)))
    assert most_held == 1


@pytest.mark.usefixtures("seen_as_steady")
async def test_a_request_prefetched_behind_a_slow_call_moves_to_another_replica(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "_MAX_OVERRUN_S", 0.5)  # time for the claim, however busy this machine is
    steady = Steady()
    async with calling(redis_url) as client, serving(redis_url, steady.function) as first:
        await steady.becomes_known(client, first)
        (slow_call, slow), (_, other) = client.call(b"wait"), client.call(b"x")
        await slow_call.accepted()
        await wait_until_async(lambda: _given_back(client, 1))
        assert first.in_progress == 1
        async with serving(redis_url, steady.function):
            assert (await asyncio.wait_for(other, 10)).body == b"x"
            replies = await asyncio.wait_for(asyncio.gather(*(client.ask(b"x") for _ in range(20))), 20)
            assert len(replies) == 20
            assert not slow.done()
            steady.release.set()
            assert (await slow).body == b"wait"


@pytest.mark.usefixtures("seen_as_steady")
async def test_a_drained_replica_gives_back_prefetched_requests(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "_MAX_OVERRUN_S", 60.0)
    steady = Steady()
    async with calling(redis_url) as client, serving(redis_url, steady.function) as first:
        await steady.becomes_known(client, first)
        (_, slow), (_, other) = client.call(b"wait"), client.call(b"x")
        await wait_until_async(lambda: first.in_progress == 2)
        async with serving(redis_url, steady.function):
            draining = asyncio.create_task(first.drain(20))
            assert (await asyncio.wait_for(other, 10)).body == b"x"
            assert not draining.done()
            steady.release.set()
            assert await draining
            assert (await slow).body == b"wait"


@pytest.mark.usefixtures("seen_as_steady")
async def test_nothing_is_prefetched_while_batch_items_wait(redis_url: str) -> None:
    steady = Steady()
    async with calling(redis_url) as client, serving(redis_url, steady.function) as worker:
        await steady.becomes_known(client, worker)
        calls = [client.call(b"x", batch=True) for _ in range(20)]
        await asyncio.gather(*(answer for _, answer in calls))
    assert steady.most_held == 1


async def _given_back(client: Client, count: int) -> bool:
    consumers = await client.redis.xinfo_consumers(client.caller.keys.requests(TAG), GROUP)
    return sum(int(one["pending"]) for one in consumers if one["name"] == RETURNED.encode()) == count
