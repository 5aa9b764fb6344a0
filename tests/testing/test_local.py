"""A backend in the process of a test: `penstock.testing.local`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import httpx
import pytest
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse, StreamingResponse

from penstock import serve
from penstock.broker.wire._fields import LARGE
from penstock.serve import errors
from penstock.testing import Local, local
from tests.support.waiting import wait_until, wait_until_async
from tests.testing.clients import TestClient


def echo(request: serve.Request) -> Any:
    return request.data


async def echo_soon(request: serve.Request) -> Any:
    await asyncio.sleep(0)
    return request.data


class Counter:
    def __init__(self, start: int = 0) -> None:
        self.count = start

    def reconfigure(self, config: dict[str, int]) -> None:
        if config["count"] < 0:
            raise ValueError("the count must not be negative")
        self.count = config["count"]

    def check_health(self) -> None:
        if self.count > 100:
            raise RuntimeError("it is full")

    def __call__(self, request: serve.Request) -> int:
        self.count += int(request.query_params.get("by", 1))
        return self.count

    def peek(self, request: serve.Request) -> int:
        return self.count


def client_of(backend: Local) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(backend.app), base_url="http://test")


@pytest.fixture
def echoing() -> Iterator[Local]:
    with local(echo) as backend:
        yield backend


# -- handles


@pytest.mark.parametrize("function", [echo, echo_soon, "tests.testing.importable:echo"])
def test_a_handle_gets_the_result_of_the_code(function: Any) -> None:
    with local(function) as backend:
        assert backend.handle.remote({"n": [1, None]}).result() == {"n": [1, None]}
        assert [backend.handle.remote(n).result() for n in range(20)] == list(range(20))


async def test_an_asyncio_handle_gets_the_result_of_the_code(echoing: Local) -> None:
    futures = [await echoing.async_handle.remote(n) for n in range(20)]
    assert await asyncio.gather(*futures) == list(range(20))


def test_a_class_is_constructed_with_its_arguments_and_has_methods() -> None:
    with local(Counter, start=5) as backend:
        assert backend.handle.remote(by=2).result() == 7
        assert backend.handle.options(method_name="peek").remote().result() == 7
        with pytest.raises(errors.BackendError, match="missing"):
            backend.handle.options(method_name="missing").remote().result()


def test_the_code_sees_the_objects_of_the_test() -> None:
    seen: list[Any] = []
    lock = threading.Lock()  # which cannot be pickled

    class Recorder:
        def __init__(self, sink: list[Any]) -> None:
            self.sink = sink

        def __call__(self, request: serve.Request) -> None:
            with lock:
                self.sink.append(request.data)

    with local(Recorder, seen) as backend:
        backend.handle.remote("a").result()
    assert seen == ["a"]


def test_an_error_of_the_code_is_the_caller_s() -> None:
    def fail(request: serve.Request) -> None:
        raise LookupError(f"nothing at {request.data}")

    with local(fail) as backend, pytest.raises(errors.BackendError) as raised:
        backend.handle.remote("x").result()
    assert (raised.value.type_name, raised.value.message) == ("LookupError", "nothing at x")
    assert ", in fail" in raised.value.traceback


def test_large_bodies_travel_in_both_directions(echoing: Local) -> None:
    body = bytes(range(256)) * (LARGE // 128)
    assert echoing.handle.remote(body).result() == body


async def test_a_streamed_reply_arrives_value_by_value() -> None:
    async def count(request: serve.Request) -> AsyncGenerator[int]:
        for n in range(request.data):
            yield n

    with local(count) as backend:
        stream = backend.async_handle.options(stream=True)
        assert [value async for value in await stream.remote(3)] == [0, 1, 2]


def test_a_streamed_reply_that_is_longer_than_the_window_is_complete() -> None:
    def chunks(request: serve.Request) -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 32_768

    with local(chunks) as backend:
        assert sum(len(chunk) for chunk in backend.handle.options(stream=True).remote()) == 40 * 32_768


# -- validation, as of an instance


def test_what_an_instance_refuses_is_refused_with_the_same_words() -> None:
    with pytest.raises(TypeError, match="must take one request"):
        local(lambda: None)
    with pytest.raises(errors.ConfigError, match=r"mark it with @serve\.accept_batch"):
        local(echo, config={"max_batch_size": 4})
    with pytest.raises(errors.ConfigError, match="max_batch_size"):
        local(echo, config={"max_batchsize": 4})
    with pytest.raises(errors.ConfigError, match="must begin with '/'"):
        local(echo, route="echo")


def test_a_constructor_that_raises_is_reported_with_its_traceback_and_leaves_no_thread() -> None:
    class Broken:
        def __init__(self) -> None:
            raise OSError("no such model")

        def __call__(self, request: serve.Request) -> None: ...

    before = threading.active_count()
    with pytest.raises(errors.BackendError, match="OSError: no such model") as raised:
        local(Broken)
    assert ", in __init__" in raised.value.traceback
    assert threading.active_count() == before


def test_a_configuration_is_applied_and_changed() -> None:
    with local(Counter, config={"user_config": {"count": 40}}) as backend:
        assert backend.handle.remote().result() == 41
        backend.reconfigure({"user_config": {"count": 101}})
        assert backend.handle.remote().result() == 102
        with pytest.raises(errors.BackendError, match="must not be negative"):
            backend.reconfigure({"user_config": {"count": -1}})
        with pytest.raises(errors.BackendError, match="it is full"):
            backend.check_health()
        backend.reconfigure({"user_config": {"count": 0}})
        backend.check_health()


# -- batching, admission, deadlines, cancellation


async def test_requests_that_wait_are_a_batch() -> None:
    go_on, sizes = threading.Event(), list[int]()

    @serve.accept_batch
    def double(requests: Sequence[serve.Request]) -> list[Any]:
        sizes.append(len(requests))
        assert go_on.wait(30)
        return [2 * request.data if request.data else ValueError("zero") for request in requests]

    with local(double, config={"max_batch_size": 4}) as backend:
        first = await backend.async_handle.remote(1)
        await wait_until_async(lambda: sizes)
        futures = [await backend.async_handle.remote(n) for n in range(8)]  # all are queued now
        go_on.set()
        assert await first == 2
        assert [await future for future in futures[1:]] == [2 * n for n in range(1, 8)]
        with pytest.raises(errors.BackendError, match="zero"):
            await futures[0]
    assert max(sizes) == 4


def test_a_full_queue_refuses_requests() -> None:
    started, go_on = threading.Event(), threading.Event()

    def wait(request: serve.Request) -> None:
        started.set()
        assert go_on.wait(30)

    with local(wait, config={"max_queued_requests": 2}) as backend:
        accepted = [backend.handle.remote()]
        assert started.wait(30)
        accepted.append(backend.handle.remote())
        with pytest.raises(errors.Overloaded) as refused:
            backend.handle.remote().result()
        assert refused.value.retry_after_s >= 1
        go_on.set()
        assert [future.result() for future in accepted] == [None, None]


def test_a_request_past_its_deadline_is_a_timeout_and_one_that_is_cancelled_never_starts() -> None:
    go_on, started = threading.Event(), list[Any]()

    def wait(request: serve.Request) -> None:
        started.append(request.data)
        assert go_on.wait(30)

    with local(wait) as backend:
        running = backend.handle.remote("first")
        wait_until(lambda: started)
        late = backend.handle.options(timeout_s=0.05).remote("late")
        cancelled = backend.handle.remote("cancelled")
        assert cancelled.cancel()
        with pytest.raises(errors.RequestTimeout):
            late.result()
        go_on.set()
        running.result()
        backend.handle.remote("last").result()
    assert started == ["first", "last"]


async def test_cancelling_a_running_call_cancels_async_code() -> None:
    states: list[str] = []

    async def wait(request: serve.Request) -> None:
        states.append("began")
        try:
            await asyncio.sleep(60)
        finally:
            states.append("ended")

    with local(wait) as backend:
        future = await backend.async_handle.remote()
        await wait_until_async(lambda: "began" in states)
        future.cancel()
        await wait_until_async(lambda: "ended" in states)


@pytest.mark.parametrize("is_async", [False, True])
def test_code_that_raises_is_retried_as_its_configuration_says(is_async: bool) -> None:
    attempts: list[Any] = []

    def fail_twice(request: serve.Request) -> int:
        attempts.append(request.data)
        if len(attempts) < 3:
            raise ConnectionError("not yet")
        return len(attempts)

    async def fail_twice_soon(request: serve.Request) -> int:
        return fail_twice(request)

    config = {"retry": {"max_attempts": 3, "on": ["ConnectionError"], "backoff_s": 0.01}}
    with local(fail_twice_soon if is_async else fail_twice, config=config) as backend:
        assert backend.handle.remote("x").result(timeout=30) == 3
        attempts.clear()
        backend.reconfigure({"retry": {"max_attempts": 2, "on": ["ConnectionError"], "backoff_s": 0.01}})
        with pytest.raises(errors.BackendError, match="not yet"):
            backend.handle.remote("y").result(timeout=30)
    assert attempts == ["y", "y"]


# -- HTTP


async def test_http_has_the_conversions_of_an_instance() -> None:
    def greet(request: serve.Request) -> Any:
        return {"hello": request.path_params["name"], "n": request.path_params["n"], "data": request.data}

    with local(greet, route="/hello/{name}/{n:int}") as backend:
        async with client_of(backend) as client:
            found = await client.post("/hello/Ada/7", json=[1])
            assert (found.status_code, found.json()) == (200, {"hello": "Ada", "n": 7, "data": [1]})
            assert found.headers["x-request-id"]
            assert (await client.get("/hello/Ada/x")).status_code == 404
            assert (await client.put("/hello/Ada/7")).headers["allow"] == "GET, HEAD, POST"
            refused = await client.post("/hello/Ada/7", content=b"{", headers={"content-type": "application/json"})
            assert refused.status_code == 400
            assert (await client.get("/-/healthz")).text == "ok"
            assert (await client.get("/-/routes")).json() == {
                "/hello/{name}/{n:int}": {"endpoint": "local", "methods": ["GET", "HEAD", "POST"]}
            }


def test_starlette_s_test_client_works() -> None:
    def respond(request: serve.Request) -> Any:
        if request.method == "GET":
            return StreamingResponse(iter([b"a", b"b"]), media_type="text/plain")
        return JSONResponse({"cookie": request.cookies}, 201)

    with local(respond) as backend:
        client: Any = TestClient(backend.app)
        assert client.get("/").text == "ab"
        made = client.post("/", headers={"cookie": "a=b"})
        assert (made.status_code, made.json()) == (201, {"cookie": {"a": "b"}})


def test_http_options_are_applied() -> None:
    def fail(request: serve.Request) -> None:
        raise LookupError("nothing")

    options = {
        "debug": True,
        "max_body_bytes": 10,
        "middlewares": [Middleware(TrustedHostMiddleware, allowed_hosts=["testserver"])],
    }
    with local(fail, http_options=options) as backend:
        client: Any = TestClient(backend.app)
        shown = client.post("/")
        assert shown.status_code == 500
        assert ", in fail" in shown.text
        assert client.post("/", content=b"x" * 11).status_code == 413
        assert client.post("/", headers={"host": "elsewhere"}).status_code == 400


# -- what it does not have


def test_what_needs_redis_is_refused_by_name(echoing: Local) -> None:
    with pytest.raises(errors.PenstockError, match=r"penstock\.testing\.local does without"):
        echoing.handle.submit(1)
    client: Any = TestClient(echoing.app)
    refused = client.post("/", headers={"prefer": "respond-async"})
    assert refused.status_code == 501
    assert "serve.start()" in refused.text
    assert client.post("/", headers={"idempotency-key": "k"}).status_code == 501


def test_closing_finishes_what_runs_and_refuses_what_comes_later() -> None:
    started, go_on = threading.Event(), threading.Event()

    def wait(request: serve.Request) -> str:
        started.set()
        assert go_on.wait(30)
        return "done"

    backend = local(wait)
    running = backend.handle.remote()
    assert started.wait(30)
    threading.Timer(0.05, go_on.set).start()
    backend.close()
    assert running.result() == "done"
    with pytest.raises(errors.PenstockError, match="was closed"):
        backend.handle.remote().result()
    backend.close()
    assert "closed" in repr(backend)


def test_two_backends_in_a_process_do_not_meet() -> None:
    def ask(request: serve.Request) -> Any:
        return inner.handle.remote(request.data + 1).result()

    with local(echo) as inner, local(ask) as outer:
        assert outer.handle.remote(1).result() == 2
