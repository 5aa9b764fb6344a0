"""Submitted requests and idempotency keys through handles, on real brokers with real replicas."""

import asyncio
import pickle
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
from redis import Redis

from penstock import handles
from penstock.broker.queue.counts.queue_depth import read_depth
from penstock.broker.results.counts import read_kept_counts
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.kept import key_digest
from penstock.broker.wire.keys import Keys
from penstock.handles.connection import Connection
from penstock.handles.errors import (
    BackendError,
    ConfigError,
    IdempotencyConflict,
    Overloaded,
    PayloadTooLarge,
    RequestCancelled,
    RequestNotFound,
    RequestTimeout,
    ResultExpired,
    ResultsFull,
)
from tests.handles.site import INSTANCE, Gate, Lingering, Site, close_here, describe, echo, in_loop
from tests.support.waiting import wait_until

KEYS = Keys(INSTANCE)


def always(reply: str) -> Callable[[Any], str]:
    """Return code that has one reply to all requests."""
    return lambda request: reply


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate(lambda run, data: {"run": run, "data": data})
    yield gate
    gate.is_open.set()


def counts(site: Site) -> dict[str, int]:
    """Return the numbers of the kept requests of the endpoint "ask" that are not zero."""

    async def read() -> dict[str, dict[str, int]]:
        connection = await RedisConnection(site.url).open()
        try:
            depth = await read_depth(connection, KEYS, "model")
            return await read_kept_counts(connection, KEYS, "model", unsettled=depth.unsettled)
        finally:
            await connection.close()

    return {state: count for state, count in site.run(read()).get("ask", {}).items() if count}


# -- submitting


def test_requests_are_counted_by_their_state(site: Site, connected: Connection, gate: Gate) -> None:
    site.declare()
    handle = connected.get_handle("ask")
    submitted = [handle.submit(n) for n in range(4)]
    assert counts(site) == {"queued": 4}
    assert submitted[3].cancel()
    assert counts(site) == {"queued": 3, "cancelled": 1}
    site.serve(gate, max_concurrent_queries=1)
    wait_until(lambda: counts(site) == {"queued": 2, "running": 1, "cancelled": 1})
    gate.is_open.set()
    for one in submitted[:3]:
        one.result(timeout=10)
    assert counts(site) == {"succeeded": 3, "cancelled": 1}
    keyed = handle.options(idempotency_key="k")
    assert keyed.remote(9).result(timeout=10) == keyed.remote(9).result(timeout=10)
    assert counts(site) == {"succeeded": 4, "cancelled": 1}


def test_failed_requests_are_counted_also_those_that_were_refused_before_they_ran(
    site: Site, connected: Connection
) -> None:
    def fail(request: Any) -> None:
        raise KeyError(request.data)

    site.serve(fail)
    handle = connected.get_handle("ask")
    with pytest.raises(BackendError):
        handle.submit(1).result(timeout=10)
    assert counts(site) == {"failed": 1}


def test_a_submitted_request_is_answered_to_any_process_that_knows_its_id(any_site: Site) -> None:
    any_site.serve(describe)
    with handles.connect(any_site.url, INSTANCE) as connection:
        submitted = connection.get_handle("ask").submit({"a": 1}, q=[2])
        again = pickle.loads(pickle.dumps(submitted))
    with handles.connect(any_site.url, INSTANCE) as other:
        expected = {"data": {"a": 1}, "query": {"q": [2]}, "method": "GET", "x": None}
        assert other.submitted(submitted.id).result(timeout=10) == expected
        assert again.result() == submitted.result(timeout=10) == expected


def test_the_status_follows_a_request_from_its_queue_to_its_end(site: Site, connected: Connection, gate: Gate) -> None:
    site.declare()
    submitted = connected.get_handle("ask").submit("text")
    queued = submitted.status()
    assert (queued.status, queued.endpoint, queued.queue_depth, queued.deliveries) == ("queued", "ask", 1, 0)
    assert queued.started is None
    assert not queued.is_final
    site.serve(gate)
    wait_until(lambda: submitted.status().status == "running")
    running = submitted.status()
    assert (running.replica, running.deliveries, running.attempts) == ("model#1", 1, 1)
    assert running.started is not None
    assert running.started >= running.created
    gate.is_open.set()
    assert submitted.result(timeout=10) == {"run": 1, "data": "text"}
    done = submitted.status()
    assert done.status == "succeeded"
    assert done.is_final
    assert done.finished is not None
    assert done.finished >= running.started
    assert submitted.id not in repr(done) + repr(submitted)


