"""Both faces of a handle, with a real worker behind them."""

import asyncio
import concurrent.futures
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest
from redis import Redis
from starlette.responses import JSONResponse

from penstock import handles
from penstock.broker.embedded import EmbeddedServer
from penstock.broker.wire import LARGE
from penstock.handles import AsyncServeHandle, ServeHandle
from penstock.handles.caller import Caller
from penstock.handles.connection import Connected
from penstock.handles.errors import (
    BackendError,
    BackendNotFound,
    BrokerUnavailable,
    ConfigError,
    EndpointNotFound,
    Overloaded,
    PayloadTooLarge,
    RequestCancelled,
    RequestTimeout,
)
from penstock.handles.results import Response
from tests.handles.site import INSTANCE, Site
from tests.waiting import wait_until, wait_until_async


def echo(request: Any) -> Any:
    return request.data


def describe(request: Any) -> dict[str, Any]:
    return {
        "data": request.data,
        "query": dict(request.query_params),
        "method": request.method,
        "x": request.headers.get("x-test"),
    }


def fail(request: Any) -> None:
    raise ValueError("on purpose")


def answering(value: object) -> Callable[[Any], object]:
    def answer(request: Any) -> object:
        return value

    return answer


def noting(started: list[Any]) -> Callable[[Any], None]:
    def note(request: Any) -> None:
        started.append(request.data)

    return note


class Counter:
    """A backend with more than one method."""

    def __call__(self, request: Any) -> str:
        return "called"

    def count(self, request: Any) -> int:
        return len(request.data)


def refused_everywhere(connected: Connected, error: type[Exception]) -> None:
    """Check that a call of both faces fails the same way."""
    handle = ServeHandle(connected.redis_url, INSTANCE, "ask")
    with pytest.raises(error):
        handle.remote().result(10)

    async def ask() -> None:
        with pytest.raises(error):
            await (await in_loop(handle).remote())
        await close_here(handle)

    asyncio.run(ask())


def in_loop(handle: ServeHandle) -> AsyncServeHandle:
    """Return the other face of a handle."""
    _, arguments = handle.__reduce__()
    return AsyncServeHandle(*arguments)


async def close_here(handle: ServeHandle) -> None:
    _, (url, instance, *_) = handle.__reduce__()
    caller = Caller.shared(url, instance)
    if caller is not None:
        await caller.close()


# -- the happy path, on every kind of broker


def test_a_sync_handle_is_answered(any_site: Site) -> None:
    any_site.serve(echo)
    with handles.connect(any_site.url) as connected:
        handle = connected.get_handle("ask")
        assert handle.remote({"any": "json"}).result(10) == {"any": "json"}
        assert [future.result(10) for future in [handle.remote(n) for n in range(200)]] == list(range(200))
    wait_until(lambda: any_site.depth() == 0)


async def test_an_asyncio_handle_is_answered(any_site: Site) -> None:
    await asyncio.to_thread(any_site.serve, echo)
    handle = AsyncServeHandle(any_site.url, INSTANCE, "ask")
    future = await handle.remote({"any": "json"})
    assert await future == {"any": "json"}
    futures = await asyncio.gather(*[handle.remote(n) for n in range(200)])
    assert await asyncio.gather(*futures) == list(range(200))
    await (await Caller.get(any_site.url, INSTANCE)).close()


async def test_what_remote_returned_for_is_on_its_stream(site: Site) -> None:
    site.declare()
    handle = AsyncServeHandle(site.url, INSTANCE, "ask")
    futures = [await handle.remote(n) for n in range(5)]
    assert site.depth() == 5
    assert not any(future.done() for future in futures)
    await asyncio.to_thread(site.serve, echo)
    assert await asyncio.gather(*futures) == list(range(5))
    await (await Caller.get(site.url, INSTANCE)).close()


# -- what is sent and what comes back


