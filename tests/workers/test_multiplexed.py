"""Loaders of models: ``serve.multiplexed``."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from penstock import serve
from penstock.handles.options import CallOptions
from penstock.serve import errors
from penstock.testing import Local, local
from tests.support.waiting import wait_until, wait_until_async
from tests.testing.clients import TestClient


class Model:
    """A model that records what becomes of it."""

    def __init__(self, model_id: str, events: list[str]) -> None:
        self.id, self.events = model_id, events
        events.append(f"load {model_id}")

    def close(self) -> None:
        self.events.append(f"close {self.id}")


class AsyncModel(Model):
    async def close(self) -> None:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        await asyncio.sleep(0)
        super().close()


class Threaded:
    """Loads on the threads of its backend."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    @serve.multiplexed(max_models=2)
    def load(self, model_id: str) -> Model:
        if model_id.startswith("bad"):
            raise FileNotFoundError(f"no model {model_id}")
        return Model(model_id, self.events)

    def __call__(self, request: serve.Request) -> str:
        return self.load(serve.get_multiplexed_model_id()).id


class OnLoop:
    """Loads on the event loop."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    @serve.multiplexed(max_models=2)
    async def load(self, model_id: str) -> AsyncModel:
        await asyncio.sleep(0)
        if model_id.startswith("bad"):
            raise FileNotFoundError(f"no model {model_id}")
        return AsyncModel(model_id, self.events)

    async def __call__(self, request: serve.Request) -> str:
        return (await self.load(serve.get_multiplexed_model_id())).id


BOTH = pytest.mark.parametrize("code", [Threaded, OnLoop])


def call(backend: Local, model_id: str) -> Any:
    return backend.handle.options(model_id=model_id).remote().result()


def test_an_application_loads_the_model_that_its_request_names() -> None:
    events: list[str] = []
    models = OnLoop(events)

    async def endpoint(request: Any) -> PlainTextResponse:
        return PlainTextResponse((await models.load(serve.get_multiplexed_model_id())).id)

    app = serve.asgi(Starlette(routes=[Route("/", endpoint)]))
    with local(app, methods=serve.ALL_METHODS) as backend:
        http: Any = TestClient(backend.app)
        for model_id in ("a", "b", "c"):
            assert http.get("/", headers={"X-Serve-Model-Id": model_id}).text == model_id
            gc.collect()  # the application leaves cycles that refer to its request
    assert events == ["load a", "load b", "close a", "load c"]


@BOTH
def test_a_model_is_loaded_once_and_the_one_used_longest_ago_is_evicted(code: Any) -> None:
    events: list[str] = []
    with local(code, events) as backend:
        for model_id in ("a", "a", "b", "a", "c"):
            assert call(backend, model_id) == model_id
        wait_until(lambda: events == ["load a", "load b", "close b", "load c"])
        call(backend, "a")
        call(backend, "b")
        wait_until(lambda: events[4:] == ["close c", "load b"])


@BOTH
def test_an_error_of_the_loader_is_the_caller_s_and_the_next_request_tries_again(code: Any) -> None:
    events: list[str] = []
    with local(code, events) as backend:
        for _ in range(4):  # which would fill the cache if it kept them
            with pytest.raises(errors.BackendError, match="FileNotFoundError: no model bad") as raised:
                call(backend, "bad")
            assert ", in load" in raised.value.traceback
        assert call(backend, "a") == "a"


@BOTH
def test_a_request_names_its_model_by_a_header_too(code: Any) -> None:
    with local(code, []) as backend:
        client = TestClient(backend.app)
        assert client.get("/", headers={"X-Serve-Model-Id": "m/1"}).text == "m/1"
        unnamed = client.get("/")
        assert unnamed.status_code == 400
        assert "send the header X-Serve-Model-Id" in unnamed.text


def test_requests_that_need_a_model_at_the_same_time_wait_for_one_load_on_threads() -> None:
    began, go_on, loads = threading.Semaphore(0), threading.Event(), list[str]()

    class Slow:
        @serve.multiplexed(max_models=2)
        def load(self, model_id: str) -> str:
            loads.append(model_id)
            assert go_on.wait(30)
            return model_id

        def __call__(self, request: serve.Request) -> str:
            began.release()
            return self.load(request.model_id)

    with local(Slow, config={"max_concurrent_queries": 8}) as backend:
        futures = [backend.handle.options(model_id=name).remote() for name in ("a", "b", "a", "b", "c")]
        for _ in futures:
            assert began.acquire(timeout=30)
        wait_until(lambda: sorted(loads) == ["a", "b"])  # "c" has no place while both load
        go_on.set()
        assert [future.result() for future in futures] == ["a", "b", "a", "b", "c"]
    assert sorted(loads) == ["a", "b", "c"]


async def test_requests_that_need_a_model_at_the_same_time_wait_for_one_load_on_the_loop() -> None:
    began, go_on, loads = list[str](), threading.Event(), list[str]()

    class Slow:
        @serve.multiplexed(max_models=2)
        async def load(self, model_id: str) -> str:
            loads.append(model_id)
            await asyncio.to_thread(go_on.wait)
            return model_id

        async def __call__(self, request: serve.Request) -> str:
            began.append(request.model_id)
            return await self.load(request.model_id)

    with local(Slow) as backend:
        futures = [await backend.async_handle.options(model_id=name).remote() for name in ("a", "b", "a", "b", "c")]
        await wait_until_async(lambda: len(began) == 5 and sorted(loads) == ["a", "b"])  # "c" has no place
        futures[0].cancel()  # which began the load that another request waits for
        go_on.set()
        assert await asyncio.gather(*futures[1:]) == ["b", "a", "b", "c"]
    assert sorted(loads) == ["a", "b", "c"]


def test_a_model_in_use_is_evicted_last_and_closed_when_its_last_request_ends() -> None:
    events: list[str] = []
    inside, go_on = threading.Event(), threading.Event()

    class Holding(Threaded):
        def hold(self, request: serve.Request) -> str:
            model = self.load(request.model_id)
            inside.set()
            assert go_on.wait(30)
            assert f"close {model.id}" not in events
            return model.id

    with local(Holding, events, config={"max_concurrent_queries": 4}) as backend:
        held = backend.handle.options(method_name="hold", model_id="a").remote()
        assert inside.wait(30)
        call(backend, "b")
        collect_until(lambda: call(backend, "c") and "close b" in events)  # "a" was used longer ago, and is in use
        assert "close a" not in events
        go_on.set()
        assert held.result() == "a"
        collect_until(lambda: call(backend, "d") and call(backend, "e") and "close a" in events)


def test_a_model_without_a_method_close_is_left_to_python() -> None:
    deleted: list[str] = []

    class Plain:
        def __init__(self, model_id: str) -> None:
            self.id = model_id

        def __del__(self) -> None:
            deleted.append(self.id)

    @serve.multiplexed(max_models=1)
    def load(model_id: str) -> Plain:
        return Plain(model_id)

    def use(request: serve.Request) -> str:
        return load(request.model_id).id

    with local(use) as backend:
        call(backend, "a")
        collect_until(lambda: call(backend, "b") and deleted == ["a"])


@BOTH
def test_an_error_of_close_is_logged_and_does_not_reach_the_request(
    code: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Model) -> None:
        raise OSError("device lost")

    for kind in (Model, AsyncModel):
        monkeypatch.setattr(kind, "close", fail)
    with local(code, []) as backend:
        assert [call(backend, name) for name in ("a", "b", "c")] == ["a", "b", "c"]
        wait_until(lambda: "cannot close model 'a'" in caplog.text)


def test_the_requests_of_a_batch_name_models_of_their_own() -> None:
    class Batched:
        @serve.multiplexed
        def load(self, model_id: str) -> str:
            return model_id.upper()

        @serve.accept_batch
        def __call__(self, requests: Sequence[serve.Request]) -> list[str]:
            if requests[0].data == "together":
                return [self.load(serve.get_multiplexed_model_id())] * len(requests)
            return [self.load(request.model_id) for request in requests]

    config = {"max_batch_size": 2, "batch_wait_timeout": 30}
    with local(Batched, config=config) as backend:
        handle = backend.handle
        futures = [handle.options(model_id=name).remote("apart") for name in ("a", "b")]
        assert [future.result() for future in futures] == ["A", "B"]
        futures = [handle.options(model_id="c").remote("together") for _ in range(2)]
        assert [future.result() for future in futures] == ["C", "C"]
        futures = [handle.options(model_id=name).remote("together") for name in ("a", "b")]
        for future in futures:
            with pytest.raises(errors.BackendError, match="name the models 'a', 'b': use the model_id"):
                future.result()


def test_callers_cannot_call_a_loader() -> None:
    with local(Threaded, []) as backend, pytest.raises(errors.BackendError, match="has no method 'load'"):
        backend.handle.options(method_name="load").remote().result()


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(errors.ConfigError, match="max_models must be at least 1, not 0"):
        serve.multiplexed(max_models=0)
    with pytest.raises(TypeError, match="max_models must be an int, not str"):
        serve.multiplexed(max_models="3")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    with pytest.raises(TypeError, match="not on a type"):
        serve.multiplexed(Model)
    for wrong in ("", " a", "a\n", "ж"):
        with pytest.raises(errors.ConfigError, match="model_id must be text that a header can have"):
            CallOptions(model_id=wrong)


def test_outside_a_request_there_is_no_model_id() -> None:
    assert serve.get_multiplexed_model_id() == ""


def collect_until(condition: Any) -> None:
    def look() -> bool:
        gc.collect()
        return bool(condition())

    wait_until(look)
