"""Replicas on a real broker: claiming, running, replying, and dying."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from typing import Any

import pytest

from penstock import serve
from penstock.broker.wire._fields import LARGE
from penstock.handles.errors import DeliveryLimitExceeded, Overloaded, RequestCancelled, RequestTimeout, from_wire
from tests.support.waiting import wait_until_async
from tests.workers.serving import TAG, Client, Killable, calling, serving, start_killable


def echo(request: Any) -> Any:
    return request.data


async def echo_async(request: Any) -> Any:
    return request.data


@pytest.mark.parametrize("function", [echo, echo_async])
async def test_every_request_gets_a_reply_and_is_settled(broker_url: str, function: Any) -> None:
    async with calling(broker_url) as client, serving(broker_url, function):
        replies = await asyncio.gather(*(client.ask(b"%d" % n) for n in range(500)))
        assert [reply.body for reply in replies] == [b"%d" % n for n in range(500)]
        await wait_until_async(lambda: _is_empty(client))


async def test_the_first_replica_serves_requests_published_before_it_started(redis_url: str) -> None:
    async with calling(redis_url) as client:
        call, answer = client.call(b"early")
        await call.accepted()
        async with serving(redis_url, echo):
            assert (await answer).body == b"early"


async def test_large_bodies_travel_both_ways_and_leave_no_key(redis_url: str) -> None:
    body = b"x" * (LARGE + 1)
    async with calling(redis_url) as client, serving(redis_url, echo):
        assert (await client.ask(body)).body == body
        await wait_until_async(lambda: _is_empty(client))


async def test_a_request_with_an_expired_body_gets_an_error_that_says_so(redis_url: str) -> None:
    async with calling(redis_url) as client:
        call, answer = client.call(b"x" * (LARGE + 1))
        await call.accepted()
        assert await client.redis.delete(client.caller.keys.body(TAG, call.id)) == 1
        async with serving(redis_url, echo):
            error = (await answer).error
        assert error is not None
        assert str(from_wire(error)) == f"the body of request {call.shown_id!r} has expired"
        await wait_until_async(lambda: _is_empty(client))


async def test_no_request_waits_behind_a_slow_one_while_a_replica_is_idle(redis_url: str) -> None:
    release = threading.Event()

    def wait_or_echo(request: Any) -> Any:
        if request.data == b"wait":
            release.wait(30)
        return request.data

    async with (
        calling(redis_url) as client,
        serving(redis_url, wait_or_echo) as first,
        serving(redis_url, wait_or_echo) as second,
    ):
        # Both replicas learn that calls are quick, and prefetch.
        await asyncio.gather(*(client.ask(b"x") for _ in range(500)))
        _, slow = client.call(b"wait")
        await wait_until_async(lambda: first.in_progress + second.in_progress == 1)
        replies = await asyncio.wait_for(asyncio.gather(*(client.ask(b"x") for _ in range(50))), 10)
        assert len(replies) == 50
        assert not slow.done()
        release.set()
        assert (await slow).body == b"wait"


class Sizes:
    """A batch backend that records the sizes of its batches."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    @property
    def function(self) -> Any:
        def batch(requests: list[Any]) -> list[Any]:
            self.sizes.append(len(requests))
            return [request.data for request in requests]

        return serve.accept_batch(batch)


async def _publish_before_serving(client: Client, count: int) -> list[asyncio.Future[Any]]:
    calls = [client.call(b"%d" % n) for n in range(count)]
    await asyncio.gather(*(call.accepted() for call, _ in calls))
    return [answer for _, answer in calls]


async def test_a_backlog_is_cut_into_full_batches(redis_url: str) -> None:
    sizes = Sizes()
    async with calling(redis_url) as client:
        answers = await _publish_before_serving(client, 140)
        async with serving(redis_url, sizes.function, max_batch_size=50):
            replies = await asyncio.gather(*answers)
    assert [reply.body for reply in replies] == [b"%d" % n for n in range(140)]
    assert sizes.sizes == [50, 50, 40]


async def test_the_wait_of_a_batch_counts_from_its_first_entry(redis_url: str) -> None:
    sizes, wait_s = Sizes(), 1.0
    async with (
        calling(redis_url) as client,
        serving(redis_url, sizes.function, max_batch_size=1_000, batch_wait_timeout=wait_s),
    ):
        loop = asyncio.get_running_loop()
        start, answers = loop.time(), [client.call(b"0")[1]]
        while not sizes.sizes:  # if the wait counted from the last entry, it would never end
            await asyncio.sleep(wait_s / 20)
            answers.append(client.call(b"%d" % len(answers))[1])
        assert loop.time() - start > 0.9 * wait_s  # the wait counts by the clock of the broker
        await asyncio.gather(*answers)
    assert 1 < sizes.sizes[0] < 1_000
    assert sum(sizes.sizes) == len(answers)


