"""Batches: a bounded window, a result for every item, jobs that outlive their producer."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings, strategies as st
from redis import Redis

from penstock.broker.wire.keys import Keys
from penstock.broker.wire.replies import Reply
from penstock.handles import BatchItem, BatchProducer, BatchResult
from penstock.handles.batch.items import Indices
from penstock.handles.connection import Connection
from penstock.handles.errors import BackendError, ConfigError, EndpointNotFound, RequestTimeout
from tests.handles.site import Site
from tests.support.waiting import wait_until


def double(request: Any) -> Any:
    return 2 * request.data


async def slowly(request: Any) -> Any:
    await asyncio.sleep(request.data / 1000)
    return request.data


def test_every_item_has_its_result(any_site: Site) -> None:
    any_site.serve(double)
    results = list(BatchProducer(any_site.url, "ask").as_completed(range(5_000)))
    assert sorted(result.index for result in results) == list(range(5_000))
    assert all(result.value == 2 * result.index for result in results)
    wait_until(lambda: any_site.depth() == 0)


def test_map_keeps_the_order_of_the_items(site: Site, connected: Connection) -> None:
    site.serve(slowly)
    items = [random.randrange(20) for _ in range(200)]
    assert [result.get() for result in connected.batch("ask").map(items)] == items


def test_as_completed_returns_fast_results_before_slow_ones(site: Site, connected: Connection) -> None:
    site.serve(slowly)
    results = connected.batch("ask").as_completed([300, 0])
    assert [result.index for result in results] == [1, 0]


async def test_asyncio_code_accepts_async_and_plain_iterables(site: Site) -> None:
    site.serve(double)

    async def items() -> AsyncIterator[int]:
        for n in range(500):
            yield n
            if n % 100 == 0:
                await asyncio.sleep(0.001)

    producer = BatchProducer(site.url, "ask")
    assert [result.value async for result in producer.map(items())] == [2 * n for n in range(500)]
    assert [result.value async for result in producer.map(range(500))] == [2 * n for n in range(500)]


def test_sync_code_cannot_iterate_over_an_async_iterable(site: Site, connected: Connection) -> None:
    site.declare()

    async def items() -> AsyncIterator[int]:
        yield 1

    with pytest.raises(TypeError, match="async for"):
        list(connected.batch("ask").map(items()))
    with pytest.raises(TypeError, match="not a int"):
        connected.batch("ask").map(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="skip must hold indices, such as a set does, not be a int"):
        connected.batch("ask").map([1], skip=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_a_batch_of_nothing_has_no_results(site: Site, connected: Connection) -> None:
    site.declare()
    assert list(connected.batch("ask").as_completed([])) == []


def test_a_batch_is_iterated_over_once(site: Site, connected: Connection) -> None:
    site.serve(double)
    batch = connected.batch("ask").map([1])
    assert [result.value for result in batch] == [2]
    with pytest.raises(RuntimeError, match="once"):
        iter(batch)


def test_the_error_of_one_item_is_the_result_of_that_item(site: Site, connected: Connection) -> None:
    def pick(request: Any) -> Any:
        if request.data == "bad":
            raise ValueError("not this one")
        return request.data

    site.serve(pick)
    good, bad, unsendable = connected.batch("ask").map(["good", "bad", object()])
    assert (good.value, good.error) == ("good", None)
    assert isinstance(bad.error, BackendError)
    assert bad.error.message == "not this one"
    assert isinstance(unsendable.error, TypeError)
    with pytest.raises(BackendError):
        bad.get()


def test_an_item_can_have_options_of_its_own(site: Site, connected: Connection) -> None:
    class Model:
        async def __call__(self, request: Any) -> Any:
            if request.data == "wait":
                await asyncio.sleep(60)
            return [request.data, request.query_params.get("k")]

        def other(self, request: Any) -> Any:
            return "other"

    site.serve(Model)
    plain, method, late = connected.batch("ask").map(
        [
            BatchItem("x", query={"k": 7}),
            BatchItem("x", method_name="other"),
            BatchItem("wait", timeout_s=0.2),
        ]
    )
    assert plain.value == ["x", 7]
    assert method.value == "other"
    assert isinstance(late.error, RequestTimeout)


def test_items_with_the_same_shard_key_go_to_the_same_backend(site: Site, connected: Connection) -> None:
    def left(request: Any) -> str:
        return "left"

    def right(request: Any) -> str:
        return "right"

    site.serve(left, tag="left")
    site.serve(right, tag="right")
    site.send_traffic("ask", {"left": 0.5, "right": 0.5})
    items = [BatchItem(n, shard_key=f"user {n % 20}") for n in range(200)]
    backends: dict[str | None, set[Any]] = {}
    for item, result in zip(items, connected.batch("ask").map(items), strict=True):
        backends.setdefault(item.shard_key, set()).add(result.get())
    assert [len(found) for found in backends.values()] == [1] * 20
    assert {found.pop() for found in backends.values()} == {"left", "right"}


def test_at_most_a_window_is_in_flight_and_items_are_read_as_there_is_room(site: Site, connected: Connection) -> None:
    running = most = taken = 0

    async def count(request: Any) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.002)
        running -= 1

    def items() -> Iterator[int]:
        nonlocal taken
        for n in range(200):
            taken += 1
            yield n

    site.serve(count)
    for done, _ in enumerate(connected.batch("ask", window=7).as_completed(items()), start=1):
        assert taken - done <= 7
    assert taken == 200
    assert most <= 7


def test_refused_items_are_sent_again_until_there_is_room(site: Site, connected: Connection) -> None:
    site.serve(slowly, max_queued_requests=10)
    results = list(connected.batch("ask", window=100).map([3] * 300))
    assert [result.value for result in results] == [3] * 300


def test_a_batch_leaves_room_in_the_queue_for_interactive_requests(site: Site, connected: Connection) -> None:
    release = threading.Event()

    def wait(request: Any) -> Any:
        if request.data == "batch":
            release.wait(30)
        return request.data

    site.serve(wait, max_queued_requests=20, max_concurrent_queries=2)
    batch = connected.batch("ask", window=100).as_completed(["batch"] * 100)
    results: list[BatchResult] = []
    collecting = threading.Thread(target=lambda: results.extend(batch))
    collecting.start()
    handle = connected.get_handle("ask")
    wait_until(lambda: site.batch_depth() == 16)
    futures = [handle.remote("web") for _ in range(4)]
    release.set()
    assert [future.result(timeout=20) for future in futures] == ["web"] * 4
    collecting.join(30)
    assert len(results) == 100


def test_leaving_early_cancels_the_items_in_flight(site: Site, connected: Connection) -> None:
    site.serve(slowly, max_concurrent_queries=2)
    for _ in connected.batch("ask", window=50).as_completed([0] + [60_000] * 100):
        break
    wait_until(lambda: site.batch_depth() == 0)


async def test_cancelling_the_task_cancels_the_items_in_flight(site: Site) -> None:
    site.serve(slowly, max_concurrent_queries=2)

    async def collect() -> None:
        async for _ in BatchProducer(site.url, "ask", window=50).as_completed([60_000] * 100):
            pass

    task = asyncio.create_task(collect())
    await asyncio.to_thread(wait_until, lambda: site.batch_depth() == 50)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(wait_until, lambda: site.batch_depth() == 0)


def test_an_exception_of_the_items_is_raised(site: Site, connected: Connection) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    site.serve(double)
    with pytest.raises(OSError, match="the disk is gone"):
        list(connected.batch("ask").as_completed(items()))


async def test_an_exception_of_the_items_is_raised_in_asyncio_code(site: Site) -> None:
    async def items() -> AsyncIterator[int]:
        yield 1
        raise OSError("the disk is gone")

    site.serve(double)
    with pytest.raises(OSError, match="the disk is gone"):
        async for _ in BatchProducer(site.url, "ask").as_completed(items()):
            pass


def test_an_unknown_endpoint_is_refused_before_anything_is_sent(site: Site, connected: Connection) -> None:
    with pytest.raises(EndpointNotFound, match="nowhere"):
        connected.batch("nowhere")
    items = iter(range(3))
    with pytest.raises(EndpointNotFound, match="nowhere"):
        list(BatchProducer(site.url, "nowhere").map(items))
    assert list(items) == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"window": 0}, ConfigError),
        ({"window": "many"}, TypeError),
        ({"window": True}, TypeError),
        ({"timeout_s": -1}, ConfigError),
        ({"method_name": "_private"}, ConfigError),
        ({"job": "no spaces"}, ConfigError),
        ({"job_ttl_s": 0}, ConfigError),
        ({"job_ttl_s": 10**400}, ConfigError),
        ({"job_ttl_s": "long"}, TypeError),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        BatchProducer("redis://nowhere", "ask", **options)


# -- jobs


def test_a_finished_job_gives_its_results_again_and_runs_nothing(site: Site, connected: Connection) -> None:
    ran: list[int] = []

    def record(request: Any) -> Any:
        ran.append(request.data)
        return request.data

    site.serve(record)
    for _ in range(2):
        assert [result.value for result in connected.batch("ask", job="once").map(range(300))] == list(range(300))
    assert sorted(ran) == list(range(300))


def test_another_producer_continues_a_job(site: Site, connected: Connection) -> None:
    ran: list[int] = []

    async def record(request: Any) -> Any:
        ran.append(request.data)
        await asyncio.sleep(0.01)
        return request.data

    site.serve(record, max_concurrent_queries=2)
    for _ in connected.batch("ask", job="left", window=20).as_completed(range(30)):
        break
    wait_until(lambda: len(ran) >= 20)
    results = list(connected.batch("ask", job="left", window=20).map(range(30)))
    assert [result.value for result in results] == list(range(30))
    assert sorted(ran) == list(range(30))


def test_a_job_accepts_items_before_any_replica_runs(site: Site, connected: Connection) -> None:
    site.declare()
    producer = connected.batch("ask", job="early", window=10)

    async def collect() -> None:
        async for _ in producer.as_completed(range(10)):
            pass

    async def begin() -> None:
        task = asyncio.create_task(collect())
        await asyncio.to_thread(wait_until, lambda: site.batch_depth() == 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(begin())
    assert site.batch_depth() == 10
    site.serve(double)
    assert [result.value for result in producer.map(range(10))] == [2 * n for n in range(10)]


def test_a_job_has_one_producer_at_a_time(site: Site, connected: Connection) -> None:
    site.serve(double)
    first = iter(connected.batch("ask", job="mine").as_completed(range(10)))
    next(first)
    with pytest.raises(ConfigError, match="another producer works on the job 'mine'"):
        list(connected.batch("ask", job="mine").map(range(10)))
    assert len(list(first)) == 9
    assert len(list(connected.batch("ask", job="mine").map(range(10)))) == 10


def test_a_job_belongs_to_its_endpoint(site: Site, connected: Connection) -> None:
    site.serve(double)
    site.serve(double, "other", tag="other")
    list(connected.batch("ask", job="one").map([1]))
    with pytest.raises(ConfigError, match="'ask'"):
        list(connected.batch("other", job="one").map([1]))


def test_a_job_of_an_earlier_version_with_guessable_ids_sends_its_items_again(
    site: Site, connected: Connection
) -> None:
    site.serve(double)
    keys, caller = Keys("default"), Keys.job_name("old")
    with Redis.from_url(site.url) as redis:
        redis.set(keys.job(caller), '{"endpoint": "ask", "kept": 1}')
        for n in range(3):
            redis.execute_command("XADD", keys.replies(caller), "*", *Reply(f"{caller}-{n}", codec="none").fields())
        assert [result.value for result in connected.batch("ask", job="old").map(range(3))] == [0, 2, 4]
        record = json.loads(cast(bytes, redis.get(keys.job(caller))))
    assert re.fullmatch("[0-9a-f]{64}", record.pop("secret"))
    assert record == {"endpoint": "ask", "kept": 1}
    # From here on it is an ordinary job.
    assert [result.value for result in connected.batch("ask", job="old").map(range(3))] == [0, 2, 4]


def test_results_before_a_checkpoint_are_deleted_and_skipped(site: Site, connected: Connection) -> None:
    ran: list[int] = []

    def record(request: Any) -> Any:
        ran.append(request.data)

    site.serve(record)
    done = Indices()
    batch = connected.batch("ask", job="safe").as_completed(range(500))
    for result in batch:
        done.add(result.index)
    assert len(done) == 500
    batch = connected.batch("ask", job="safe2").as_completed(range(500))
    for count, result in enumerate(batch, start=1):
        done.add(result.index)
        if count == 250:
            batch.checkpoint()
    assert list(connected.batch("ask", job="safe2").map(range(500), skip=done)) == []


def test_the_next_producer_of_a_job_gets_its_large_results(site: Site, connected: Connection) -> None:
    ran: list[int] = []

    def large(request: Any) -> bytes:
        ran.append(request.data)
        return bytes(300_000)

    site.serve(large)
    for _ in range(2):
        assert [len(result.get()) for result in connected.batch("ask", job="large").map(range(5))] == [300_000] * 5
    assert sorted(ran) == list(range(5))


PRODUCER = """
import sys
from penstock import handles

