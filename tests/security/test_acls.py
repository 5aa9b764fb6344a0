"""Every part of Penstock under the rules of ``docs/security.md``, and nothing beyond them."""

import asyncio
from typing import Any

import httpx
import pytest
from redis import Redis

from penstock import handles
from penstock.broker.registry.reports import JobReport
from penstock.broker.wire._fields import LARGE
from penstock.handles.calls.shared_client import SharedClient
from penstock.handles.errors import DeliveryLimitExceeded, Overloaded
from penstock.workers.retry import Retry
from tests.security.site import KEYS, Site, echo, slowly
from tests.support.guarded import Guarded, documented_rules
from tests.support.waiting import wait_until, wait_until_async


def test_the_document_has_the_rules_of_every_role() -> None:
    assert list(documented_rules()) == ["owner", "alice", "proxy", "replica"]


async def test_callers_of_every_kind_are_answered(site: Site, broker: Guarded) -> None:
    await site.serve(echo)
    large = "x" * (LARGE + 1)

    def call() -> None:
        with handles.connect(broker.url("alice")) as connection:
            handle = connection.get_handle("f")
            assert handle.remote({"a": 1}).result(timeout=10) == {"a": 1}
            assert handle.remote(large).result(timeout=10) == large
            assert [result.value for result in connection.batch("f").map(range(20))] == list(range(20))

    await asyncio.to_thread(call)
    with handles.connect(broker.url("alice")) as connection:
        handle = connection.get_handle("f", sync=False)
        assert await (await handle.remote(7)) == 7
        assert await (await handle.remote(large)) == large
    await (await SharedClient.get(broker.url("alice"), "default")).close()


async def test_callers_that_may_not_read_the_queue_are_refused_while_it_is_full(site: Site, broker: Guarded) -> None:
    await site.declare(max_queued_requests=2)
    await site.declare("g", max_queued_bytes=1024 * 1024)
    with handles.connect(broker.url("alice")) as connection:
        full, narrow = (connection.get_handle(name, sync=False) for name in "fg")
        calls = [await full.remote(n) for n in range(2)]
        with pytest.raises(Overloaded, match="max_queued_requests is 2"):
            await full.remote(2)
        for size in (100_000, LARGE + 1):
            sent = await asyncio.gather(
                *[narrow.remote("x" * size) for _ in range(12)], narrow.remote("small"), return_exceptions=True
            )
            refused = [call for call in sent if isinstance(call, BaseException)]
            calls += [call for call in sent if not isinstance(call, BaseException)]
            assert {type(error) for error in refused} == {Overloaded}
            assert "max_queued_bytes is 1048576" in str(refused[0])
        for call in calls:
            call.cancel()
    await (await SharedClient.get(broker.url("alice"), "default")).close()


async def test_a_proxy_serves_as_its_own_user(site: Site, broker: Guarded) -> None:
    await site.serve(echo)
    url = await site.proxy()
    async with httpx.AsyncClient(base_url=url) as http:
        assert (await http.post("/f", json={"a": 1})).json() == {"a": 1}
        large = b"x" * (LARGE + 1)
        assert (await http.post("/f", content=large)).content == large
        assert (await http.get("/-/healthz")).status_code == 200

        async def has_counted() -> bool:
            return 'penstock_backend_served_total{backend="f"} 2\n' in (await http.get("/-/metrics")).text

        await wait_until_async(has_counted)


def reporting(request: Any) -> Any:
    request.report_progress({"size": len(request.data)})
    return request.data


async def test_submitted_requests_and_keys_need_no_more_than_the_rules(site: Site, broker: Guarded) -> None:
    await site.serve(reporting)
    await site.declare("idle", max_queued_requests=2)
    url = await site.proxy()
    large = "x" * (LARGE + 1)

    def call() -> str:
        with handles.connect(broker.url("alice")) as connection:
            handle = connection.get_handle("f")
            for body in ("small", large):
                submitted = handle.submit(body)
                assert submitted.result(timeout=10) == body
                assert submitted.status().status == "succeeded"
                assert not submitted.cancel()
                keyed = handle.options(idempotency_key=body[:9])
                assert keyed.remote(body).result(timeout=10) == keyed.remote(body).result(timeout=10) == body
            idle = connection.get_handle("idle")
            waiting = [idle.submit(n) for n in range(2)]
            with pytest.raises(Overloaded):
                idle.submit(2)
            assert all(one.cancel() for one in waiting)
            return submitted.id

    id_ = await asyncio.to_thread(call)
    async with httpx.AsyncClient(base_url=url, timeout=20) as http:
        assert (await http.get(f"/-/requests/{id_}/result")).text == large
        headers = {"prefer": "respond-async", "idempotency-key": "k"}
        location = (await http.post("/f", json="web", headers=headers)).headers["location"]
        assert (await http.get(f"{location}/result", headers={"prefer": "wait=10"})).text == "web"
        assert (await http.get(location)).json()["progress"] == {"size": 3}
        assert (await http.post("/f", json="web", headers={"idempotency-key": "k"})).text == "web"
        assert (await http.delete(location)).status_code == 409


def failing_once(request: Any) -> Any:
    key = request.data["n"]
    CALLS[key] = CALLS.get(key, 0) + 1
    if CALLS[key] == 1:
        raise Retry(after_s=request.data["after_s"])
    return key


CALLS: dict[int, int] = {}


