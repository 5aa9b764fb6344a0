"""Reports of batch jobs: how far they have come, while they run and after that."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from redis import Redis

from penstock.broker.registry.reports import JobReport
from penstock.broker.registry.store import Registry
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys
from penstock.handles.connection import Connection
from tests.handles.site import INSTANCE, Site, echo
from tests.support.waiting import wait_until

KEYS = Keys(INSTANCE)


def reported(site: Site, job: str = "j") -> dict[str, Any] | None:
    """Return the report of a job, as the registry has it."""
    with Redis.from_url(site.url) as redis:
        raw = redis.hget(KEYS.reports("jobs"), f"job:{job}")
    return None if raw is None else dict(json.loads(raw))


def part_of(report: dict[str, Any] | None, *names: str) -> tuple[Any, ...]:
    assert report is not None
    return tuple(report.get(name) for name in names)


def fail_on_odd(request: Any) -> Any:
    if request.data % 2:
        raise ValueError(request.data)
    return request.data


def test_the_report_of_a_job_follows_it_to_its_end(site: Site, connected: Connection) -> None:
    gate = threading.Event()

    def wait_at_the_end(request: Any) -> Any:
        assert request.data < 3 or gate.wait(20)
        return request.data

    site.serve(wait_at_the_end)
    results = iter(connected.batch("ask", job="j").as_completed([0, 1, 2, 3]))
    taken = {next(results).value for _ in range(3)}
    wait_until(lambda: (reported(site) or {}).get("done") == 3)
    running = reported(site)
    assert part_of(running, "job", "endpoint", "state", "total", "in_flight") == ("j", "ask", "running", 4, 1)
    gate.set()
    assert {*taken, *(result.value for result in results)} == {0, 1, 2, 3}
    assert part_of(reported(site), "state", "done", "errors", "total", "in_flight") == ("finished", 4, 0, 4, 0)


def test_errors_are_counted_and_items_of_an_earlier_run_too(site: Site, connected: Connection) -> None:
    site.serve(fail_on_odd)
    for _ in range(2):
        assert len(list(connected.batch("ask", job="j").map(range(10)))) == 10
        assert part_of(reported(site), "state", "done", "errors", "total") == ("finished", 10, 5, 10)


def test_a_job_that_is_left_early_has_stopped_and_one_that_cannot_go_on_has_failed(
    site: Site, connected: Connection
) -> None:
    site.serve(echo)
    results: Any = iter(connected.batch("ask", job="j").map(n for n in range(5_000)))
    next(results)
    results.close()
    assert part_of(reported(site), "state", "total") == ("stopped", None)
    with pytest.raises(Exception, match="belongs to another input"):
        list(connected.batch("ask", job="j").map(["other"] * 5_000))
    assert part_of(reported(site), "state") == ("failed",)


def test_a_batch_without_a_name_is_not_reported(site: Site, connected: Connection) -> None:
    site.serve(echo)
    assert len(list(connected.batch("ask").map(range(3)))) == 3
    with Redis.from_url(site.url) as redis:
        assert not redis.exists(KEYS.reports("jobs"))


def test_a_silent_job_has_stopped_and_its_report_is_kept_for_as_long_as_its_results() -> None:
    report = JobReport(job="j", endpoint="ask", at_ms=1_000_000, ttl_s=60)
    assert report.state_at(1_003_000) == "running"
    assert report.state_at(1_011_000) == "stopped"
    assert not report.has_expired(1_059_000)
    assert report.has_expired(1_061_000)


async def test_reports_of_expired_jobs_and_those_that_cannot_be_read_are_left_out_and_forgotten(redis_url: str) -> None:
    connection = await RedisConnection(redis_url).open()
    registry = Registry(connection, KEYS)
    now_ms = connection.now_ms()
    for name, at_ms in (("old", now_ms - 61_000), ("new", now_ms)):
        await registry.put_report(f"job:{name}", JobReport(job=name, endpoint="ask", at_ms=at_ms, ttl_s=60))
    await connection.send("HSET", KEYS.reports("jobs"), "job:bad", "[", b"\xff", "{}", "job:worse", '{"job": 1}')
    assert list(await registry.get_jobs()) == ["job:new"]
    await registry.forget_jobs()
    assert await connection.send("HKEYS", KEYS.reports("jobs")) == [b"job:new"]
    await registry.erase()
    await connection.close()