def test_an_error_of_the_code_is_the_result(site: Site, connected: Connection) -> None:
    def fail(request: Any) -> None:
        raise LookupError("no such thing")

    site.serve(fail)
    submitted = connected.get_handle("ask").submit()
    for _ in range(2):
        with pytest.raises(BackendError, match="no such thing") as raised:
            submitted.result(timeout=10)
        assert raised.value.type_name == "LookupError"
    status = submitted.status()
    assert (status.status, status.error) == ("failed", {"type": "LookupError", "message": "no such thing"})


def test_large_bodies_and_results_are_kept_too(any_site: Site) -> None:
    any_site.serve(echo)
    body = bytes(range(256)) * 4096
    with handles.connect(any_site.url, INSTANCE) as connected:
        submitted = connected.get_handle("ask").submit(body)
        assert submitted.result(timeout=20) == body
        assert submitted.result(timeout=20) == body
        assert connected.get_handle("ask").options(idempotency_key="k").remote(body).result(20) == body


def test_what_the_code_yields_is_kept_whole(site: Site, connected: Connection) -> None:
    async def count(request: Any) -> Any:
        for n in range(request.data):
            yield {"n": n} if n else "é" * 300_000

    site.serve(count)
    handle = connected.get_handle("ask")
    assert handle.submit(3).result(timeout=10) == ["é" * 300_000, {"n": 1}, {"n": 2}]
    assert handle.submit(0).result(timeout=10) == []


def test_batched_code_serves_submitted_requests(site: Site, connected: Connection) -> None:
    from penstock.workers.executing.accept_batch import accept_batch

    @accept_batch
    def double(requests: list[Any]) -> list[Any]:
        return [request.data * 2 for request in requests]

    site.serve(double, max_batch_size=8)
    handle = connected.get_handle("ask")
    submitted = [handle.submit(n) for n in range(20)]
    assert [one.result(timeout=10) for one in submitted] == [2 * n for n in range(20)]


def test_progress_is_shown_while_the_code_runs(site: Site, connected: Connection) -> None:
    go_on, seen = threading.Event(), threading.Event()

    def work(request: Any) -> None:
        request.report_progress({"done": 12345678901234567890123})
        seen.set()
        assert go_on.wait(20)
        request.report_progress(1.0)

    site.serve(work)
    submitted = connected.get_handle("ask").submit()
    wait_until(lambda: submitted.status().progress == {"done": 12345678901234567890123})
    go_on.set()
    assert submitted.result(timeout=10) is None
    assert submitted.status().progress == 1.0


def test_progress_that_was_reported_just_before_the_end_is_kept(site: Site, connected: Connection) -> None:
    async def on_the_loop(request: Any) -> None:
        request.report_progress("all done")

    def on_a_thread(request: Any) -> None:
        request.report_progress("all done")

    for code in (on_the_loop, on_a_thread):
        site.serve(code, code.__name__, tag=code.__name__)
        submitted = connected.get_handle(code.__name__).submit()
        assert submitted.result(timeout=10) is None
        assert submitted.status().progress == "all done"


def test_progress_that_json_cannot_hold_or_is_too_long_raises_in_the_code(site: Site, connected: Connection) -> None:
    def work(request: Any) -> str:
        request.report_progress(request.data if request.data else object())
        return "reported"

    site.serve(work)
    handle = connected.get_handle("ask")
    with pytest.raises(BackendError, match="the progress must be a JSON value"):
        handle.submit().result(timeout=10)
    with pytest.raises(BackendError, match=r"the progress has 5002 bytes as JSON; at most 4096 are allowed"):
        handle.submit("x" * 5000).result(timeout=10)
    assert handle.remote("plain").result(10) == "reported"


# -- waiting, cancelling, expiring