async def test_a_full_batch_does_not_wait(redis_url: str) -> None:
    sizes = Sizes()
    async with (
        calling(redis_url) as client,
        serving(redis_url, sizes.function, max_batch_size=3, batch_wait_timeout=60.0),
    ):
        await asyncio.wait_for(asyncio.gather(*(client.ask(b"x") for _ in range(3))), 10)
    assert sizes.sizes == [3]


async def test_expired_requests_never_start(redis_url: str) -> None:
    ran: list[bytes] = []

    def record(request: Any) -> None:
        ran.append(request.data)

    async with calling(redis_url) as client:
        with pytest.raises(RequestTimeout):
            await client.ask(b"expired", timeout_s=0.1)
        async with serving(redis_url, record):
            await client.ask(b"fresh")
    assert ran == [b"fresh"]


@pytest.mark.parametrize("batch", [False, True])
async def test_a_request_cancelled_while_it_waits_never_starts(redis_url: str, batch: bool) -> None:
    ran: list[bytes] = []
    busy, release = threading.Event(), threading.Event()

    def record(request: Any) -> None:
        ran.append(request.data)
        if request.data == b"first":
            busy.set()
            release.wait(30)

    async with calling(redis_url) as client, serving(redis_url, record):
        _, first = client.call(b"first", batch=batch)
        await wait_until_async(busy.is_set)
        second, _ = client.call(b"second", batch=batch)
        await second.accepted()
        second.cancel()
        release.set()
        await first
        await client.ask(b"third", batch=batch)
        await wait_until_async(lambda: _is_empty(client))
    assert ran == [b"first", b"third"]


