"""Batches on a real broker: full while requests wait, and without requests that an idle replica could run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from penstock import serve
from penstock.broker.queue.group.member import GROUP, RETURNED
from penstock.broker.wire._fields import LARGE
from penstock.workers.consuming.policies import batch_capacity
from penstock.workers.replica import Replica
from tests.support.waiting import wait_until_async
from tests.workers.serving import TAG, Client, calling, serving


class Gated:
    """A batch backend that records its batches, and whose calls end when the test lets them."""

    def __init__(self) -> None:
        self.batches: list[list[bytes]] = []
        self.running = self.most_running = 0
        """Calls on threads that have begun and not ended, and the most of them at a time."""
        self._permits, self._permits_on_loop = threading.Semaphore(0), asyncio.Semaphore(0)

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]

    @property
    def blocking(self) -> Any:
        def batch(requests: list[Any]) -> list[Any]:
            self.batches.append([request.data for request in requests])
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            self._permits.acquire(timeout=60)
            self.running -= 1
            return [b""] * len(requests)

        return serve.accept_batch(batch)

    @property
    def on_loop(self) -> Any:
        async def batch(requests: list[Any]) -> list[Any]:
            self.batches.append([request.data for request in requests])
            await self._permits_on_loop.acquire()
            return [b""] * len(requests)

        return serve.accept_batch(batch)

    def permit(self, calls: int = 1) -> None:
        for _ in range(calls):
            self._permits.release()
            self._permits_on_loop.release()

    def permit_all(self) -> None:
        self.permit(1_000)


class Load:
    """Requests that are sent again as soon as they have a reply."""

    def __init__(self, client: Client, in_flight: int, *, beside: int) -> None:
        self._client, self.in_flight = client, in_flight
        self.beside = beside
        """The number of other requests that are unsettled."""
        self._stopped = False

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(self._again_and_again()) for _ in range(self.in_flight)]
        await self.all_are_queued()
        return self

    async def all_are_queued(self) -> None:
        await wait_until_async(self._is_complete, timeout_s=30)

    async def __aexit__(self, *_: object) -> None:
        self._stopped = True
        await asyncio.wait_for(asyncio.gather(*self._tasks), 30)

    async def _again_and_again(self) -> None:
        while not self._stopped:
            await self._client.ask(b"x")

    async def _is_complete(self) -> bool:
        return await self._client.depth() == self.in_flight + self.beside


@asynccontextmanager
async def known(client: Client, url: str, gated: Gated, *, size: int, **config: Any) -> AsyncGenerator[Replica]:
    """A replica that has run a few batches, so that it predicts when one will end."""
    async with serving(url, gated.blocking, max_batch_size=size, **config) as worker:
        gated.permit(8)
        for _ in range(8):
            await client.ask(b"x")
        gated.batches.clear()
        yield worker
        gated.permit_all()


@pytest.fixture
def always_about_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each batch count as about to end from its start on, and never as overdue, however busy this machine is."""
    for name in ("_MIN_FETCH_S", "_MAX_FETCH_S", "_MAX_OVERRUN_S"):
        monkeypatch.setattr(batch_capacity, name, 600.0)


