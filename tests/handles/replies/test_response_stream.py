import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from typing import Any

import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from starlette.responses import StreamingResponse

from penstock.broker.queue.flow_control import WINDOW
from penstock.handles.async_handle import AsyncServeHandle
from penstock.handles.calls.shared_client import SharedClient
from penstock.handles.connection import Connection
from penstock.handles.errors import BackendError, ConfigError, RequestCancelled, RequestTimeout, StreamBroken
from penstock.handles.replies.response_stream import AsyncResponseStream
from penstock.workers.executing.accept_batch import accept_batch
from tests.handles.site import INSTANCE, Site
from tests.support.waiting import wait_until, wait_until_async


def count(request: Any) -> Iterator[int]:
    yield from range(request.data)


async def count_async(request: Any) -> AsyncIterator[int]:
    for n in range(request.data):
        yield n


async def count_on_a_thread(request: Any) -> Any:
    return (n for n in range(request.data))


def count_on_the_loop(request: Any) -> Any:
    return count_async(request)


def streaming(connected: Connection, **options: Any) -> Any:
    return connected.get_handle("ask").options(stream=True, **options)


STOPS_S = 10.0
"""Seconds within which a generator is closed after its reader. A silent reader is noticed after twice as long."""

KINDS = [count, count_async, count_on_a_thread, count_on_the_loop]


async def call_async(site: Site, value: Any = None, **options: Any) -> AsyncResponseStream:
    handle = AsyncServeHandle(site.url, INSTANCE, "ask").options(stream=True, **options)
    stream: Any = await handle.remote(value)
    assert isinstance(stream, AsyncResponseStream)
    return stream


@pytest.mark.parametrize("function", KINDS)
def test_a_sync_handle_iterates_over_the_values_of_a_generator(
    site: Site, connected: Connection, function: Any
) -> None:
    site.serve(function)
    ask = streaming(connected)
    for many in (0, 1, 7, 10_000):
        assert list(ask.remote(many)) == list(range(many))
    wait_until(lambda: site.depth() == 0)
    wait_until(lambda: site.keys_left() == set())


@pytest.mark.parametrize("function", KINDS)
async def test_an_asyncio_handle_iterates_over_the_values_of_a_generator(site: Site, function: Any) -> None:
    site.serve(function)
    for many in (0, 1, 7, 10_000):
        assert [n async for n in await call_async(site, many)] == list(range(many))


def test_values_of_any_size_arrive_unchanged(site: Site, connected: Connection) -> None:
    large = 3 * WINDOW + 1
    values = ["", "ä" * large, b"", b"x" * large, None, {"a": [1, None]}, ["y" * large], "end"]

    def give(request: Any) -> Iterator[Any]:
        yield from values

    site.serve(give)
    assert list(streaming(connected).remote()) == values


def test_python_values_arrive_where_pickle_is_allowed(site: Site, connected: Connection) -> None:
    def give(request: Any) -> Iterator[Any]:
        yield {1, 2}

    site.serve(give, allow_pickle=True)
    assert list(streaming(connected).remote()) == [{1, 2}]


def test_a_value_arrives_before_the_next_one_is_yielded(site: Site, connected: Connection) -> None:
    taken = threading.Event()

    def give(request: Any) -> Iterator[str]:
        yield "first"
        assert taken.wait(10)
        yield "second"

    site.serve(give)
    stream = streaming(connected).remote()
    assert next(stream) == "first"
    taken.set()
    assert list(stream) == ["second"]