def test_a_result_that_does_not_come_in_time_is_a_timeout_and_can_be_waited_for_again(
    site: Site, connected: Connection, gate: Gate
) -> None:
    site.serve(gate)
    submitted = connected.get_handle("ask").submit(1)
    with pytest.raises(RequestTimeout):
        submitted.result(timeout=0.05)
    gate.is_open.set()
    assert submitted.result(timeout=10)["data"] == 1


def test_a_queued_request_that_is_cancelled_never_starts(site: Site, connected: Connection) -> None:
    site.declare()
    handle = connected.get_handle("ask")
    first, second = handle.submit("first"), handle.submit("second")
    assert first.cancel()
    assert first.status().status == "cancelled"
    assert not first.cancel()
    with pytest.raises(RequestCancelled):
        first.result(timeout=10)
    site.serve(echo)
    assert second.result(timeout=10) == "second"
    assert second.cancel() is False
    assert second.result() == "second"


def test_cancelling_a_running_request_cancels_its_code_and_ends_the_wait_for_it(
    site: Site, connected: Connection
) -> None:
    code = Lingering()
    site.serve(code.run)
    submitted = connected.get_handle("ask").submit()
    assert code.running.wait(10)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(submitted.result, 20)
        assert submitted.cancel()
        assert code.cancelled.wait(10)
        with pytest.raises(RequestCancelled):
            waiting.result(20)
    wait_until(lambda: site.depth() == 0)


def test_the_result_of_code_that_goes_on_after_its_cancellation_is_dropped(
    site: Site, connected: Connection, gate: Gate
) -> None:
    site.serve(gate)
    submitted = connected.get_handle("ask").submit()
    wait_until(lambda: gate.runs)
    assert submitted.cancel()
    gate.is_open.set()
    wait_until(lambda: not [worker for worker in site.replicas if worker.in_progress])
    with pytest.raises(RequestCancelled):
        submitted.result(timeout=10)


def test_a_result_expires_and_is_forgotten_at_last(site: Site, connected: Connection) -> None:
    site.serve(echo, result_ttl_s=1)
    submitted = connected.get_handle("ask").submit("soon gone")
    assert submitted.result(timeout=10) == "soon gone"

    def error() -> type[Exception] | None:
        try:
            submitted.result(timeout=10)
        except Exception as e:
            return type(e)
        return None

    wait_until(lambda: error() is ResultExpired)
    with pytest.raises(ResultExpired):
        submitted.status()
    wait_until(lambda: error() is RequestNotFound)
    with pytest.raises(RequestNotFound):
        submitted.cancel()
    assert {key for key in site.keys_left() if not key.endswith(":results")} == set()


