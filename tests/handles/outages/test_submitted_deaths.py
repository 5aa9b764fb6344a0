"""Submitted requests and idempotency keys while replicas, brokers and connections die."""

import asyncio
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from redis import Redis

from penstock import handles
from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.wire.keys import Keys
from penstock.handles import Submitted
from penstock.handles.connection import Connection
from penstock.handles.errors import DeliveryLimitExceeded, RequestNotFound
from tests.handles.calls.test_submitted import counts
from tests.handles.site import INSTANCE, Gate, Site, echo
from tests.support.waiting import wait_until
from tests.workers.serving import Killable, start_killable

KEYS = Keys(INSTANCE)


def waiters(redis: Redis, record: str) -> list[bytes]:
    """Return the waiters that the record of a kept request names."""
    listed: Any = redis.hget(record, "waiters")
    return listed.split(b"\n") if listed else []


def kill(server: EmbeddedServer) -> None:
    """Kill a server with SIGKILL, and return once its owner has started it again."""
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: server.pid not in (None, pid))


def killable(site: Site, function: str) -> Killable:
    """Start a replica in a process of its own, and return when it claims."""
    return site.run(start_killable(site.url, function))


@pytest.mark.parametrize("has_key", [False, True])
def test_a_request_whose_replica_is_killed_is_run_by_another_and_has_one_result(
    site: Site, connected: Connection, has_key: bool
) -> None:
    site.declare()
    handle = connected.get_handle("ask").options(idempotency_key="k" if has_key else None)
    dying = killable(site, "never")
    submitted = handle.submit("work")
    wait_until(lambda: submitted.status().status == "running")
    site.run(dying.kill())
    site.serve(echo)
    assert submitted.result(timeout=30) == "work"
    status = submitted.status()
    assert (status.status, status.deliveries, status.replica) == ("succeeded", 2, "model#1")
    wait_until(lambda: site.depth() == 0)


def test_a_request_that_kills_its_replicas_fails_with_the_limit_of_deliveries(
    site: Site, connected: Connection
) -> None:
    site.declare()
    dying = killable(site, "who")
    submitted = connected.get_handle("ask").options(idempotency_key="k").submit(b"die")
    site.run(dying.ended())
    site.serve(echo, max_deliveries=1)
    for _ in range(2):
        with pytest.raises(DeliveryLimitExceeded):
            submitted.result(timeout=30)
    status = submitted.status()
    assert status.status == "failed"
    assert status.error is not None
    assert status.error["type"] == "DeliveryLimitExceeded"
    assert len(connected.dead_letters("model")) == 1
    wait_until(lambda: site.depth() == 0)


def dead_letter(site: Site, connected: Connection, **config: Any) -> Submitted:
    """Submit a request with the key ``k`` that kills its replica, and return it once it is a dead letter."""
    site.declare(max_deliveries=1, **config)
    dying = killable(site, "who")
    submitted = connected.get_handle("ask").options(idempotency_key="k").submit(b"die")
    site.run(dying.ended())
    first = site.serve(echo, max_deliveries=1, **config)
    with pytest.raises(DeliveryLimitExceeded):
        submitted.result(timeout=30)
    site.run(first.drain(5.0))
    return submitted


def replay(connected: Connection) -> None:
    letters = connected.dead_letters("model")
    (letter,) = letters
    letters.replay(letter.id)
    assert len(letters) == 0


def test_the_replay_of_a_dead_letter_replaces_its_error(site: Site, connected: Connection) -> None:
    submitted = dead_letter(site, connected)
    replay(connected)
    queued = submitted.status()
    assert (queued.status, queued.endpoint, queued.error, queued.finished) == ("queued", "ask", None, None)
    assert counts(site) == {"queued": 1, "failed": 1}
    site.serve(echo, max_deliveries=1)
    assert submitted.result(timeout=30) == b"die"
    assert submitted.status().status == "succeeded"
    assert counts(site) == {"succeeded": 1, "failed": 1}
    repeated = connected.get_handle("ask").options(idempotency_key="k").submit(b"die")
    assert repeated.id == submitted.id
    assert repeated.result(timeout=30) == b"die"
    wait_until(lambda: site.batch_depth() == 0)


def test_the_replay_of_a_dead_letter_is_cancelled_like_any_request(site: Site, connected: Connection) -> None:
    submitted = dead_letter(site, connected)
    replay(connected)
    assert site.batch_depth() == 1
    assert submitted.cancel()
    assert site.batch_depth() == 0
    assert submitted.status().status == "cancelled"


def test_the_replay_of_a_dead_letter_has_a_result_although_its_record_has_expired(
    site: Site, connected: Connection
) -> None:
    submitted = dead_letter(site, connected)
    with Redis.from_url(site.url) as redis:
        redis.delete(KEYS.kept("model", submitted.id), KEYS.result("model", submitted.id))
    with pytest.raises(RequestNotFound):
        submitted.status()
    replay(connected)
    site.serve(echo, max_deliveries=1)
    assert submitted.result(timeout=30) == b"die"
    assert submitted.status().created > 0


