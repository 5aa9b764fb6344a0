"""Stray claims, and faults that could leave some."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from penstock.broker.wire._fields import LARGE
from penstock.broker.wire.replies import Reply
from penstock.broker.wire.requests import Entry
from penstock.handles.errors import BackendError, DeliveryLimitExceeded, from_wire
from penstock.workers.claim import Claim
from penstock.workers.consuming import redelivery, stray_claims
from penstock.workers.consuming.settlement import Settlement
from penstock.workers.consuming.stray_claims import StrayClaims
from penstock.workers.executing.runner import Runner
from tests.support.waiting import wait_until_async
from tests.workers.serving import TAG, Client, calling, serving


class Held:
    """A backend that runs one request at a time; the first one runs until it is released."""

    def __init__(self) -> None:
        self.busy, self.released = threading.Event(), threading.Event()
        self.ran: Counter[bytes] = Counter()

    @property
    def function(self) -> Callable[[Any], Any]:
        def run(request: Any) -> Any:
            self.ran[request.data] += 1
            if request.data == b"first":
                self.busy.set()
                self.released.wait(30)
            return request.data

        return run


def echo(request: Any) -> Any:
    return request.data


async def _claim_behind_its_back(client: Client, replica: str, *, batch: bool = False) -> bytes:
    """Claim one entry in the name of a replica that does not know of it, and return its id."""
    stream = (client.caller.keys.batch if batch else client.caller.keys.requests)(TAG)
    reply: Any = await client.redis.xreadgroup("replicas", replica, {stream: ">"}, count=1)
    ((_, ((entry, _),)),) = reply
    return bytes(entry)


async def _is_settled(client: Client) -> bool:
    return await client.depth() == 0 and await client.claimed() == 0


@pytest.mark.parametrize("batch", [False, True])
async def test_a_stray_claim_runs_once(redis_url: str, batch: bool) -> None:
    held = Held()
    async with calling(redis_url) as client, serving(redis_url, held.function) as worker:
        first = client.call(b"first")[1]
        await wait_until_async(held.busy.is_set)
        call, second = client.call(b"second", batch=batch)
        await call.accepted()
        await _claim_behind_its_back(client, worker.replica, batch=batch)
        held.released.set()
        assert (await asyncio.wait_for(second, 30)).body == b"second"
        await first
        await wait_until_async(lambda: _is_settled(client))
    assert held.ran == {b"first": 1, b"second": 1}


async def test_a_withdrawn_stray_claim_is_settled(redis_url: str) -> None:
    held = Held()
    async with calling(redis_url) as client, serving(redis_url, held.function) as worker:
        first = client.call(b"first")[1]
        await wait_until_async(held.busy.is_set)
        call, _ = client.call(b"second")
        await call.accepted()
        await _claim_behind_its_back(client, worker.replica)
        call.cancel()
        held.released.set()
        await first
        await wait_until_async(lambda: _is_settled(client))
    assert held.ran == {b"first": 1}


async def test_a_stray_claim_that_killed_replicas_counts_as_redelivered(redis_url: str) -> None:
    held = Held()
    async with calling(redis_url) as client, serving(redis_url, held.function) as worker:
        first = client.call(b"first")[1]
        await wait_until_async(held.busy.is_set)
        call, second = client.call(b"second")
        await call.accepted()
        entry = await _claim_behind_its_back(client, worker.replica)
        stream = client.caller.keys.requests(TAG)
        await client.redis.xclaim(stream, "replicas", worker.replica, 0, [entry], retrycount=4)
        held.released.set()
        error = (await asyncio.wait_for(second, 30)).error
        assert error is not None
        assert isinstance(from_wire(error), DeliveryLimitExceeded)
        await first
        await wait_until_async(lambda: _is_settled(client))
    assert held.ran == {b"first": 1}


async def test_a_search_for_stray_claims_under_load_runs_nothing_twice(redis_url: str) -> None:
    ran: Counter[bytes] = Counter()

    async def run(request: Any) -> Any:
        ran[request.data] += 1
        await asyncio.sleep(2.5 if request.data.startswith(b"slow") else 0)
        return request.data

    async with calling(redis_url) as client, serving(redis_url, run):
        slow = [client.call(b"slow%d" % n)[1] for n in range(120)]
        quick = 0
        while not all(answer.done() for answer in slow):
            await asyncio.gather(*(client.ask(b"%d" % (quick + n)) for n in range(20)))
            quick += 20
        await wait_until_async(lambda: _is_settled(client))
    assert len(ran) == 120 + quick
    assert set(ran.values()) == {1}


async def test_an_idle_replica_searches_only_after_it_has_claimed(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redelivery, "_SCAN_EVERY_S", (0.05, 0.05))
    monkeypatch.setattr(stray_claims, "_EVERY_S", 0.001)
    monkeypatch.setattr(stray_claims, "_IDLE_MS", 1)
    answers, is_search_due = list[bool](), StrayClaims.is_search_due

    def recorded(strays: StrayClaims) -> bool:
        answers.append(is_search_due(strays))
        return answers[-1]

    monkeypatch.setattr(StrayClaims, "is_search_due", recorded)
    async with calling(redis_url) as client, serving(redis_url, echo):
        for body in (b"first", b"second"):
            assert (await client.ask(body)).body == body
            answers.clear()
            await wait_until_async(lambda: True in answers)
            await wait_until_async(lambda: answers[-10:] == [False] * 10)


async def test_a_body_that_the_broker_refused_is_fetched_again(redis_url: str) -> None:
    body = b"x" * (LARGE + 1)
    async with calling(redis_url) as client:
        call, answer = client.call(body)
        await call.accepted()
        key = client.caller.keys.body(TAG, call.id)
        await client.redis.rename(key, key + ":aside")
        await client.redis.lpush(key, "what GET does not take")
        async with serving(redis_url, echo):
            assert (await client.ask(b"behind")).body == b"behind"
            assert not answer.done()
            await client.redis.rename(key + ":aside", key)
            assert (await asyncio.wait_for(answer, 30)).body == body
            await wait_until_async(lambda: _is_settled(client))


async def _publish(client: Client, bodies: Sequence[bytes]) -> list[asyncio.Future[Reply]]:
    calls = [client.call(body) for body in bodies]
    await asyncio.gather(*(call.accepted() for call, _ in calls))
    return [answer for _, answer in calls]


async def test_an_entry_that_a_bug_makes_unreadable_does_not_affect_the_others(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Entry.of

    def fail_at_times(fields: Any) -> Entry:
        entry = read(fields)
        if entry.body == b"bad":
            raise RuntimeError("a fault")
        return entry

    monkeypatch.setattr(Entry, "of", fail_at_times)
    async with calling(redis_url) as client:
        answers = await _publish(client, [b"0", b"bad", b"2", b"bad", b"4"])
        async with serving(redis_url, echo):
            assert [(await answers[n]).body for n in (0, 2, 4)] == [b"0", b"2", b"4"]
            assert (await client.ask(b"later")).body == b"later"

            async def are_dead_letters() -> bool:
                return await client.dead() == 2

            await wait_until_async(are_dead_letters)
            await wait_until_async(lambda: _is_settled(client))


async def test_a_reply_that_cannot_be_sent_is_replaced_by_an_error(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Settlement.reply

    def fail_at_times(settlement: Settlement, claim: Claim, reply: Reply) -> None:
        if reply.body == b"bad":
            raise RuntimeError("a fault")
        write(settlement, claim, reply)

    monkeypatch.setattr(Settlement, "reply", fail_at_times)
    async with calling(redis_url) as client:
        answers = await _publish(client, [b"0", b"bad", b"2"])
        async with serving(redis_url, echo):
            replies = await asyncio.gather(*answers)
            assert [reply.status for reply in replies] == [200, 500, 200]
            assert (await client.ask(b"later")).body == b"later"
            await wait_until_async(lambda: _is_settled(client))


async def test_a_call_that_a_bug_keeps_from_starting_gets_an_error_reply(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Runner.run

    def fail_at_times(runner: Runner, claims: Sequence[Claim], done: Any) -> Any:
        if claims[0].entry.body == b"bad":
            raise RuntimeError("a fault")
        return run(runner, claims, done)

    monkeypatch.setattr(Runner, "run", fail_at_times)
    async with calling(redis_url) as client:
        answers = await _publish(client, [b"0", b"bad", b"2"])
        async with serving(redis_url, echo):
            replies = await asyncio.gather(*answers)
            assert [reply.status for reply in replies] == [200, 500, 200]
            error = replies[1].error
            assert error is not None
            assert isinstance(from_wire(error), BackendError)
            assert (await client.ask(b"later")).body == b"later"
            await wait_until_async(lambda: _is_settled(client))