@pytest.mark.parametrize("id_", ["", "x", "../..", "0" * 48, "0" * 10_000])
def test_an_unknown_id_is_found_nowhere(site: Site, connected: Connection, id_: str) -> None:
    site.declare()
    submitted = connected.submitted(id_)
    for method in (submitted.status, submitted.cancel, submitted.result):
        with pytest.raises(RequestNotFound):
            method()
    with pytest.raises(TypeError, match="must be a str, not int"):
        connected.submitted(5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_an_id_of_another_instance_is_unknown(site: Site, connected: Connection) -> None:
    site.serve(echo)
    submitted = connected.get_handle("ask").submit(1)
    assert submitted.result(timeout=10) == 1
    with pytest.raises(RequestNotFound):
        type(submitted)(site.url, "another", submitted.id).status()


def test_a_request_whose_deadline_passes_in_the_queue_fails_and_leaves_its_key_free(
    site: Site, connected: Connection
) -> None:
    site.declare()
    handle = connected.get_handle("ask").options(idempotency_key="k")
    late = handle.options(timeout_s=0.05).submit("late")
    wait_until(lambda: late.status().queue_depth == 1)
    threading.Event().wait(0.1)  # past its deadline
    site.serve(echo)
    with pytest.raises(RequestTimeout):
        late.result(timeout=10)
    assert late.status().status == "failed"
    assert handle.remote("another").result(10) == "another"


# -- refusals


def test_a_full_queue_refuses_and_leaves_the_key_free(site: Site, connected: Connection) -> None:
    site.declare(max_queued_requests=1)
    handle = connected.get_handle("ask")
    waiting = handle.submit("first")
    with pytest.raises(Overloaded):
        handle.options(idempotency_key="k").submit("second")
    assert waiting.cancel()
    handle.options(idempotency_key="k").submit("another body").cancel()


def test_results_have_a_limit_of_bytes(site: Site, connected: Connection) -> None:
    site.serve(echo, max_result_bytes=1024 * 1024, result_ttl_s=2)
    handle = connected.get_handle("ask")
    with pytest.raises(BackendError, match=r"the body has 1500000 bytes or more \(max_result_bytes is 1048576\)"):
        handle.submit(b"x" * 1_500_000).result(timeout=10)
    assert len(handle.submit(b"x" * 1_048_000).result(timeout=10)) == 1_048_000
    with pytest.raises(ResultsFull, match="max_result_bytes is 1048576"):
        handle.submit(1)
    with pytest.raises(ResultsFull):
        handle.options(idempotency_key="k").remote(1).result(10)
    assert handle.remote("a plain call").result(10) == "a plain call"

    def fits_again() -> bool:
        try:
            return bool(handle.submit(1).result(timeout=10) == 1)
        except ResultsFull:
            return False

    wait_until(fits_again)


def test_a_body_larger_than_may_be_queued_is_refused(site: Site, connected: Connection) -> None:
    site.declare(max_queued_bytes=1024 * 1024)
    with pytest.raises(PayloadTooLarge):
        connected.get_handle("ask").submit(b"x" * 1024 * 1024)


# -- idempotency keys


def test_the_same_key_is_run_once_and_answered_to_all(site: Site, connected: Connection, gate: Gate) -> None:
    site.serve(gate, max_concurrent_queries=8)
    handle = connected.get_handle("ask").options(idempotency_key="order-7")
    futures = [handle.remote({"n": 1}) for _ in range(50)]
    submitted = [handle.submit({"n": 1}) for _ in range(3)]
    wait_until(lambda: gate.runs)
    gate.is_open.set()
    assert [future.result(10) for future in futures] == [{"run": 1, "data": {"n": 1}}] * 50
    assert {one.id for one in submitted} == {submitted[0].id}
    assert handle.remote({"n": 1}).result(10) == {"run": 1, "data": {"n": 1}}
    assert gate.runs == [{"n": 1}]


@pytest.mark.parametrize(
    "change",
    [
        {"body": 2},
        {"query": {"q": 2}},
        {"options": {"http_method": "POST"}},
        {"options": {"method_name": "other"}},
        {"options": {"http_headers": {"content-type": "text/x"}}},
    ],
    ids=str,
)
def test_another_request_under_the_same_key_is_refused(site: Site, connected: Connection, change: Any) -> None:
    site.serve(echo)
    handle = connected.get_handle("ask").options(idempotency_key="k")
    assert handle.remote(1, q=1).result(10) == 1
    other = cast("handles.ServeHandle", handle.options(**change.get("options", {})))
    with pytest.raises(IdempotencyConflict, match="used for another request to endpoint 'ask'"):
        other.remote(change.get("body", 1), **change.get("query", {"q": 1})).result(10)
    assert handle.remote(1, q=1).result(10) == 1


def test_a_key_stays_with_its_backend_when_the_traffic_changes(site: Site, connected: Connection) -> None:
    site.serve(always("blue"), tag="blue")
    site.serve(always("green"), tag="green")
    handle = connected.get_handle("ask").options(idempotency_key="k")
    assert handle.remote().result(10) == "green"
    site.send_traffic("ask", {"blue": 1.0})
    wait_until(lambda: connected.get_handle("ask").remote().result(10) == "blue")
    assert handle.remote().result(10) == "green"
    assert handle.options(idempotency_key="new").remote().result(10) == "blue"


def test_cancelling_the_future_of_a_request_with_a_key_ends_the_wait_alone(
    site: Site, connected: Connection, gate: Gate
) -> None:
    site.serve(gate)
    handle = connected.get_handle("ask").options(idempotency_key="k")
    future = handle.remote("once")
    wait_until(lambda: gate.runs)
    assert future.cancel()
    gate.is_open.set()
    assert handle.remote("once").result(10) == {"run": 1, "data": "once"}


@pytest.mark.parametrize(
    ("key", "error"),
    [(5, TypeError), ("", ConfigError), ("k" * 256, ConfigError), ("é", ConfigError), ("a\nb", ConfigError)],
    ids=repr,
)
def test_what_cannot_be_a_key_is_refused_at_once(connected: Connection, site: Site, key: Any, error: Any) -> None:
    site.declare()
    with pytest.raises(error, match="idempotency"):
        connected.get_handle("ask").options(idempotency_key=key)


def test_a_stream_has_no_key(connected: Connection, site: Site) -> None:
    site.declare()
    with pytest.raises(ConfigError, match="stream=True does not go with an idempotency_key"):
        connected.get_handle("ask").options(idempotency_key="k", stream=True)


# -- asyncio


@pytest.fixture
async def asked(site: Site, connected: Connection, gate: Gate) -> AsyncIterator[handles.AsyncServeHandle]:
    site.serve(gate, max_concurrent_queries=8)
    handle = await asyncio.to_thread(connected.get_handle, "ask")
    yield in_loop(handle)
    await close_here(handle)


async def test_asyncio_code_submits_waits_and_cancels(asked: handles.AsyncServeHandle, gate: Gate) -> None:
    submitted = await asked.submit("x")
    assert (await submitted.status()).status in ("queued", "running")
    with pytest.raises(RequestTimeout):
        await submitted.result(timeout=0.01)
    gate.is_open.set()
    assert await submitted.result(timeout=10) == {"run": 1, "data": "x"}
    assert not await submitted.cancel()
    future = await asked.options(idempotency_key="k").remote("y")
    assert (await future)["data"] == "y"


async def test_a_future_that_is_cancelled_at_once_leaves_no_wait_behind(
    asked: handles.AsyncServeHandle, gate: Gate
) -> None:
    future = await asked.options(idempotency_key="k").remote("y")
    future.cancel()
    with pytest.raises(asyncio.CancelledError):
        await future
    gate.is_open.set()
    assert (await (await asked.options(idempotency_key="k").remote("y")))["run"] == 1


def test_more_requests_than_one_script_takes_are_submitted_and_answered_together(
    site: Site, connected: Connection
) -> None:
    site.serve(echo)
    sync_handle = connected.get_handle("ask")

    async def call_all() -> list[Any]:
        handle = in_loop(sync_handle)
        try:
            calls = [handle.options(idempotency_key=str(n)).remote([n]) for n in range(300)]
            calls += [handle.options(idempotency_key="7").remote([7]) for _ in range(20)]
            return await asyncio.gather(*await asyncio.gather(*calls))
        finally:
            await close_here(sync_handle)

    assert asyncio.run(call_all()) == [[n] for n in range(300)] + [[7]] * 20
    wait_until(lambda: site.depth() == 0)


def test_a_key_that_was_refused_once_holds_its_backend_for_as_long_as_any(site: Site, connected: Connection) -> None:
    """Its choice of a backend is kept for a while only, until the repetition is accepted."""
    choice = KEYS.key_backend(key_digest("ask", b"", "k"))
    site.declare(max_queued_requests=1, result_ttl_s=30)
    handle = connected.get_handle("ask")
    blocking = handle.submit("first")
    with Redis.from_url(site.url) as redis:
        with pytest.raises(Overloaded):
            handle.options(idempotency_key="k").submit("second")
        wait_until(lambda: 0 < redis.ttl(choice) <= 90)
        assert blocking.cancel()
        handle.options(idempotency_key="k").submit("second")
        wait_until(lambda: redis.ttl(choice) > 6 * 24 * 3600)
        site.serve(echo, result_ttl_s=30)
        wait_until(lambda: 0 < redis.ttl(choice) <= 31)


def test_the_status_of_a_quick_request_shows_its_run(site: Site, connected: Connection) -> None:
    """Its start and its end are written together."""
    site.serve(echo)
    submitted = connected.get_handle("ask").submit("text")
    assert submitted.result(timeout=20) == "text"
    status = submitted.status()
    assert (status.status, status.deliveries, status.attempts, status.replica) == ("succeeded", 1, 1, "model#1")
    assert status.started is not None
    assert status.finished is not None
    assert status.created <= status.started <= status.finished