@pytest.mark.parametrize("on_loop", [False, True])
def test_a_slow_reader_slows_the_backend_and_does_not_fill_the_broker(
    site: Site, connected: Connection, redis_url: str, on_loop: bool
) -> None:
    size, many = 16 * 1024, 640
    made: list[int] = []

    def give(request: Any) -> Iterator[bytes]:
        for n in range(many):
            made.append(n)
            yield b"%06d" % n + bytes(size - 6)

    async def give_async(request: Any) -> AsyncIterator[bytes]:
        for value in give(request):
            yield value

    site.serve(give_async if on_loop else give)
    stream = streaming(connected).remote()
    assert next(stream)[:6] == b"000000"
    # In flight: a window at the reader, another one on the broker, and the value that waits.
    most = 2 * (WINDOW // size + 2)
    wait_until(lambda: len(made) >= WINDOW // size)
    with closing(Redis.from_url(redis_url)) as redis:

        def on_broker() -> int:
            keys: Any = redis.keys("penstock:*:replies")
            return sum(int(redis.memory_usage(key, samples=0) or 0) for key in keys)

        for _ in range(30):  # for more than a second the backend does not continue
            threading.Event().wait(0.05)
            assert on_broker() < 2 * WINDOW
    assert len(made) <= most
    assert [int(value[:6]) for value in stream] == list(range(1, many))


async def test_a_reader_that_stops_stops_the_generator(site: Site) -> None:
    ended: list[str] = []
    yielded = threading.Event()

    async def endless(request: Any) -> AsyncIterator[int]:
        try:
            while True:
                yield 1
                yielded.set()
                await asyncio.sleep(0.001)
        finally:
            ended.append("async")

    site.serve(endless)
    async with await call_async(site) as stream:
        assert await stream.__anext__() == 1
    await wait_until_async(lambda: ended == ["async"], STOPS_S)
    assert [value async for value in stream] == []
    await wait_until_async(lambda: site.depth() == 0)


@pytest.mark.parametrize("how", ["close", "with", "drop"])
def test_a_generator_on_a_thread_is_closed_too(site: Site, connected: Connection, how: str) -> None:
    ended = threading.Event()

    def endless(request: Any) -> Iterator[bytes]:
        try:
            while True:
                yield b"x" * 1000
        finally:
            ended.set()

    worker = site.serve(endless)
    stream = streaming(connected).remote()
    assert next(stream) == b"x" * 1000
    if how == "close":
        stream.close()
    elif how == "with":
        with stream:
            pass
    else:
        del stream
        gc.collect()
    assert ended.wait(STOPS_S)
    wait_until(lambda: worker.in_progress == 0)
    wait_until(lambda: site.depth() == 0)
    wait_until(lambda: site.keys_left() == set())


async def test_a_reader_that_was_cancelled_can_read_on(site: Site) -> None:
    go_on = asyncio.Event()
    loop = asyncio.get_running_loop()
    waits = threading.Event()

    def give(request: Any) -> Iterator[int]:
        waits.set()
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(10)
        yield 1

    site.serve(give)
    stream = await call_async(site)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(stream.__anext__(), 0.05)
    go_on.set()
    assert [value async for value in stream] == [1]


def test_an_error_is_raised_after_the_values_before_it(site: Site, connected: Connection) -> None:
    def give(request: Any) -> Iterator[int]:
        yield from range(request.data)
        raise LookupError("no more")

    site.serve(give)
    ask = streaming(connected)
    for many in (0, 1, 3000):
        stream = ask.remote(many)
        assert [next(stream) for _ in range(many)] == list(range(many))
        with pytest.raises(BackendError, match="LookupError: no more"):
            next(stream)
        assert list(stream) == []


def test_a_value_that_cannot_be_encoded_ends_the_stream_with_an_error(site: Site, connected: Connection) -> None:
    def give(request: Any) -> Iterator[Any]:
        yield 1
        yield {1, 2}

    site.serve(give)
    stream = streaming(connected).remote()
    assert next(stream) == 1
    with pytest.raises(BackendError, match="allow_pickle"):
        next(stream)


def test_a_reply_that_is_not_streamed_is_a_stream_of_one_value(site: Site, connected: Connection) -> None:
    def whole(request: Any) -> Any:
        return {"whole": request.data}

    site.serve(whole)
    assert list(streaming(connected).remote(1)) == [{"whole": 1}]


def test_a_streaming_response_arrives_as_bytes(site: Site, connected: Connection) -> None:
    def give(request: Any) -> StreamingResponse:
        return StreamingResponse(iter(["ab", "cd"]), 201)

    site.serve(give)
    assert b"".join(streaming(connected).remote()) == b"abcd"
    assert connected.get_handle("ask").remote().result(5).body == b"abcd"


def test_without_the_option_a_generator_is_refused_and_the_error_names_the_option(
    site: Site, connected: Connection
) -> None:
    site.serve(count)
    with pytest.raises(BackendError, match=r"options\(stream=True\)"):
        connected.get_handle("ask").remote(3).result(5)


def test_code_that_takes_batches_cannot_stream(site: Site, connected: Connection) -> None:
    @accept_batch
    def each(requests: list[Any]) -> list[Any]:
        return [count(request) for request in requests]

    site.serve(each, max_batch_size=4)
    with pytest.raises(BackendError, match="a method that takes batches cannot stream"):
        list(streaming(connected).remote(3))


def test_the_deadline_holds_for_the_first_value_only(site: Site, connected: Connection) -> None:
    passed, ended = threading.Event(), threading.Event()

    def give(request: Any) -> Iterator[int]:
        if request.data == "late":
            ended.wait(20)
        yield 1
        passed.wait(20)
        yield 2

    site.serve(give)
    deadline_s = 2.0  # time for the first value on a busy machine
    ask = streaming(connected, timeout_s=deadline_s)
    stream = ask.remote("soon")
    assert next(stream) == 1
    time.sleep(deadline_s)
    passed.set()
    assert list(stream) == [2]
    with pytest.raises(RequestTimeout):
        list(ask.remote("late"))
    ended.set()


def test_a_stream_is_in_progress_until_it_ends(site: Site, connected: Connection) -> None:
    at_once: list[int] = []
    running: list[int] = []

    def give(request: Any) -> Iterator[int]:
        running.append(request.data)
        for _ in range(20):
            at_once.append(len(running))
            yield request.data
            threading.Event().wait(0.001)
        running.remove(request.data)

    site.serve(give, max_concurrent_queries=2)
    ask = streaming(connected)
    streams = [ask.remote(n) for n in range(6)]
    assert [list(stream) for stream in streams] == [[n] * 20 for n in range(6)]
    assert max(at_once) == 2


def test_a_drained_replica_finishes_its_streams_or_breaks_them_off(site: Site, connected: Connection) -> None:
    go_on = threading.Event()

    def give(request: Any) -> Iterator[int]:
        yield 1
        if not go_on.wait(10):
            return
        yield 2

    worker = site.serve(give)
    stream = streaming(connected).remote()
    assert next(stream) == 1
    assert not asyncio.run_coroutine_threadsafe(worker.drain(0.1), worker_loop(site)).result(5)
    go_on.set()
    assert list(stream) == [2]

    worker = site.serve(give)
    go_on.clear()
    stream = streaming(connected).remote()
    assert next(stream) == 1
    asyncio.run_coroutine_threadsafe(worker.stop(), worker_loop(site)).result(5)
    with pytest.raises(StreamBroken, match="its replica was stopped"):
        next(stream)
    assert site.depth() == 0
    go_on.set()


def worker_loop(site: Site) -> asyncio.AbstractEventLoop:
    return site._loop  # pyright: ignore[reportPrivateUsage]


async def test_closing_the_client_ends_its_streams_with_an_error(site: Site) -> None:
    site.serve(count_async)
    stream = await call_async(site, 10**9)
    assert await stream.__anext__() == 0
    await close_caller(site)
    with pytest.raises(RequestCancelled):
        async for _ in stream:
            pass
    await wait_until_async(lambda: site.depth() == 0)


async def test_no_value_is_lost_when_connections_are_cut(site: Site) -> None:
    async def slowly(request: Any) -> AsyncIterator[int]:
        for n in range(request.data):
            yield n
            await asyncio.sleep(0.001)

    site.serve(slowly)
    got: list[int] = []
    async with AsyncRedis.from_url(site.url) as redis:
        async for n in await call_async(site, 600):
            got.append(n)
            if n in (100, 300):
                for client in await redis.client_list():
                    if client["name"].startswith(("penstock-caller", "penstock-replies", "penstock-signals")):
                        await redis.client_kill_filter(_id=client["id"])
    assert got == list(range(600))
    await close_caller(site)


async def close_caller(site: Site) -> None:
    caller = SharedClient.find(site.url, INSTANCE)
    assert caller is not None
    await caller.close()


def test_wrong_values_of_the_option_are_refused(connected: Connection) -> None:
    handle = connected.get_handle("ask", missing_ok=True)
    with pytest.raises(TypeError, match="stream must be a bool, not str"):
        handle.options(stream="yes")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    with pytest.raises(ConfigError, match="return_type='object_ref'"):
        handle.options(stream=True, return_type="object_ref")