@pytest.mark.parametrize(
    "value", [None, "tëxt", b"\x00\xff", {"a": [1, 2.5, None]}, 0, "", [], bytes(LARGE + 1)], ids=repr
)
def test_values_arrive_as_they_were(site: Site, connected: Connected, value: Any) -> None:
    site.serve(echo)
    answer = connected.get_handle("ask").remote(value).result(10)
    assert (type(answer), answer) == (type(value), value)
    wait_until(lambda: site.depth() == 0 and not site.keys_left())


def test_a_request_says_all_that_the_handle_was_told(site: Site, connected: Connected) -> None:
    site.serve(describe)
    handle = connected.get_handle("ask").options(http_method="put", http_headers={"X-Test": "yes"})
    assert handle.remote([1], q=1, deep={"list": [1, None]}, self="me").result(10) == {
        "data": [1],
        "query": {"q": 1, "deep": {"list": [1, None]}, "self": "me"},
        "method": "PUT",
        "x": "yes",
    }


def test_arguments_are_read_when_the_call_is_made(site: Site, connected: Connected) -> None:
    site.serve(describe)
    handle = connected.get_handle("ask")
    body, query = ["before"], ["before"]
    future = handle.remote(body, q=query)
    body.append("after")
    query.append("after")
    answer = future.result(10)
    assert (answer["data"], answer["query"]["q"]) == (["before"], ["before"])


def test_a_method_of_the_backend_can_be_chosen(site: Site, connected: Connected) -> None:
    site.serve(Counter)
    handle = connected.get_handle("ask")
    assert handle.remote(b"123").result(10) == "called"
    assert handle.options(method_name="count").remote(b"123").result(10) == 3
    with pytest.raises(ConfigError, match="private"):
        handle.options(method_name="__init__")


def test_a_shard_key_always_finds_the_same_backend(site: Site, connected: Connected) -> None:
    for tag in ("one", "two"):
        site.serve(answering(tag), tag=tag)
    site.send_traffic("ask", {"one": 0.5, "two": 0.5})
    handle = connected.get_handle("ask")
    wait_until(lambda: {handle.remote().result(10) for _ in range(8)} == {"one", "two"})
    for key in ("a", "b", "c"):
        assert len({handle.options(shard_key=key).remote().result(10) for _ in range(10)}) == 1


def test_a_whole_response_arrives_as_one(site: Site, connected: Connected) -> None:
    site.serve(answering(JSONResponse({"a": 1}, 201, {"X-More": "yes"})))
    response = connected.get_handle("ask").remote().result(10)
    assert isinstance(response, Response)
    assert (response.status_code, response.json(), response.headers["x-more"]) == (201, {"a": 1}, "yes")


def test_python_values_travel_only_where_the_backend_takes_them(site: Site, connected: Connected) -> None:
    site.serve(echo, allow_pickle=True)
    assert connected.get_handle("ask").remote({1, 2, 3}).result(10) == {1, 2, 3}
    site.declare("strict", tag="strict")
    with pytest.raises(TypeError, match=r"a set cannot be sent.*backend 'strict' would take it pickled"):
        connected.get_handle("strict").remote({1, 2}).result(10)


def test_what_cannot_be_sent_is_refused_on_the_spot(site: Site, connected: Connected) -> None:
    site.declare()
    handle = connected.get_handle("ask")
    with pytest.raises(TypeError, match="the keyword arguments must be JSON values"):
        handle.remote(q={1, 2})
    with pytest.raises(TypeError, match="one positional argument"):
        handle.remote(1, 2)


