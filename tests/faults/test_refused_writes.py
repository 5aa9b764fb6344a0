"""A broker that refuses writes for a while: nothing accepted is lost, and no living replica counts as dead."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import httpx
import pytest
from redis import Redis as SyncRedis
from redis.asyncio import Redis

from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.queue.leases import TTL_S
from penstock.broker.wire._fields import LARGE
from penstock.broker.wire.keys import Keys
from penstock.handles import ServeHandle, connect
from penstock.handles.calls.request_client import RequestClient
from penstock.handles.errors import BrokerUnavailable, Overloaded
from penstock.proxy.proxy import Proxy
from penstock.workers.replica import Replica
from tests.faults.conftest import Scale, StartClient
from tests.faults.injected.refusing_proxy import ERRORS, RefusingProxy
from tests.faults.load.backends import Journal
from tests.faults.load.table import Row, Table
from tests.faults.load.traffic import traffic
from tests.faults.test_deaths import check, every, serve_work
from tests.handles.site import INSTANCE, Site
from tests.support.waiting import wait_until, wait_until_async
from tests.workers.serving import TAG, Client, calling, declared, serving, start_killable

KEYS = Keys("default")


@pytest.fixture
def between(redis_url: str) -> Iterator[RefusingProxy]:
    with RefusingProxy(redis_url) as between:
        yield between


class Work:
    """User code that answers with what it got, once it is released."""

    def __init__(self) -> None:
        self.runs: Counter[bytes] = Counter()
        self.release = asyncio.Event()

    async def __call__(self, request: Any) -> Any:
        self.runs[bytes(request.data[:20])] += 1
        await self.release.wait()
        return request.data


@asynccontextmanager
async def served(redis_url: str, url: str, work: Work) -> AsyncGenerator[Client]:
    """A caller that reaches the broker by ``url``, and a replica that reaches it as it is."""
    async with calling(redis_url) as other, serving(redis_url, work.__call__, max_concurrent_queries=1):
        caller = RequestClient(url, "default")
        await caller.open()
        try:
            yield Client(caller, other.redis)
        finally:
            await caller.close()


async def is_settled(client: Client) -> bool:
    return await client.depth() == 0 and await client.claimed() == 0


@pytest.mark.parametrize("code", sorted(ERRORS))
async def test_accepted_requests_are_answered_once_after_the_refusal(
    redis_url: str, between: RefusingProxy, code: str
) -> None:
    work = Work()
    bodies = [b"%d" % n for n in range(30)] + [b"m" * 5_000, b"l" * (LARGE + 1)]
    async with calling(redis_url) as client, serving(between.url, work.__call__, max_concurrent_queries=40) as worker:
        answers = [client.call(body)[1] for body in bodies]
        await wait_until_async(lambda: work.runs.total() == len(bodies))
        between.error = ERRORS[code]
        work.release.set()
        await wait_until_async(lambda: worker.in_progress == 0)
        await wait_until_async(lambda: len(between.refused) > 3)
        assert not any(answer.done() for answer in answers)
        between.error = ""
        replies = await asyncio.wait_for(asyncio.gather(*answers), 20)
        assert [reply.body for reply in replies] == bodies
        await wait_until_async(lambda: is_settled(client))
    assert set(work.runs.values()) == {1}


async def test_a_large_reply_is_sent_after_its_body_whichever_of_them_is_refused(
    redis_url: str, between: RefusingProxy
) -> None:
    """A broker that is out of memory refuses the body; what then stores it is refused once more, and nothing else."""
    work, body = Work(), b"l" * (LARGE + 1)
    work.release.set()
    refused = list[bytes]()

    def holds_the_body(name: bytes, command: bytes) -> bool:
        if len(command) <= LARGE or len(refused) == 2:
            return False
        refused.append(name)
        return True

    async with calling(redis_url) as client, serving(between.url, work.__call__):
        between.error, between.refuses = ERRORS["OOM"], holds_the_body
        assert (await asyncio.wait_for(client.ask(body), 20)).body == body
        await wait_until_async(lambda: is_settled(client))
    assert (refused[0], len(refused)) == (b"SET", 2)
    assert set(work.runs.values()) == {1}


@pytest.mark.parametrize("command", [b"XADD", b"XACK", b"XDEL", b"SET"])
async def test_a_command_that_was_refused_alone_is_sent_again_alone(
    redis_url: str, between: RefusingProxy, command: bytes
) -> None:
    """As where the refusal begins or ends between two commands of one write."""
    work = Work()
    bodies = [b"small", b"m" * 5_000, b"l" * (LARGE + 1)]
    async with calling(redis_url) as client, serving(between.url, work.__call__, max_concurrent_queries=4):
        answers = [client.call(body)[1] for body in bodies]
        await wait_until_async(lambda: work.runs.total() == len(bodies))
        between.refuses = lambda name, _: name == command
        between.error = ERRORS["TRYAGAIN"]
        work.release.set()
        await wait_until_async(lambda: len(between.refused) > 1)
        between.error = ""
        replies = await asyncio.wait_for(asyncio.gather(*answers), 20)
        assert [reply.body for reply in replies] == bodies
        await wait_until_async(lambda: is_settled(client))
    assert set(work.runs.values()) == {1}


@pytest.mark.parametrize("code", sorted(ERRORS.keys() - {"READONLY"}))
async def test_new_requests_are_refused_at_once_by_name(redis_url: str, between: RefusingProxy, code: str) -> None:
    work = Work()
    work.release.set()
    async with served(redis_url, between.url, work) as client:
        between.error = ERRORS[code]
        for body in (b"small", b"l" * (LARGE + 1)):
            with pytest.raises(Overloaded if code == "OOM" else BrokerUnavailable) as caught:
                await asyncio.wait_for(client.ask(body), 4)
            assert isinstance(caught.value, (BrokerUnavailable, Overloaded))
            assert caught.value.retry_after_s > 0
        between.error = ""
        assert (await asyncio.wait_for(client.ask(b"later"), 20)).body == b"later"
    assert work.runs == {b"later": 1}


async def test_a_request_cancelled_during_a_refusal_does_not_run(redis_url: str, between: RefusingProxy) -> None:
    work = Work()
    async with served(redis_url, between.url, work) as client:
        first, _ = client.call(b"first")
        await wait_until_async(lambda: work.runs.total() == 1)
        second, _ = client.call(b"second")
        await second.accepted()
        between.error = ERRORS["NOREPLICAS"]
        assert second.cancel()
        await wait_until_async(lambda: len(between.refused) > 2)
        between.error = ""
        await wait_until_async(lambda: _depth_is(client, 1))
        work.release.set()
        await wait_until_async(lambda: is_settled(client))
        assert first.entry is not None
    assert work.runs == {b"first": 1}


async def _depth_is(client: Client, count: int) -> bool:
    return await client.depth() == count


def test_the_parts_of_a_streamed_answer_keep_their_order(redis_url: str, between: RefusingProxy) -> None:
    site = Site(between.url)
    go_on, go_on_again = threading.Event(), threading.Event()

    def count(request: Any) -> Iterator[int]:
        yield from range(5)
        go_on.wait(20)
        yield from range(5, 200)
        go_on_again.wait(20)
        yield from range(200, 210)

    site.serve(count)
    handle = ServeHandle(redis_url, INSTANCE, "ask")
    answer: Iterator[Any] = iter(cast("Any", handle.options(stream=True).remote()))
    seen = [next(answer) for _ in range(5)]
    between.error = ERRORS["NOREPLICAS"]
    go_on.set()
    wait_until(lambda: len(between.refused) > 5)
    go_on_again.set()
    between.error = ""
    seen += list(answer)
    assert seen == list(range(210))
    connect(redis_url).close()
    wait_until(lambda: site.depth() == 0)
    site.close()


async def test_a_proxy_is_unhealthy_and_refuses_requests_meanwhile(redis_url: str, between: RefusingProxy) -> None:
    work = Work()
    work.release.set()
    proxy = Proxy(between.url, "default", "p", {"port": 0})
    async with (
        declared(redis_url),
        serving(redis_url, work.__call__),
        httpx.AsyncClient(base_url=(await proxy.ready())["url"]) as http,
    ):
        assert (await http.post("/echo", content=b"x")).content == b"x"

        async def health_is(status: int) -> bool:
            return (await http.get("/-/healthz")).status_code == status

        between.error = ERRORS["MISCONF"]
        await wait_until_async(lambda: health_is(503))  # also where nobody asks for anything
        response = await http.post("/echo", content=b"x")
        assert response.status_code == 503
        assert response.json()["error"]["type"] == "BrokerUnavailable"
        assert int(response.headers["retry-after"]) >= 1
        between.error = ""
        await wait_until_async(lambda: health_is(200))
        assert (await http.post("/echo", content=b"x")).content == b"x"
        await proxy.drain(1.0)


# -- leases


async def live_leases(redis: Redis, replicas: Sequence[Replica]) -> int:
    """Return how many replicas of the backend hold their leases."""
    return int(await redis.exists(*[KEYS.alive(TAG, replica.replica) for replica in replicas]))


def are_trusted(replicas: Sequence[Replica], after_s: float = 0.0) -> bool:
    """Whether all have renewed their leases since then, and for so long that they may take over from others."""
    now_s = time.monotonic()
    return all(after_s <= (replica.lease_held_since_s or now_s) < now_s - TTL_S - 0.5 for replica in replicas)


@asynccontextmanager
async def three_replicas(url: str, work: Work) -> AsyncGenerator[list[Replica]]:
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(serving(url, work.__call__, max_concurrent_queries=4, max_deliveries=1))
            for _ in range(3)
        ]


async def test_leases_that_could_not_be_renewed_cause_no_redelivery(redis_url: str, between: RefusingProxy) -> None:
    work = Work()
    async with calling(redis_url) as client, three_replicas(between.url, work) as replicas:
        await wait_until_async(lambda: are_trusted(replicas))
        answers = [client.call(b"%d" % n)[1] for n in range(12)]
        await wait_until_async(lambda: work.runs.total() == 12)
        between.error = ERRORS["NOREPLICAS"]

        async def has_no_lease() -> bool:
            return await live_leases(client.redis, replicas) == 0

        await wait_until_async(has_no_lease)
        began_s = time.monotonic()
        between.error = ""
        # By then each of them has looked several times for what it could take over.
        await wait_until_async(lambda: are_trusted(replicas, began_s))
        work.release.set()
        replies = await asyncio.wait_for(asyncio.gather(*answers), 20)
        assert [reply.error for reply in replies] == [None] * 12
        await wait_until_async(lambda: is_settled(client))
        assert await client.dead() == 0
    assert set(work.runs.values()) == {1}


async def test_a_broker_that_hangs_for_longer_than_a_lease_causes_no_redelivery(server: EmbeddedServer) -> None:
    work = Work()
    async with calling(server.url) as client, three_replicas(server.url, work) as replicas:
        await wait_until_async(lambda: are_trusted(replicas))
        answers = [client.call(b"%d" % n)[1] for n in range(12)]
        await wait_until_async(lambda: work.runs.total() == 12)
        assert server.pid is not None
        began_s = time.monotonic()
        os.kill(server.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(1.5 * TTL_S)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        await wait_until_async(lambda: are_trusted(replicas, began_s))
        work.release.set()
        replies = await asyncio.wait_for(asyncio.gather(*answers), 20)
        assert [reply.error for reply in replies] == [None] * 12
    assert set(work.runs.values()) == {1}


async def test_a_replica_that_dies_during_a_refusal_is_replaced_after_it(
    redis_url: str, between: RefusingProxy
) -> None:
    work = Work()
    async with calling(redis_url) as client:
        dying = await start_killable(between.url, "never")
        _, answer = client.call(b"x")
        await wait_until_async(lambda: _claimed_is(client, 1))
        async with serving(between.url, work.__call__):
            between.error = ERRORS["NOREPLICAS"]
            await dying.kill()
            work.release.set()
            await wait_until_async(lambda: len(between.refused) > 10)
            assert not work.runs
            between.error = ""
            assert (await asyncio.wait_for(answer, 20)).body == b"x"


async def _claimed_is(client: Client, count: int) -> bool:
    return await client.claimed() == count


# -- brokers that refuse for real


async def test_a_broker_without_its_replicas_answers_when_they_are_back(server: EmbeddedServer) -> None:
    work = Work()
    async with (
        calling(server.url) as client,
        serving(server.url, work.__call__, max_concurrent_queries=10) as worker,
        Redis.from_url(server.url) as admin,
    ):
        answers = [client.call(b"%d" % n)[1] for n in range(10)]
        await wait_until_async(lambda: work.runs.total() == 10)
        await admin.config_set("min-replicas-to-write", 1)
        work.release.set()
        await wait_until_async(lambda: worker.in_progress == 0)
        with pytest.raises(BrokerUnavailable, match="NOREPLICAS"):
            await asyncio.wait_for(client.ask(b"new"), 4)
        await wait_until_async(lambda: not client.caller.takes_writes)
        await admin.config_set("min-replicas-to-write", 0)
        replies = await asyncio.wait_for(asyncio.gather(*answers), 20)
        assert [reply.body for reply in replies] == [b"%d" % n for n in range(10)]
        await wait_until_async(lambda: client.caller.takes_writes)
        assert (await asyncio.wait_for(client.ask(b"new"), 20)).body == b"new"
    assert set(work.runs.values()) == {1}


async def test_a_broker_that_is_busy_with_a_script_answers_when_it_ends(server: EmbeddedServer) -> None:
    work = Work()
    async with (
        calling(server.url) as client,
        serving(server.url, work.__call__, max_concurrent_queries=10),
        Redis.from_url(server.url) as admin,
        Redis.from_url(server.url) as killer,
    ):
        await admin.config_set("busy-reply-threshold", 10)
        answers = [client.call(b"%d" % n)[1] for n in range(10)]
        await wait_until_async(lambda: work.runs.total() == 10)
        busy = asyncio.ensure_future(admin.eval("while true do end", 0))
        await wait_until_async(lambda: not client.caller.takes_writes)
        with pytest.raises(BrokerUnavailable, match="BUSY"):
            await asyncio.wait_for(client.ask(b"new"), 4)
        work.release.set()
        await killer.script_kill()
        replies = await asyncio.wait_for(asyncio.gather(*answers), 20)
        assert [reply.body for reply in replies] == [b"%d" % n for n in range(10)]
        await asyncio.wait([busy])
        assert busy.exception() is not None
    assert set(work.runs.values()) == {1}


# -- whole instances


def test_refusals_of_writes_lose_nothing_and_cause_no_redelivery(
    start: StartClient, broker: EmbeddedServer, journal: Journal, scale: Scale, table: Table
) -> None:
    client = start()
    serve_work(client, journal)
    refused_s = 0.0

    def refuse_writes() -> None:
        nonlocal refused_s
        for_s = random.uniform(0.1, TTL_S) if refused_s else 1.5 * TTL_S  # once, longer than any lease holds
        refused_s += for_s
        with SyncRedis.from_url(broker.url) as admin:
            admin.config_set("min-replicas-to-write", 1)
            time.sleep(for_s)
            admin.config_set("min-replicas-to-write", 0)

    with traffic(client, rate=scale.rate, for_s=scale.for_s) as load:
        count = every(load, scale.every_s, refuse_writes)
    seen = load.outcomes
    twice = check(seen, journal)
    notes = f"{count} times, {refused_s:.0f} s in all"
    table.add(Row.of("Redis refuses writes", scale.for_s, seen, twice=twice, notes=notes))
    assert count > 0
    assert set(seen.refused) <= {"BrokerUnavailable"}
    assert len(seen.cut) == twice == 0
    assert len(client.dead_letters("work")) == 0