@pytest.fixture
def soon_overdue(always_about_to_end: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the claim for the next batch take half a second at most."""
    monkeypatch.setattr(batch_capacity, "_MAX_OVERRUN_S", 0.5)


@pytest.mark.parametrize("kind", ["blocking", "on_loop"])
@pytest.mark.parametrize(("at_a_time", "in_flight"), [(1, 128), (1, 200), (2, 256)])
async def test_batches_are_full_while_the_queue_is_long(
    redis_url: str, kind: str, at_a_time: int, in_flight: int
) -> None:
    gated = Gated()
    config: dict[str, Any] = {"max_batch_size": 64, "max_concurrent_queries": at_a_time}
    async with calling(redis_url) as client, serving(redis_url, getattr(gated, kind), **config):
        for alone in range(at_a_time):
            await _sent(client, b"alone")
            await wait_until_async(lambda: gated.sizes == [1] * (alone + 1))  # noqa: B023
        async with Load(client, in_flight, beside=at_a_time) as load:
            for ended in range(12):
                await asyncio.sleep(0.012)  # behind calls shorter than 10 ms, requests may wait for all of the call
                gated.permit()
                await wait_until_async(lambda: len(gated.batches) > ended + at_a_time)  # noqa: B023
                load.beside = max(0, load.beside - 1)
                await load.all_are_queued()
            assert gated.sizes == [1] * at_a_time + [64] * 12
            gated.permit_all()


async def test_batches_of_instant_calls_are_full(redis_url: str) -> None:
    gated = Gated()
    gated.permit_all()
    async with calling(redis_url) as client:
        answers = [client.call(b"x") for _ in range(64 * 20)]
        await asyncio.gather(*(call.accepted() for call, _ in answers))
        async with serving(redis_url, gated.blocking, max_batch_size=64):
            await asyncio.gather(*(answer for _, answer in answers))
    assert gated.sizes == [64] * 20


@pytest.mark.parametrize("kind", ["blocking", "on_loop"])
async def test_a_batch_waits_for_the_large_bodies_that_were_claimed_with_it(redis_url: str, kind: str) -> None:
    gated = Gated()
    gated.permit_all()
    async with calling(redis_url) as client:
        bodies = [b"%d" % n * (LARGE + 1) if n % 4 else b"%d" % n for n in range(8)]
        answers = [client.call(body) for body in bodies]
        await asyncio.gather(*(call.accepted() for call, _ in answers))
        async with serving(redis_url, getattr(gated, kind), max_batch_size=8, max_concurrent_queries=1):
            await asyncio.gather(*(answer for _, answer in answers))
    assert [sorted(batch) for batch in gated.batches] == [sorted(bodies)]


async def test_an_expired_body_does_not_delay_a_batch(redis_url: str) -> None:
    gated = Gated()
    gated.permit_all()
    async with calling(redis_url) as client:
        calls = [client.call(b"x" * (LARGE + 1)), client.call(b"small")]
        await asyncio.gather(*(call.accepted() for call, _ in calls))
        await client.redis.delete(client.caller.keys.body(TAG, calls[0][0].id))
        async with serving(redis_url, gated.blocking, max_batch_size=8):
            replies = await asyncio.gather(*(answer for _, answer in calls))
    assert [reply.status for reply in replies] == [500, 200]
    assert gated.batches == [[b"small"]]


@pytest.mark.parametrize("kind", ["blocking", "on_loop"])
async def test_no_request_waits_behind_a_running_batch_while_a_replica_is_idle(redis_url: str, kind: str) -> None:
    busy, idle = Gated(), Gated()
    idle.permit_all()
    config: dict[str, Any] = {"max_batch_size": 64, "max_concurrent_queries": 1}
    async with calling(redis_url) as client, serving(redis_url, getattr(busy, kind), **config) as first:
        _, slow = client.call(b"slow")
        await wait_until_async(lambda: len(busy.batches) == 1)
        others = [client.call(b"x") for _ in range(4)]
        await asyncio.gather(*(call.accepted() for call, _ in others))
        async with serving(redis_url, getattr(idle, kind), **config):
            await asyncio.wait_for(asyncio.gather(*(answer for _, answer in others)), 10)
            assert not slow.done()
            assert first.in_progress == 1
            busy.permit_all()
            await slow


@pytest.mark.usefixtures("always_about_to_end")
async def test_the_next_batch_is_claimed_when_one_ends(redis_url: str) -> None:
    gated = Gated()
    async with calling(redis_url) as client, known(client, redis_url, gated, size=8) as worker:
        answers = await _sent_behind_one(client, gated, *[b"x"] * 40)
        for ended in range(4):
            await wait_until_async(lambda: (len(gated.batches), worker.in_progress) == (2 + ended, 16))  # noqa: B023
            gated.permit()
        gated.permit_all()
        await asyncio.gather(*answers)
    assert gated.sizes == [1, 8, 8, 8, 8, 8]


@pytest.mark.usefixtures("always_about_to_end")
async def test_large_bodies_of_the_next_batch_are_fetched_before_the_running_one_ends(redis_url: str) -> None:
    gated = Gated()
    size, body = 8, b"x" * (LARGE + 1)
    async with calling(redis_url) as client, known(client, redis_url, gated, size=size) as worker:
        answers = await _sent_behind_one(client, gated, *[b"running"] * size)
        await wait_until_async(lambda: len(gated.batches) == 2)
        sent_before = await _bytes_sent(client)
        answers += await _sent(client, *[body] * (2 * size))
        gated.permit()

        async def are_fetched() -> bool:
            return await _bytes_sent(client) - sent_before > 2 * size * LARGE

        await wait_until_async(are_fetched)
        assert (worker.in_progress, gated.sizes) == (2 * size, [1, size, size])
        gated.permit_all()
        await asyncio.gather(*answers)
    assert gated.sizes == [1, size, size, size]


@pytest.mark.usefixtures("always_about_to_end")
async def test_by_default_no_batch_begins_while_another_one_runs(redis_url: str) -> None:
    gated = Gated()
    async with calling(redis_url) as client, known(client, redis_url, gated, size=8) as worker:
        answers = await _sent_behind_one(client, gated, *[b"x"] * 24)
        for ended in range(3):
            await wait_until_async(lambda: (len(gated.batches), gated.running) == (2 + ended, 1))  # noqa: B023
            if ended < 2:  # the next one is at hand, and does not begin
                await wait_until_async(lambda: worker.in_progress == 16)
                assert len(gated.batches) == 2 + ended
            gated.permit()
        await asyncio.gather(*answers)
    assert gated.most_running == 1


async def test_two_concurrent_batches_overlap(redis_url: str) -> None:
    gated = Gated()
    async with calling(redis_url) as client:
        answers = await _sent(client, *[b"x"] * 32)
        async with serving(redis_url, gated.blocking, max_batch_size=8, max_concurrent_queries=2):
            for ended in range(3):  # the second begins before the first has ended, and so on
                await wait_until_async(lambda: (len(gated.batches), gated.running) == (2 + ended, 2))  # noqa: B023
                if ended < 2:
                    gated.permit()
            gated.permit_all()
            await asyncio.gather(*answers)
    assert (gated.sizes, gated.most_running) == ([8] * 4, 2)


@pytest.mark.usefixtures("always_about_to_end")
async def test_requests_published_after_the_claim_fill_up_the_next_batch(redis_url: str) -> None:
    gated = Gated()
    async with calling(redis_url) as client, known(client, redis_url, gated, size=8) as worker:
        answers = await _sent_behind_one(client, gated, *[b"running"] * 8, *[b"claimed"] * 3)
        await wait_until_async(lambda: worker.in_progress == 11)
        answers += await _sent(client, *[b"came later"] * 7)
        assert worker.in_progress == 11
        gated.permit()
        await wait_until_async(lambda: len(gated.batches) == 3)
        assert gated.batches[2] == [b"claimed"] * 3 + [b"came later"] * 5
        gated.permit_all()
        await asyncio.gather(*answers)


@pytest.mark.usefixtures("soon_overdue")
@pytest.mark.parametrize("waiting", [8, 3])
async def test_requests_claimed_behind_a_slow_batch_move_to_an_idle_replica(redis_url: str, waiting: int) -> None:
    gated, idle = Gated(), Gated()
    idle.permit_all()
    async with calling(redis_url) as client, known(client, redis_url, gated, size=8) as worker:
        answers = await _sent_behind_one(client, gated, *[b"slow"] * 8, *[b"x"] * waiting)
        await wait_until_async(lambda: _given_back(client, waiting))
        assert worker.in_progress == 8
        async with serving(redis_url, idle.blocking, max_batch_size=8):
            await asyncio.wait_for(asyncio.gather(*answers[8:]), 10)
            assert not any(answer.done() for answer in answers[:8])
            gated.permit_all()
            await asyncio.gather(*answers)
    assert not any(b"x" in batch for batch in gated.batches)


@pytest.mark.usefixtures("soon_overdue")
async def test_returned_requests_run_before_later_ones(redis_url: str) -> None:
    gated = Gated()
    async with calling(redis_url) as client, known(client, redis_url, gated, size=8):
        answers = await _sent_behind_one(client, gated, *[b"slow"] * 8, *[b"given back"] * 8)
        await wait_until_async(lambda: _given_back(client, 8))
        answers += await _sent(client, *[b"later"] * 40)
        gated.permit_all()
        await asyncio.gather(*answers)
    assert gated.batches[1:3] == [[b"slow"] * 8, [b"given back"] * 8]


@pytest.mark.usefixtures("always_about_to_end")
async def test_a_drained_replica_gives_back_its_next_batch(redis_url: str) -> None:
    gated, other = Gated(), Gated()
    other.permit_all()
    async with calling(redis_url) as client, known(client, redis_url, gated, size=8) as worker:
        answers = await _sent_behind_one(client, gated, *[b"running"] * 8, *[b"waiting"] * 8)
        await wait_until_async(lambda: worker.in_progress == 16)
        async with serving(redis_url, other.blocking, max_batch_size=8):
            draining = asyncio.create_task(worker.drain(30))
            await asyncio.wait_for(asyncio.gather(*answers[8:]), 10)
            assert not draining.done()
            gated.permit_all()
            assert await draining
            await asyncio.gather(*answers)
    assert gated.batches[1:] == [[b"running"] * 8]


@pytest.mark.usefixtures("always_about_to_end")
async def test_a_request_cancelled_in_the_next_batch_never_runs(redis_url: str) -> None:
    gated = Gated()
    async with calling(redis_url) as client, known(client, redis_url, gated, size=8) as worker:
        (alone,) = await _sent(client, b"alone")
        await wait_until_async(lambda: len(gated.batches) == 1)
        answers = await _sent(client, *[b"running"] * 8)
        call, _ = client.call(b"cancelled")
        answers += await _sent(client, *[b"waiting"] * 7)
        gated.permit()
        await wait_until_async(lambda: worker.in_progress == 16)
        call.cancel()
        await wait_until_async(lambda: worker.in_progress == 15)
        gated.permit_all()
        await asyncio.gather(alone, *answers)
    assert gated.batches[1:] == [[b"running"] * 8, [b"waiting"] * 7]


async def _sent_behind_one(client: Client, gated: Gated, *bodies: bytes) -> list[asyncio.Future[Any]]:
    """Send a request that runs alone, then others. Return the futures of their replies once the first one runs."""
    (alone,) = await _sent(client, b"alone")
    await wait_until_async(lambda: len(gated.batches) == 1)
    answers = await _sent(client, *bodies)
    gated.permit()
    await alone
    return answers


async def _sent(client: Client, *bodies: bytes) -> list[asyncio.Future[Any]]:
    """Send requests together, and return the futures of their replies when they are queued."""
    calls = [client.call(body) for body in bodies]
    await asyncio.gather(*(call.accepted() for call, _ in calls))
    return [answer for _, answer in calls]


async def _bytes_sent(client: Client) -> int:
    """Return how many bytes the broker has sent to anybody."""
    return int((await client.redis.info("stats"))["total_net_output_bytes"])


async def _given_back(client: Client, count: int) -> bool:
    consumers = await client.redis.xinfo_consumers(client.caller.keys.requests(TAG), GROUP)
    return sum(int(one["pending"]) for one in consumers if one["name"] == RETURNED.encode()) == count