def test_results_survive_a_kill_of_an_append_only_broker(durable: EmbeddedServer) -> None:
    site, gate = Site(durable.url), Gate(opens_within_s=30)
    with handles.connect(durable.url) as connection, ThreadPoolExecutor(1) as pool:
        site.serve(gate, max_concurrent_queries=4)
        handle = connection.get_handle("ask")
        gate.is_open.set()
        done = [handle.submit(n) for n in range(20)]
        assert [one.result(timeout=20) for one in done] == list(range(20))
        gate.is_open.clear()
        begun = [handle.submit(n) for n in range(20, 40)]
        waiting = pool.submit(begun[0].result, 30)
        keyed = handle.options(idempotency_key="k").remote("keyed")
        wait_until(lambda: len(gate.runs) == 24)
        kill(durable)
        gate.is_open.set()
        assert waiting.result(40) == 20
        assert keyed.result(40) == "keyed"
        assert [one.result(timeout=30) for one in (*done, *begun)] == list(range(40))
        assert handle.options(idempotency_key="k").remote("keyed").result(20) == "keyed"
        assert len(gate.runs) == 41
    site.close()


def test_a_call_with_a_key_is_published_again_when_redis_lost_it() -> None:
    with EmbeddedServer.start() as server:
        site, gate = Site(server.url), Gate(opens_within_s=30)
        with handles.connect(server.url) as connection:
            site.serve(gate)
            future = connection.get_handle("ask").options(idempotency_key="k").remote("kept")
            wait_until(lambda: gate.runs)
            kill(server)
            gate.is_open.set()
            assert future.result(40) == "kept"
        site.close()


def test_a_result_that_was_stored_and_never_sent_is_found(site: Site, connected: Connection) -> None:
    """As after the death of a replica between the two."""
    gate = Gate(opens_within_s=30)
    site.serve(gate)
    submitted = connected.get_handle("ask").submit("kept")
    record = KEYS.kept("model", submitted.id)
    with ThreadPoolExecutor(1) as pool, Redis.from_url(site.url) as redis:
        waiting = pool.submit(submitted.result, 30)

        wait_until(lambda: gate.runs and waiters(redis, record))
        redis.hdel(record, "waiters")
        gate.is_open.set()
        assert waiting.result(30) == "kept"


def test_waiting_goes_on_after_the_reply_stream_was_lost(site: Site, connected: Connection) -> None:
    gate = Gate(opens_within_s=30)
    site.serve(gate)
    submitted = connected.get_handle("ask").submit("kept")
    with ThreadPoolExecutor(1) as pool, Redis.from_url(site.url) as redis:
        waiting = pool.submit(submitted.result, 30)
        wait_until(lambda: gate.runs)
        redis.delete(*redis.keys("penstock:*:replies"))
        gate.is_open.set()
        assert waiting.result(30) == "kept"


def test_many_waits_for_one_result_end_together(site: Site, connected: Connection) -> None:
    gate = Gate(opens_within_s=30)
    site.serve(gate)
    submitted = connected.get_handle("ask").submit("x" * 300_000)
    record = KEYS.kept("model", submitted.id)

    async def wait_for_all() -> list[Any]:
        other = handles.AsyncSubmitted(site.url, INSTANCE, submitted.id)
        waits = [asyncio.ensure_future(other.result(timeout=20)) for _ in range(100)]
        await asyncio.to_thread(wait_until, lambda: len(waiters(redis, record)) == 100)
        for wait in waits[:10]:
            wait.cancel()
        await asyncio.to_thread(wait_until, lambda: len(waiters(redis, record)) == 90)
        gate.is_open.set()
        return await asyncio.gather(*waits[10:])

    with Redis.from_url(site.url) as redis:
        assert asyncio.run(wait_for_all()) == ["x" * 300_000] * 90


def test_a_call_that_is_accepted_late_is_not_taken_for_one_that_redis_lost(
    site: Site, connected: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a busy machine, where the check for results that were not sent comes before the broker's answer."""
    from penstock.broker.results.accepting import KeptAdmission

    gate, accept = Gate(opens_within_s=30), KeptAdmission.accept
    site.serve(gate)

    async def accept_late(*arguments: Any) -> Any:
        accepted = await accept(*arguments)
        await asyncio.sleep(2.5)
        return accepted

    handle = connected.get_handle("ask").options(idempotency_key="k")
    first = handle.remote("kept")
    wait_until(lambda: gate.runs)
    monkeypatch.setattr(KeptAdmission, "accept", accept_late)
    late = handle.remote("kept")
    with pytest.raises(TimeoutError):
        late.result(4)
    gate.is_open.set()
    assert first.result(20) == late.result(20) == "kept"
