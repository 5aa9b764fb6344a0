"""Stats of a backend, as its replicas count them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from redis import Redis

from penstock.broker.queue.group.member import GROUP
from penstock.broker.queue.stats import BackendStats, read_stats
from penstock.broker.registry.records import RetrySpec
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys
from penstock.handles.connection import Connection
from penstock.handles.errors import BackendError, DeliveryLimitExceeded
from tests.handles.site import INSTANCE, Site, echo
from tests.support.waiting import wait_until

KEYS = Keys(INSTANCE)


def sums(site: Site) -> BackendStats:
    """Return the stats that are kept at the broker."""

    async def read() -> BackendStats:
        connection = await RedisConnection(site.url).open()
        try:
            return await read_stats(connection, KEYS, "model")
        finally:
            await connection.close()

    return site.run(read())


def claim_as_a_dead_replica(site: Site, count: int) -> None:
    """Claim requests with a consumer that has no lease."""
    with Redis.from_url(site.url) as redis:
        wait_until(lambda: redis.xlen(KEYS.requests("model")) == count)
        redis.xgroup_create(KEYS.requests("model"), GROUP, "0", mkstream=True)
        redis.xreadgroup(GROUP, "model#ghost", {KEYS.requests("model"): ">"})


def test_outcomes_times_and_retries_are_counted(site: Site, connected: Connection) -> None:
    failed_once: list[Any] = []

    def work(request: Any) -> Any:
        if request.data == "twice" and not failed_once:
            failed_once.append(request.data)
            raise ConnectionError
        if request.data == "bad":
            raise ValueError
        return request.data

    replica = site.serve(work, retry=RetrySpec(max_attempts=2, on=("ConnectionError",), backoff_s=0.01))
    handle = connected.get_handle("ask")
    assert [handle.remote(data).result(timeout=20) for data in ("a", "b", "twice")] == ["a", "b", "twice"]
    with pytest.raises(BackendError):
        handle.remote("bad").result(timeout=20)
    wait_until(lambda: replica.run_stats.served + replica.run_stats.failed == 4)
    counted = replica.run_stats
    assert (counted.served, counted.failed, counted.retried) == (3, 1, 1)
    assert sum(counted.ran) == sum(counted.queued) == 5  # each attempt
    assert counted.run_ms > 0
    wait_until(lambda: site.depth() == 0)
    assert (sums(site).queued, sums(site).in_progress, sums(site).oldest_s) == (0, 0, 0)


def test_redeliveries_are_counted(site: Site, connected: Connection) -> None:
    site.declare()
    future = connected.get_handle("ask").remote("x")
    claim_as_a_dead_replica(site, 1)
    replica = site.serve(echo)
    assert future.result(timeout=20) == "x"
    wait_until(lambda: replica.run_stats.served == 1)
    assert replica.run_stats.redelivered == 1
    assert sums(site).dead_lettered == {}


def test_dead_letters_are_counted_by_their_reason(site: Site, connected: Connection) -> None:
    site.declare(max_deliveries=1)
    future = connected.get_handle("ask").remote("x")
    claim_as_a_dead_replica(site, 1)
    with Redis.from_url(site.url) as redis:
        redis.xadd(KEYS.requests("model"), {"garbage": "x"})
    site.serve(echo, max_deliveries=1)
    with pytest.raises(DeliveryLimitExceeded):
        future.result(timeout=20)
    wait_until(lambda: sums(site).dead_letters == 2)
    assert sums(site).dead_lettered == {"poison": 1, "unreadable": 1}


def test_a_lease_that_expires_although_its_replica_lives_is_counted(site: Site) -> None:
    replica = site.serve(echo)
    with Redis.from_url(site.url) as redis:
        wait_until(lambda: redis.exists(KEYS.alive("model", "model#1")))
        redis.delete(KEYS.alive("model", "model#1"))
        wait_until(lambda: redis.exists(KEYS.alive("model", "model#1")))
    counted = Counter[str]()

    def is_counted() -> bool:
        counted["losses"] += replica.take_run_stats().lease_losses
        return counted["losses"] == 1

    wait_until(is_counted)