@pytest.fixture
def small_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Redis takes as one value, for those who would otherwise have to make half a gigabyte."""
    monkeypatch.setattr("penstock.handles.bodies.LARGEST", 1000)


@pytest.mark.usefixtures("small_redis")
def test_a_body_that_redis_would_not_take_is_refused_by_name(site: Site, connected: Connected) -> None:
    """Sent, it would cut the connection, and all others who share it."""
    site.serve(echo)
    ask, said = connected.get_handle("ask"), r"1001 bytes or more \(proto-max-bulk-len of Redis is 1000\)"
    beside = ask.remote(bytes(1000))
    with pytest.raises(PayloadTooLarge, match=said):
        ask.remote(bytes(1001)).result(timeout=10)
    with pytest.raises(PayloadTooLarge, match=said):
        next(iter(cast(Any, ask.options(stream=True).remote(bytes(1001)))))
    (small, large) = connected.batch("ask").map([b"1", bytes(1001)])
    assert small.get() == b"1"
    with pytest.raises(PayloadTooLarge, match=said):
        large.get()
    assert beside.result(timeout=10) == bytes(1000)
    wait_until(lambda: site.depth() == 0)


@pytest.mark.usefixtures("small_redis")
async def test_an_asyncio_handle_refuses_it_before_anything_is_sent(site: Site) -> None:
    site.declare()
    with pytest.raises(PayloadTooLarge, match="1001 bytes or more"):
        await AsyncServeHandle(site.url, INSTANCE, "ask").remote(bytes(1001))
    assert site.depth() == 0


@pytest.mark.usefixtures("small_redis")
def test_an_answer_that_redis_would_not_take_is_an_error_of_the_backend(site: Site, connected: Connected) -> None:
    site.serve(answering(bytes(1001)))
    with pytest.raises(BackendError, match="PayloadTooLarge: the body has 1001 bytes or more"):
        connected.get_handle("ask").remote().result(timeout=10)


def test_what_the_users_code_raised_is_told(site: Site, connected: Connected) -> None:
    site.serve(fail)
    with pytest.raises(BackendError, match="ValueError: on purpose") as caught:
        connected.get_handle("ask").remote().result(10)
    assert (caught.value.type_name, caught.value.message) == ("ValueError", "on purpose")


# -- refusals


def test_an_endpoint_that_is_not_there_is_named(site: Site, connected: Connected) -> None:
    site.declare("other")
    with pytest.raises(EndpointNotFound, match="no endpoint 'ask'; there is 'other'"):
        connected.get_handle("ask")
    refused_everywhere(connected, EndpointNotFound)


def test_an_endpoint_whose_backend_is_gone_is_refused(site: Site, connected: Connected) -> None:
    site.send_traffic("ask", {"gone": 1.0})
    refused_everywhere(connected, BackendNotFound)


def test_a_full_queue_is_told_through_the_future(site: Site, connected: Connected) -> None:
    site.declare(max_queued_requests=0)
    refused_everywhere(connected, Overloaded)


def test_a_broker_that_is_not_there_is_told_and_its_password_is_not() -> None:
    with pytest.raises(BrokerUnavailable) as caught:
        handles.connect("redis://:geheim@127.0.0.1:1")
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("timeout_s", [0.2, 1.0])
def test_a_deadline_holds_while_connecting(timeout_s: float) -> None:
    handle = ServeHandle("redis://127.0.0.1:1", INSTANCE, "ask").options(timeout_s=timeout_s)
    started_at = time.monotonic()
    with pytest.raises(RequestTimeout):
        handle.remote().result(10)
    assert timeout_s - 0.05 < time.monotonic() - started_at < timeout_s + 1.5


def test_a_request_without_any_replica_times_out_on_time(site: Site, connected: Connected) -> None:
    site.declare()
    handle = connected.get_handle("ask").options(timeout_s=0.3)
    started_at = time.monotonic()
    with pytest.raises(RequestTimeout, match="did not answer within"):
        handle.remote().result(10)
    assert 0.29 < time.monotonic() - started_at < 1.5
    wait_until(lambda: site.depth() == 0)


def test_a_url_or_a_name_that_cannot_be_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="http://x"):
        handles.connect("http://x")
    with pytest.raises(ConfigError, match="an instance 'a b'"):
        handles.connect("redis://127.0.0.1:1", "a b")
    with pytest.raises(ConfigError, match="an endpoint"):
        ServeHandle("redis://127.0.0.1:1", INSTANCE, "a b")


# -- an endpoint that may come later


def test_a_handle_may_wait_for_its_endpoint(site: Site, connected: Connected) -> None:
    future = connected.get_handle("ask", missing_ok=True).remote("early")
    site.serve(echo)
    assert future.result(10) == "early"


def test_a_handle_waits_for_its_endpoint_until_its_deadline(site: Site, connected: Connected) -> None:
    handle = connected.get_handle("ask", missing_ok=True).options(timeout_s=0.2)
    started_at = time.monotonic()
    with pytest.raises(EndpointNotFound):
        handle.remote().result(10)
    assert 0.19 < time.monotonic() - started_at < 1.5


def test_waiting_for_an_endpoint_can_be_cancelled(site: Site, connected: Connected) -> None:
    future = connected.get_handle("ask", missing_ok=True).remote("never")
    assert future.cancel()
    assert concurrent.futures.wait([future], timeout=5).not_done == set()
    site.serve(echo)
    assert site.depth() == 0


# -- cancelling


def test_cancelling_a_queued_request_means_that_it_never_starts(site: Site, connected: Connected) -> None:
    started: list[Any] = []
    site.declare()
    handle = connected.get_handle("ask")
    cancelled, kept = handle.remote("cancelled"), handle.remote("kept")
    wait_until(lambda: site.depth() == 2)
    assert cancelled.cancel()
    assert concurrent.futures.wait([cancelled], timeout=5).not_done == set(), "who waits for it is told"
    wait_until(lambda: site.depth() == 1)
    site.serve(noting(started))
    kept.result(10)
    assert started == ["kept"]


def test_cancelling_at_once_means_that_it_never_starts(site: Site, connected: Connected) -> None:
    """Before the background loop has heard of it, while it connects, and just after: it is one of these."""
    started: list[Any] = []
    site.serve(noting(started))
    handle = connected.get_handle("ask")
    cancelled: list[concurrent.futures.Future[Any]] = []
    for n in range(300):
        future = handle.remote(n)
        if n % 3 == 0:
            time.sleep(0.0001 * (n % 7))
        if future.cancel():
            cancelled.append(future)
    assert concurrent.futures.wait(cancelled, timeout=10).not_done == set()
    assert handle.remote("last").result(10) is None
    wait_until(lambda: site.depth() == 0)


def test_cancelling_a_running_request_frees_its_place(site: Site, connected: Connected) -> None:
    running = threading.Event()

    async def linger(request: Any) -> Any:
        if request.data == "linger":
            running.set()
            await asyncio.sleep(60)
        return request.data

    site.serve(linger, max_concurrent_queries=1)
    handle = connected.get_handle("ask")
    future = handle.remote("linger")
    wait_until(running.is_set)
    assert future.cancel()
    assert handle.remote("next").result(10) == "next"


def test_an_answer_that_came_first_cannot_be_cancelled(site: Site, connected: Connected) -> None:
    site.serve(echo)
    future = connected.get_handle("ask").remote("x")
    assert future.result(10) == "x"
    assert not future.cancel()


async def test_cancelling_an_asyncio_future_cancels_its_request(site: Site) -> None:
    running, cancelled = threading.Event(), threading.Event()

    async def linger(request: Any) -> None:
        running.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    await asyncio.to_thread(site.serve, linger)
    handle = AsyncServeHandle(site.url, INSTANCE, "ask")
    future = await handle.remote()
    await wait_until_async(running.is_set)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(future, 0.01)
    await wait_until_async(cancelled.is_set)
    await wait_until_async(lambda: site.depth() == 0)
    await (await Caller.get(site.url, INSTANCE)).close()


async def test_cancelling_remote_takes_the_request_back(site: Site) -> None:
    site.declare()
    handle = AsyncServeHandle(site.url, INSTANCE, "ask")
    await Caller.get(site.url, INSTANCE)
    sending = asyncio.ensure_future(handle.remote())
    await asyncio.sleep(0)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    caller = await Caller.get(site.url, INSTANCE)
    await caller.registry.snapshot()
    await wait_until_async(lambda: site.depth() == 0)
    await caller.close()


# -- threads, processes, loops


def test_many_threads_share_one_handle(site: Site, connected: Connected) -> None:
    site.serve(echo)
    handle = connected.get_handle("ask")

    def ask(thread: int) -> bool:
        return all(handle.remote([thread, n]).result(20) == [thread, n] for n in range(50))

    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        assert all(threads.map(ask, range(16)))


def test_callbacks_of_a_future_may_call_again(site: Site, connected: Connected) -> None:
    site.serve(echo)
    handle = connected.get_handle("ask")
    second: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def again(first: "concurrent.futures.Future[Any]") -> None:
        handle.remote(first.result() + 1).add_done_callback(lambda future: second.set_result(future.result()))

    handle.remote(1).add_done_callback(again)
    assert second.result(10) == 2


def test_a_handle_can_be_pickled_with_its_options(site: Site, connected: Connected) -> None:
    site.serve(describe)
    handle = connected.get_handle("ask").options(http_headers={"x-test": "kept"})
    assert pickle.loads(pickle.dumps(handle)).remote().result(10)["x"] == "kept"
    assert "redis" not in repr(handle), "it may hold a password"


def test_a_pickled_handle_works_in_a_process_that_knows_only_redis(site: Site, connected: Connected) -> None:
    site.serve(echo)
    script = """
        import pickle, sys
        handle = pickle.load(sys.stdin.buffer)
        print(handle.remote("from afar").result(20))
        print([name for name in ("ray", "starlette", "uvicorn", "pydantic") if name in sys.modules])
    """
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        input=pickle.dumps(connected.get_handle("ask")),
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert (ran.returncode, ran.stdout.decode().split("\n"), ran.stderr) == (0, ["from afar", "[]", ""], b"")


def test_a_forked_child_and_its_parent_do_not_disturb_each_other(site: Site, connected: Connected) -> None:
    site.serve(echo)
    handle = connected.get_handle("ask")
    assert handle.remote("parent").result(10) == "parent"

    def in_child(to_parent: Any) -> None:
        to_parent.send([handle.remote(f"child {n}").result(10) for n in range(3)])

    here, there = multiprocessing.get_context("fork").Pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads, which is the point
        child = multiprocessing.get_context("fork").Process(target=in_child, args=(there,))
        child.start()
    assert handle.remote("meanwhile").result(10) == "meanwhile"
    assert here.poll(20)
    assert here.recv() == ["child 0", "child 1", "child 2"]
    child.join(10)
    assert child.exitcode == 0
    assert [handle.remote(n).result(10) for n in range(20)] == list(range(20))
    here.close()
    there.close()


def test_one_handle_serves_in_any_loop_after_another(site: Site) -> None:
    site.serve(echo)
    handle = AsyncServeHandle(site.url, INSTANCE, "ask")

    async def ask(value: int) -> Any:
        return await (await handle.remote(value))

    assert [asyncio.run(ask(n)) for n in range(3)] == [0, 1, 2]


# -- beginning and end


def test_a_sync_handle_warns_in_a_running_loop(site: Site, connected: Connected) -> None:
    site.declare()

    async def ask() -> None:
        with pytest.warns(UserWarning, match=r"a sync handle .* would block; get_handle\(..., sync=False\)") as caught:
            connected.get_handle("ask")
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            connected.get_handle("ask", sync=False)

    asyncio.run(ask())


def test_an_asyncio_handle_warns_where_no_loop_runs(site: Site, connected: Connected) -> None:
    site.declare()
    with pytest.warns(UserWarning, match="an asyncio handle .* cannot be awaited here") as caught:
        connected.get_handle("ask", sync=False)
    assert caught[0].filename == __file__


def test_closing_tells_what_is_in_flight_and_the_next_call_connects_anew(site: Site) -> None:
    site.declare()
    connected = handles.connect(site.url)
    handle = connected.get_handle("ask")
    future = handle.remote("left")
    wait_until(lambda: site.depth() == 1)
    connected.close()
    with pytest.raises(RequestCancelled):
        future.result(10)
    wait_until(lambda: site.depth() == 0)
    connected.close()
    site.serve(echo)
    assert handle.remote("anew").result(10) == "anew"
    connected.close()


def test_closing_needs_no_broker(durable: EmbeddedServer) -> None:
    connected = handles.connect(durable.url)
    durable.stop()
    started_at = time.monotonic()
    connected.close()
    connected.close()
    assert time.monotonic() - started_at < 2


def test_endpoints_are_listed(site: Site, connected: Connected) -> None:
    assert connected.list_endpoints() == {}
    site.declare()
    assert connected.list_endpoints() == {
        "ask": {"route": None, "methods": ["GET"], "traffic": {"model": 1.0}, "shadows": {}}
    }


@pytest.mark.parametrize("ending", ["", "handle.remote('left in flight')", "connected.close()"])
def test_a_script_ends_by_itself_and_quietly(site: Site, ending: str) -> None:
    site.serve(echo)
    script = f"""
        from penstock import handles
        connected = handles.connect({site.url!r})
        handle = connected.get_handle("ask")
        print(handle.remote("x").result(20))
        {ending}
    """
    started_at = time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"x\n", b"")
    assert time.monotonic() - started_at < 10


# -- the broker dies


@pytest.mark.parametrize("face", ["sync", "asyncio"])
def test_a_request_is_answered_although_the_broker_was_killed_in_the_middle_of_it(
    durable: EmbeddedServer, face: str
) -> None:
    site = Site(durable.url)
    running, release = threading.Event(), threading.Event()

    def hold(request: Any) -> Any:
        running.set()
        release.wait(20)
        return request.data

    site.serve(hold)
    handle = ServeHandle(durable.url, INSTANCE, "ask")

    def kill_and_release() -> None:
        wait_until(running.is_set)
        pid = durable.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: durable.pid not in (None, pid))
        release.set()

    killing = threading.Thread(target=kill_and_release)
    killing.start()
    if face == "sync":
        assert handle.remote("kept").result(20) == "kept"
        handles.connect(durable.url).close()
    else:

        async def ask() -> Any:
            answer = await asyncio.wait_for(await in_loop(handle).remote("kept"), 20)
            await close_here(handle)
            return answer

        assert asyncio.run(ask()) == "kept"
    killing.join()
    wait_until(lambda: site.depth() == 0)
    site.close()


def test_calls_made_while_the_broker_is_away_are_answered_when_it_is_back(durable: EmbeddedServer) -> None:
    site = Site(durable.url)
    site.serve(echo)
    connected = handles.connect(durable.url)
    handle = connected.get_handle("ask")
    assert handle.remote("before").result(10) == "before"
    pid = durable.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    futures = [handle.remote(n) for n in range(50)]
    assert [future.result(20) for future in futures] == list(range(50))
    connected.close()
    site.close()


def test_a_password_is_used_and_never_shown(durable: EmbeddedServer) -> None:
    with Redis.from_url(durable.url) as admin:
        admin.config_set("requirepass", "geheim")
    with pytest.raises(BrokerUnavailable, match="Authentication required"):
        handles.connect(durable.url)
    site = Site(durable.url.replace("unix://", "unix://:geheim@"))
    site.declare(max_queued_requests=0)
    with handles.connect(site.url) as connected:
        handle = connected.get_handle("ask")
        with pytest.raises(Overloaded):
            handle.remote().result(10)
        durable.stop()
        with pytest.raises(BrokerUnavailable) as caught:
            handle.remote().result(10)
    assert "geheim" not in f"{caught.value!r} {caught.value} {handle!r}"
    site.abandon()
