"""Retries of user code, as callers see them, on real brokers with real replicas."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from itertools import count
from time import monotonic, time
from typing import Any, cast

import pytest
from redis import Redis

from penstock import handles
from penstock.broker.registry.records import RetrySpec
from penstock.broker.wire._fields import LARGE
from penstock.broker.wire.keys import Keys
from penstock.handles.connection import Connection
from penstock.handles.errors import BackendError, Overloaded, RequestCancelled
from penstock.workers.executing.accept_batch import accept_batch
from penstock.workers.retry import Retry
from tests.handles.site import INSTANCE, Site, echo
from tests.support.waiting import wait_until
from tests.workers.serving import start_killable

KEYS = Keys(INSTANCE)
SOON = RetrySpec(max_attempts=4, on=("ConnectionError",), backoff_s=0.01)
LATER_S = 3600.0
"""A time that no test waits for."""


class Failing:
    """Code that raises ``error`` in the first calls for each value, and counts its calls."""

    def __init__(self, error: Callable[[], Exception], times: int) -> None:
        self._error, self._times = error, times
        self.calls: Counter[Any] = Counter()

    def __call__(self, request: Any) -> Any:
        if self.note(request.data) <= self._times:
            raise self._error()
        return request.data

    def note(self, value: Any) -> int:
        """Count a call for ``value``, and return the count."""
        value = str(value)[:100]
        self.calls[value] += 1
        return self.calls[value]


def refused() -> ConnectionError:
    return ConnectionRefusedError("nobody listens")


def later() -> Retry:
    return Retry("not now", after_s=LATER_S)


@pytest.fixture
def redis(site: Site) -> Iterator[Redis]:
    with Redis.from_url(site.url) as redis:
        yield redis


def due_ms(redis: Redis) -> list[int]:
    """Return when the requests are due that wait for their next attempt."""
    raw: list[Any] = [redis.get(key) for key in redis.keys(KEYS.retry("model", "*"))]
    return [due for one in raw if one is not None and (due := int(one.partition(b":")[2]))]


def waiting(redis: Redis) -> int:
    """Return how many requests wait for their next attempt."""
    return len(due_ms(redis))


@pytest.mark.parametrize("is_async", [False, True])
def test_a_named_error_is_retried_until_the_code_succeeds(any_site: Site, is_async: bool) -> None:
    code = Failing(refused, times=3)

    async def on_loop(request: Any) -> Any:
        return code(request)

    any_site.serve(on_loop if is_async else code, retry=SOON)
    with handles.connect(any_site.url, INSTANCE) as connection:
        futures = [connection.get_handle("ask").remote(n) for n in range(20)]
        assert [future.result(timeout=20) for future in futures] == list(range(20))
    assert set(code.calls.values()) == {4}
    wait_until(lambda: any_site.depth() == 0)
    assert any_site.keys_left() == set()


def test_the_last_error_is_the_callers_when_the_attempts_are_exhausted(site: Site, connected: Connection) -> None:
    numbers = count(1)
    code = Failing(lambda: ConnectionError(f"attempt {next(numbers)}"), times=99)
    site.serve(code, retry=SOON)
    with pytest.raises(BackendError, match="attempt 4") as raised:
        connected.get_handle("ask").remote("x").result(timeout=20)
    assert raised.value.type_name == "ConnectionError"
    assert code.calls["x"] == 4
    wait_until(lambda: site.keys_left() == set())


def test_other_errors_are_not_retried(site: Site, connected: Connection) -> None:
    code = Failing(lambda: KeyError("k"), times=1)
    site.serve(code, retry=SOON)
    with pytest.raises(BackendError, match="'k'"):
        connected.get_handle("ask").remote("x").result(timeout=20)
    assert code.calls["x"] == 1


def test_retry_asks_for_three_attempts_without_a_configuration(site: Site, connected: Connection) -> None:
    code = Failing(lambda: Retry("not now", after_s=0.05), times=99)
    site.serve(code)
    began_s = monotonic()
    with pytest.raises(BackendError, match="not now") as raised:
        connected.get_handle("ask").remote("x").result(timeout=20)
    assert raised.value.type_name.endswith(".Retry")
    assert code.calls["x"] == 3
    assert monotonic() - began_s >= 0.1


def test_a_configuration_is_applied_to_a_running_replica(site: Site, connected: Connection) -> None:
    code = Failing(refused, times=1)
    replica = site.serve(code)
    handle = connected.get_handle("ask")
    with pytest.raises(BackendError, match="nobody listens"):
        handle.remote("before").result(timeout=20)
    config = replica._runner.config  # pyright: ignore[reportPrivateUsage]
    site.run(replica.reconfigure(replace(config, retry=SOON)))
    assert handle.remote("after").result(timeout=20) == "after"
    assert code.calls == {"before": 1, "after": 2}


# -- while a request waits


def test_a_waiting_request_occupies_no_slot_and_counts_as_unsettled(
    site: Site, connected: Connection, redis: Redis
) -> None:
    def code(request: Any) -> Any:
        if request.data == "later":
            raise later()
        return request.data

    site.serve(code, max_concurrent_queries=1)
    site.declare(max_queued_requests=3)
    handle = connected.get_handle("ask")
    kept_waiting = [handle.remote("later") for _ in range(2)]
    wait_until(lambda: waiting(redis) == 2)
    assert [handle.remote(n).result(timeout=20) for n in range(30)] == list(range(30))
    assert site.depth() == 2
    kept_waiting.append(handle.remote("later"))
    wait_until(lambda: waiting(redis) == 3)
    with pytest.raises(Overloaded, match="max_queued_requests is 3"):
        handle.remote("more").result(timeout=20)
    for future in kept_waiting:
        assert future.cancel()
    wait_until(lambda: site.depth() == 0)


def test_as_many_run_at_once_as_there_are_slots_however_many_become_due_together(
    site: Site, connected: Connection
) -> None:
    running, most, seen = 0, 0, Failing(later, times=0)

    async def code(request: Any) -> Any:
        nonlocal running, most
        if seen.note(request.data) == 1:
            raise Retry(after_s=0.3)
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return request.data

    site.serve(code, max_concurrent_queries=4)
    futures = [connected.get_handle("ask").remote(n) for n in range(60)]
    assert [future.result(timeout=20) for future in futures] == list(range(60))
    assert set(seen.calls.values()) == {2}
    assert most == 4


def test_a_request_that_is_cancelled_while_it_waits_does_not_run_again(
    site: Site, connected: Connection, redis: Redis
) -> None:
    code = Failing(later, times=9)
    site.serve(code)
    future = connected.get_handle("ask").remote("x")
    wait_until(lambda: waiting(redis) == 1)
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result(timeout=20)
    wait_until(lambda: site.depth() == 0)
    wait_until(lambda: site.keys_left() == set())
    assert code.calls["x"] == 1


def test_a_request_that_is_cancelled_while_it_runs_does_not_run_again(site: Site, connected: Connection) -> None:
    began, may_end, code = threading.Event(), threading.Event(), Failing(later, times=9)

    def slowly(request: Any) -> Any:
        began.set()
        assert may_end.wait(20)
        return code(request)

    site.serve(slowly)
    handle = connected.get_handle("ask")
    future = handle.remote("x")
    assert began.wait(20)
    assert future.cancel()
    wait_until(lambda: site.depth() == 0)
    may_end.set()
    with pytest.raises(BackendError, match="not now"):
        handle.options(timeout_s=20).remote("y").result(timeout=20)
    wait_until(lambda: site.keys_left() == set())
    assert code.calls == {"x": 1, "y": 1}


def test_a_submitted_request_shows_its_attempts_and_is_cancelled_while_it_waits(
    site: Site, connected: Connection, redis: Redis
) -> None:
    code = Failing(refused, times=2)
    site.serve(code, retry=SOON)
    submitted = connected.get_handle("ask").submit("x")
    assert submitted.result(timeout=20) == "x"
    status = submitted.status()
    assert (status.status, status.deliveries, status.attempts) == ("succeeded", 1, 3)

    site.serve(Failing(later, times=9), "other", tag="other")
    endless = connected.get_handle("other").submit("y")
    wait_until(lambda: redis.keys(KEYS.retry("other", "*")) and endless.status().status == "running")
    status = endless.status()
    assert (status.deliveries, status.attempts) == (1, 1)
    assert endless.cancel()
    wait_until(lambda: site.depth("other") == 0)
    assert endless.status().status == "cancelled"
    with pytest.raises(RequestCancelled):
        endless.result(timeout=20)


def test_no_attempt_begins_after_the_deadline(site: Site, connected: Connection) -> None:
    code = Failing(lambda: Retry("not now", after_s=60), times=9)
    site.serve(code)
    handle = connected.get_handle("ask").options(timeout_s=30)
    with pytest.raises(BackendError, match="not now"):
        handle.remote("x").result(timeout=20)
    assert code.calls["x"] == 1


def test_a_key_runs_once_for_all_attempts(site: Site, connected: Connection) -> None:
    code = Failing(refused, times=2)
    site.serve(code, retry=SOON)
    handle = connected.get_handle("ask").options(idempotency_key="k")
    futures = [handle.remote("x") for _ in range(10)]
    assert [future.result(timeout=20) for future in futures] == ["x"] * 10
    assert code.calls["x"] == 3


def test_a_large_body_is_there_for_each_attempt(site: Site, connected: Connection) -> None:
    code, body = Failing(refused, times=2), "x" * (LARGE + 1)
    site.serve(code, retry=SOON)
    assert connected.get_handle("ask").remote(body).result(timeout=20) == body
    assert set(code.calls.values()) == {3}
    wait_until(lambda: site.keys_left() == set())


# -- batches and streams


def test_an_item_of_a_batch_is_retried_alone(site: Site, connected: Connection) -> None:
    seen = Failing(refused, times=2)

    @accept_batch
    def code(requests: Sequence[Any]) -> list[Any]:
        def outcome(value: Any) -> Any:
            times = seen.note(value)
            return refused() if value == 3 and times <= 2 else value

        return [outcome(request.data) for request in requests]

    site.serve(code, max_batch_size=8, batch_wait_timeout=0.1, retry=SOON)
    futures = [connected.get_handle("ask").remote(n) for n in range(8)]
    assert [future.result(timeout=20) for future in futures] == list(range(8))
    assert seen.calls == {**dict.fromkeys(map(str, range(8)), 1), "3": 3}


def test_every_item_of_a_batch_that_raised_is_retried(site: Site, connected: Connection) -> None:
    seen, calls = Failing(refused, times=0), count(1)

    @accept_batch
    async def code(requests: Sequence[Any]) -> list[Any]:
        for request in requests:
            seen.note(request.data)
        if next(calls) == 1:
            raise refused()
        return [request.data for request in requests]

    site.serve(code, max_batch_size=8, batch_wait_timeout=0.1, retry=SOON)
    futures = [connected.get_handle("ask").remote(n) for n in range(8)]
    assert [future.result(timeout=20) for future in futures] == list(range(8))
    assert max(seen.calls.values()) == 2


def test_a_stream_is_retried_only_before_its_first_value(site: Site, connected: Connection) -> None:
    seen = Failing(refused, times=1)

    def code(request: Any) -> Any:
        fails = seen.note(request.data) == 1
        if fails and request.data == "before":
            raise refused()
        yield "first"
        if fails and request.data == "after":
            raise refused()
        yield "second"

    site.serve(code, retry=SOON)
    handle = connected.get_handle("ask").options(stream=True)
    assert list(cast(Any, handle.remote("before"))) == ["first", "second"]
    with pytest.raises(BackendError, match="nobody listens"):
        list(cast(Any, handle.remote("after")))
    assert seen.calls == {"before": 2, "after": 1}


# -- deaths and drains


def test_a_waiting_request_survives_the_kill_of_its_replica_with_its_attempts(
    site: Site, connected: Connection, redis: Redis
) -> None:
    """Its death is not counted either: with ``max_deliveries=1`` the request would be a dead letter."""
    site.declare(max_deliveries=1)
    killable = site.run(start_killable(site.url, "fail_for_now"))
    submitted = connected.get_handle("ask").submit("x")
    wait_until(lambda: waiting(redis) == 1 and submitted.status().status == "running")
    (due,) = due_ms(redis)
    site.run(killable.kill())
    runs: list[float] = []

    def code(request: Any) -> Any:
        runs.append(time())
        raise Retry("not now", after_s=0.0)

    site.serve(code, max_deliveries=1)
    with pytest.raises(BackendError, match="not now"):
        submitted.result(timeout=30)
    assert len(runs) == 2
    assert runs[0] >= due / 1000 - 0.1
    status = submitted.status()
    assert (status.status, status.deliveries, status.attempts) == ("failed", 2, 3)
    assert len(connected.dead_letters("model")) == 0
    wait_until(lambda: site.depth() == 0)


def test_a_replica_that_drains_leaves_its_waiting_requests_to_another(
    site: Site, connected: Connection, redis: Redis
) -> None:
    code = Failing(lambda: Retry(after_s=1.0), times=2)
    first = site.serve(code)
    future = connected.get_handle("ask").remote("x")
    wait_until(lambda: waiting(redis) == 1)
    assert site.run(first.drain(5.0))
    assert code.calls["x"] == 1
    site.serve(echo)
    assert future.result(timeout=20) == "x"
    wait_until(lambda: site.keys_left() == set())


def test_what_fails_while_its_replica_drains_is_left_to_another(
    site: Site, connected: Connection, redis: Redis
) -> None:
    began, may_end = threading.Event(), threading.Event()

    def fail(request: Any) -> Any:
        began.set()
        assert may_end.wait(20)
        raise Retry(after_s=0.1)

    first = site.serve(fail)
    future = connected.get_handle("ask").remote("x")
    assert began.wait(20)
    draining = threading.Thread(target=lambda: site.run(first.drain(10.0)))
    draining.start()
    wait_until(lambda: first._consumer.is_draining)  # pyright: ignore[reportPrivateUsage]
    may_end.set()
    draining.join(20)
    site.serve(echo)
    assert future.result(timeout=20) == "x"


def test_the_stats_count_attempts_apart_from_requests(site: Site, connected: Connection) -> None:
    replica = site.serve(Failing(refused, times=2), retry=SOON)
    assert connected.get_handle("ask").remote("x").result(timeout=20) == "x"
    stats = replica.run_stats
    assert (stats.served, stats.failed, stats.retried) == (1, 0, 2)