url, items, output = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with handles.connect(url) as connected, open(output, "a") as file:
    print("ready", flush=True)
    for result in connected.batch("ask", job="killed", window=300).as_completed(range(items)):
        print(result.index, result.get(), file=file, flush=True)
"""


def test_a_job_whose_producer_is_killed_again_and_again_has_every_result(site: Site, tmp_path: Path) -> None:
    """Each producer but the last is killed. The last one returns every result once."""
    items = 6_000
    ran: list[int] = []

    async def record(request: Any) -> Any:
        ran.append(request.data)
        return 2 * request.data

    site.serve(record)
    for attempt in range(4):
        with _producer(site.url, items, tmp_path / f"output{attempt}") as process:
            time.sleep(random.uniform(0.0, 0.4))  # a random moment, on purpose
            process.kill()
    with _producer(site.url, items, tmp_path / "output") as process:
        assert process.wait(60) == 0
    lines = (tmp_path / "output").read_text().splitlines()
    assert sorted(map(_pair, lines)) == [(n, 2 * n) for n in range(items)]
    # Accepted items are not sent again, except those whose replica wrote the reply and had not settled the entry.
    assert len(ran) < items + 50


def _pair(line: str) -> tuple[int, int]:
    index, value = line.split()
    return int(index), int(value)


def _producer(url: str, items: int, output: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PRODUCER, url, str(items), str(output)],
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@settings(deadline=None)
@given(st.lists(st.integers(0, 2_000)))
def test_a_set_of_indices_is_a_set(indices: list[int]) -> None:
    bits, plain = Indices(), set[int]()
    for index in indices:
        bits.add(index)
        plain.add(index)
    assert len(bits) == len(plain)
    assert all((index in bits) == (index in plain) for index in range(2_010))
    assert -1 not in bits