async def test_retries_need_no_more_than_the_rules_also_when_another_replica_goes_on(
    site: Site, broker: Guarded
) -> None:
    CALLS.clear()
    first, _ = await site.serve("tests.security.test_acls:failing_once", replicas=2)

    def call() -> list[Any]:
        with handles.connect(broker.url("alice")) as connection, Redis.from_url(broker.url("admin")) as redis:
            handle = connection.get_handle("f")
            assert handle.remote({"n": 0, "after_s": 0.0}).result(timeout=20) == 0
            futures = [handle.remote({"n": n, "after_s": 2.0}) for n in range(1, 9)]
            wait_until(lambda: len(redis.keys(KEYS.retry("f", "*"))) == 8)
            asyncio.run_coroutine_threadsafe(first.drain(5.0), loop).result(20)
            values = [future.result(timeout=20) for future in futures]
            wait_until(lambda: not redis.keys(KEYS.retry("f", "*")))
            return values

    loop = asyncio.get_running_loop()
    assert await asyncio.to_thread(call) == list(range(1, 9))
    assert set(CALLS.values()) == {2}


def published(redis: Any) -> int:
    """Return how many requests were published so far, settled ones included."""
    return int(redis.xinfo_stream(KEYS.requests("f"))["entries-added"])


async def test_a_proxy_rides_through_a_broken_connection_and_runs_nothing_twice(site: Site, broker: Guarded) -> None:
    await site.serve(slowly, max_concurrent_queries=4)
    url = await site.proxy()
    async with httpx.AsyncClient(base_url=url, timeout=20) as http:
        answers = [asyncio.ensure_future(http.post("/f", json=n)) for n in range(8)]
        with Redis.from_url(broker.url("admin")) as redis:
            await wait_until_async(lambda: published(redis) == 8)
            broker.cut("proxy")
            assert [(await answer).json() for answer in answers] == list(range(8))
            added = published(redis)
    assert added == 8  # none was published again


async def test_a_cancelled_request_does_not_run(site: Site, broker: Guarded) -> None:
    seen: list[int] = []
    await site.serve(slowly, max_concurrent_queries=1)

    def call() -> None:
        with handles.connect(broker.url("alice")) as connection, Redis.from_url(broker.url("admin")) as redis:
            handle = connection.get_handle("f")
            futures = [handle.remote(n) for n in range(3)]
            wait_until(lambda: published(redis) == 3)
            assert futures[2].cancel()
            seen.extend(future.result(timeout=10) for future in futures[:2])
            wait_until(lambda: redis.xlen(KEYS.requests("f")) == 0)

    await asyncio.to_thread(call)
    assert seen == [0, 1]


async def test_a_caller_that_may_not_read_streams_rides_through_a_broken_connection(
    site: Site, broker: Guarded
) -> None:
    """It publishes again what it cannot look for: every request is answered, some may run twice."""
    await site.serve(slowly, max_concurrent_queries=4)

    def call() -> list[Any]:
        with handles.connect(broker.url("alice")) as connection, Redis.from_url(broker.url("admin")) as redis:
            handle = connection.get_handle("f")
            futures = [handle.remote(n) for n in range(20)]
            wait_until(lambda: published(redis) == 20)
            broker.cut("alice")
            results = [future.result(timeout=20) for future in futures]
            wait_until(lambda: redis.xlen(KEYS.requests("f")) == 0)
            return results

    assert await asyncio.to_thread(call) == list(range(20))
    assert await asyncio.to_thread(broker.denied) == ["alice: command xrange"]


async def test_a_continued_batch_job_sends_the_items_again_that_it_cannot_look_up(
    site: Site, broker: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    await site.serve(echo)

    def twice() -> list[list[Any]]:
        with handles.connect(broker.url("alice")) as connection:
            return [[result.value for result in connection.batch("f", job="j").map(range(20))] for _ in range(2)]

    assert await asyncio.to_thread(twice) == [list(range(20))] * 2
    assert "cannot read which items of job 'j' are queued for backend 'f'" in caplog.text
    (report,) = (await site.registry.get_reports(JobReport)).values()
    assert (report.state, report.done) == ("finished", 20)
    assert await asyncio.to_thread(broker.denied) == ["alice: command xrange"]


async def test_the_claims_of_a_dead_replica_are_redelivered_and_become_dead_letters_at_last(
    site: Site, broker: Guarded
) -> None:
    await site.serve(echo, "idle")

    def call() -> None:
        with Redis.from_url(broker.url("admin")) as redis, handles.connect(broker.url("alice")) as connection:
            future = connection.get_handle("f").remote(1)
            redis.xgroup_create(KEYS.requests("f"), "replicas", "0", mkstream=True)
            wait_until(lambda: redis.xreadgroup("replicas", "ghost", {KEYS.requests("f"): ">"}))
            loop.call_soon_threadsafe(died.set)
            with pytest.raises(DeliveryLimitExceeded):
                future.result(timeout=20)
        with handles.connect(broker.url("owner")) as owner:
            letters = owner.dead_letters("f")
            letter = next(iter(letters))
            assert letters.body(letter) == b"1"
            letters.replay(letter.id)
            assert len(letters) == 0

    died, loop = asyncio.Event(), asyncio.get_running_loop()
    await site.declare()
    calling = asyncio.ensure_future(asyncio.to_thread(call))
    await died.wait()
    await site.serve(echo, max_deliveries=1)
    await calling