async def test_cancelling_cancels_async_code_and_frees_its_slot(redis_url: str) -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def wait(request: Any) -> Any:
        if request.data == b"quick":
            return b"done"
        started.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with calling(redis_url) as client, serving(redis_url, wait, max_concurrent_queries=1) as worker:
        call, _ = client.call(b"slow")
        await asyncio.wait_for(started.wait(), 10)
        call.cancel()
        await asyncio.wait_for(cancelled.wait(), 10)
        assert (await asyncio.wait_for(client.ask(b"quick"), 10)).body == b"done"
        await wait_until_async(lambda: worker.in_progress == 0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("blocking", [False, True])
async def test_all_slots_are_free_after_every_race_of_cancelling(redis_url: str, seed: int, blocking: bool) -> None:
    chance, met = random.Random(seed), threading.Barrier(3)

    def work(request: Any) -> Any:
        if request.data == b"meet":
            met.wait(10)
        time.sleep(chance.random() * 0.005)
        return request.data

    async def work_async(request: Any) -> Any:
        if request.data == b"meet":
            await asyncio.to_thread(met.wait, 10)
        await asyncio.sleep(chance.random() * 0.005)
        return request.data

    async with (
        calling(redis_url) as client,
        serving(redis_url, work if blocking else work_async, max_concurrent_queries=3) as worker,
    ):

        async def race(number: int) -> bool:
            call, answer = client.call(b"x")
            if number == 0:  # not cancelled, even if this loop is delayed while the others wait
                await answer
            await asyncio.sleep(chance.random() * 0.1)
            if call.cancel():
                return True
            assert (await answer).body == b"x"
            return False

        cancelled = sum(await asyncio.gather(*(race(number) for number in range(200))))
        assert 0 < cancelled < 200
        # They return only if all of them run at once.
        replies = await asyncio.gather(*(client.ask(b"meet", timeout_s=20) for _ in range(3)))
        assert [reply.body for reply in replies] == [b"meet"] * 3
        await wait_until_async(lambda: worker.in_progress == 0)
        await wait_until_async(lambda: _is_empty(client))


async def test_requests_of_a_killed_replica_get_their_replies(redis_url: str) -> None:
    async with calling(redis_url) as client:
        first = await start_killable(redis_url, "never")
        calls = [client.call(b"x") for _ in range(5)]
        await wait_until_async(lambda: _claimed(client, 5))
        await first.kill()
        killed_at = asyncio.get_running_loop().time()
        async with serving(redis_url, echo):
            replies = await asyncio.gather(*(answer for _, answer in calls))
        assert [reply.status for reply in replies] == [200] * 5
        # The lease of 2 s, and time for a busy machine.
        assert asyncio.get_running_loop().time() - killed_at < 6
        await wait_until_async(lambda: _is_empty(client))


async def test_requests_of_a_killed_replica_run_concurrently(redis_url: str) -> None:
    """One by one, they would occupy another replica for 18 s."""
    async with calling(redis_url) as client:
        first = await start_killable(redis_url, "never")
        calls = [client.call(b"x") for _ in range(60)]
        await wait_until_async(lambda: _claimed(client, 60))
        await first.kill()
        second = await start_killable(redis_url, "slowly")
        started_at = asyncio.get_running_loop().time()
        replies = await asyncio.gather(*(answer for _, answer in calls))
        assert [reply.status for reply in replies] == [200] * 60
        assert asyncio.get_running_loop().time() - started_at < 12
        await second.kill()


async def test_a_batch_of_a_killed_replica_runs_as_one_batch(redis_url: str) -> None:
    sizes: list[int] = []

    @serve.accept_batch
    def measure(requests: list[Any]) -> list[None]:
        sizes.append(len(requests))
        return [None] * len(requests)

    async with calling(redis_url) as client:
        first = await start_killable(redis_url, "never")
        calls = [client.call(b"x") for _ in range(20)]
        await wait_until_async(lambda: _claimed(client, 20))
        await first.kill()
        async with serving(redis_url, measure, max_batch_size=16):
            replies = await asyncio.gather(*(answer for _, answer in calls))
        assert {reply.status for reply in replies} == {200}
        assert sizes == [16, 4]


async def test_a_poison_request_fails_alone(redis_url: str) -> None:
    """It kills `max_deliveries` replicas and becomes a dead letter; the requests beside it get replies."""
    async with calling(redis_url) as client:
        replicas = [await start_killable(redis_url, "slowly") for _ in range(2)]
        bystanders = [client.call(b"x")[1] for _ in range(20)]
        poison = client.call(b"die")[1]
        more = [client.call(b"x")[1] for _ in range(20)]
        started = 2
        while not poison.done():
            await _replace_the_dead(redis_url, replicas)
            await asyncio.sleep(0.05)
            started = max(started, len(replicas))
        reply = await poison
        assert reply.error is not None
        assert isinstance(from_wire(reply.error), DeliveryLimitExceeded)
        assert {answer.status for answer in await asyncio.gather(*bystanders, *more)} == {200}
        assert sum(not replica.alive for replica in replicas) == 3
        assert await client.dead() == 1
        for replica in replicas:
            await replica.kill()


async def _replace_the_dead(url: str, replicas: list[Killable]) -> None:
    while sum(replica.alive for replica in replicas) < 2:
        replicas.append(await start_killable(url, "slowly"))


async def test_an_unreadable_entry_becomes_a_dead_letter_and_affects_no_other(redis_url: str) -> None:
    async with calling(redis_url) as client, serving(redis_url, echo):
        requests = client.caller.keys.requests(TAG)
        await client.redis.xadd(requests, {"v": "9", "id": "x"})
        await client.redis.xadd(requests, {b"\xff\x00": b"\xfe"})
        assert (await client.ask(b"x")).body == b"x"

        async def both_are_dead() -> bool:
            return await client.dead() == 2

        await wait_until_async(both_are_dead)
        await wait_until_async(lambda: _is_empty(client))


async def test_the_number_of_dead_letters_stays_within_its_limit(redis_url: str) -> None:
    limits: dict[str, Any] = {"max_queued_requests": 100, "max_dead_letters": 50}
    async with calling(redis_url) as client, serving(redis_url, echo, **limits):
        keys = client.caller.keys
        async with client.redis.pipeline(transaction=False) as pipe:
            for n in range(3_000):
                pipe.xadd(keys.requests(TAG), {"garbage": str(n)})
            await pipe.execute()
        await wait_until_async(lambda: _is_empty(client))
        assert await client.dead() == 50
        assert await client.redis.hget(keys.done(TAG), "dead_dropped") == b"2950"
        await client.redis.delete(keys.done(TAG))
        assert (await client.ask(b"x")).body == b"x"


class Greeter:
    def __call__(self, request: Any) -> bytes:
        return b"hello " + bytes(request.data)


async def test_calling_the_method_mro_does_not_affect_the_replica(redis_url: str) -> None:
    async with calling(redis_url) as client, serving(redis_url, Greeter):
        refused = [client.call(b"x", call="mro")[1] for _ in range(2)]
        behind = [client.call(b"%d" % n)[1] for n in range(10)]
        assert [reply.body for reply in await asyncio.gather(*behind)] == [b"hello %d" % n for n in range(10)]
        assert [(await reply).status for reply in refused] == [404, 404]
        assert (await client.ask(b"again")).body == b"hello again"
        await wait_until_async(lambda: _is_empty(client))


async def test_a_broker_that_lost_its_data_gets_its_group_and_its_requests_again(redis_url: str) -> None:
    async with calling(redis_url) as client, serving(redis_url, echo):
        assert (await client.ask(b"before")).body == b"before"
        await client.redis.flushall()
        assert (await asyncio.wait_for(client.ask(b"after", timeout_s=20), 25)).body == b"after"


async def test_a_drained_replica_gives_back_unstarted_requests(redis_url: str) -> None:
    busy, release = threading.Event(), threading.Event()

    def wait(request: Any) -> Any:
        if request.data == b"wait":
            busy.set()
            release.wait(30)
        return request.data

    async with calling(redis_url) as client, serving(redis_url, wait) as first:
        await asyncio.gather(*(client.ask(b"x") for _ in range(500)))
        calls = [client.call(b"wait")[1], *(client.call(b"x")[1] for _ in range(5))]
        await wait_until_async(busy.is_set)
        async with serving(redis_url, echo):
            draining = asyncio.create_task(first.drain(20))
            assert {(await answer).status for answer in calls[1:]} == {200}
            assert not draining.done()
            release.set()
            assert await draining
            assert (await calls[0]).body == b"wait"


async def test_closing_the_caller_cancels_its_requests(redis_url: str) -> None:
    async with calling(redis_url) as client:
        call, answer = client.call(b"x")
        await call.accepted()
    with pytest.raises(RequestCancelled):
        await answer


@pytest.mark.parametrize("function", [echo, echo_async])
async def test_batch_items_and_interactive_requests_get_replies_side_by_side(redis_url: str, function: Any) -> None:
    async with calling(redis_url) as client, serving(redis_url, function, max_concurrent_queries=3):
        replies = await asyncio.gather(*(client.ask(b"%d" % n, batch=n % 3 > 0) for n in range(900)))
        assert [reply.body for reply in replies] == [b"%d" % n for n in range(900)]
        await wait_until_async(lambda: _is_empty(client))


async def test_interactive_requests_overtake_batch_items_and_leave_them_their_share(redis_url: str) -> None:
    ran: list[bytes] = []

    async def record(request: Any) -> None:
        ran.append(request.data)
        await asyncio.sleep(0.001)

    async with calling(redis_url) as client:
        batch = [client.call(b"batch", batch=True) for _ in range(300)]
        interactive = [client.call(b"interactive") for _ in range(300)]
        await asyncio.gather(*(call.accepted() for call, _ in batch + interactive))
        async with serving(redis_url, record, max_concurrent_queries=1, batch_share=0.2):
            await asyncio.gather(*(answer for _, answer in batch + interactive))
    until_the_last = ran[: 300 - ran[::-1].index(b"interactive") + 299]
    # The first claim finds out that both streams have entries.
    assert abs(until_the_last.count(b"batch") - 0.2 * len(until_the_last)) < 4


async def test_concurrency_stays_limited_when_both_streams_answer_one_claim(redis_url: str) -> None:
    running = most = 0

    async def count(request: Any) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1

    async with calling(redis_url) as client:
        answers = [client.call(b"x", batch=n % 2 > 0) for n in range(40)]
        await asyncio.gather(*(call.accepted() for call, _ in answers))
        async with serving(redis_url, count, max_concurrent_queries=4):
            await asyncio.gather(*(answer for _, answer in answers))
    assert most == 4


async def test_batch_items_of_a_killed_replica_get_their_replies(redis_url: str) -> None:
    async with calling(redis_url) as client:
        first = await start_killable(redis_url, "never")
        calls = [client.call(b"x", batch=n % 2 > 0) for n in range(6)]
        await wait_until_async(lambda: _claimed(client, 6))
        await first.kill()
        async with serving(redis_url, echo):
            replies = await asyncio.gather(*(answer for _, answer in calls))
        assert [reply.status for reply in replies] == [200] * 6
        await wait_until_async(lambda: _is_empty(client))


async def test_a_batch_leaves_room_in_the_queue_for_interactive_requests(redis_url: str) -> None:
    async with calling(redis_url) as client:
        config = {"max_queued_requests": 10}
        calls = [client.call(b"x", batch=True, config=config)[0] for _ in range(8)]
        await asyncio.gather(*(call.accepted() for call in calls))
        with pytest.raises(Overloaded):
            await client.ask(b"x", batch=True, config=config)
        calls.append(client.call(b"x", config=config)[0])
        await calls[-1].accepted()
        assert await client.depth() == 9
        for call in calls:
            call.cancel()


async def _is_empty(client: Client) -> bool:
    return await client.depth() == 0


async def _claimed(client: Client, count: int) -> bool:
    return await client.claimed() == count
