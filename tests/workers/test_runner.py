import asyncio
import gc
import threading
from typing import Any

import pytest

from penstock.broker.wire import Entry, Reply
from penstock.handles.errors import MalformedBody
from penstock.workers import Request
from tests.waiting import wait_until_async
from tests.workers.requests import backend_error_of, error_of, from_handle, from_http
from tests.workers.running import (
    Gate,
    Mixed,
    Start,
    double,
    double_async,
    double_each,
    double_each_async,
    fail,
    fail_async,
    hooks,
)


@pytest.mark.parametrize("function", [double, double_async, double_each, double_each_async])
async def test_a_request_is_answered_with_what_the_code_returns(start: Start, function: object) -> None:
    replica = await start(function)
    reply = await replica.call(from_handle([21]))
    assert (reply.status, reply.codec, reply.body, reply.error) == (200, "json", b"[21,21]", None)
    assert 0 <= reply.run_ms < 10_000


async def test_sync_code_runs_on_one_thread_and_async_code_on_the_loop(start: Start) -> None:
    class Where:
        def __init__(self) -> None:
            self.constructed = threading.get_ident()

        def __call__(self, request: Request) -> list[int]:
            return [self.constructed, threading.get_ident()]

        async def on_loop(self, request: Request) -> list[int]:
            return [self.constructed, threading.get_ident()]

    replica = await start(Where)
    constructed, first = await replica.ask()
    assert constructed == first != threading.get_ident()
    assert await replica.ask() == [constructed, first]
    assert await replica.ask(call="on_loop") == [constructed, threading.get_ident()]
    assert replica.runner.blocking
    assert replica.runner.concurrency() == 1


async def test_a_class_with_an_async_call_is_constructed_on_the_loop(start: Start) -> None:
    class Async:
        def __init__(self) -> None:
            self.loop = asyncio.get_running_loop()

        async def __call__(self, request: Request) -> bool:
            return self.loop is asyncio.get_running_loop()

    replica = await start(Async)
    assert await replica.ask() is True
    assert not replica.runner.blocking
    assert replica.runner.concurrency() == 100


async def test_more_queries_mean_as_many_threads_and_no_more(start: Start, gate: Gate) -> None:
    running: set[int] = set()

    def work(request: Request) -> None:
        running.add(threading.get_ident())
        gate.wait()

    replica = await start("tests.workers.running:call_hook", config={"max_concurrent_queries": 3})
    hooks["work"] = work
    assert replica.runner.concurrency() == 3
    entries = [from_handle("work") for _ in range(6)]
    for entry in entries:
        replica.run(entry)
    await wait_until_async(lambda: len(running) == 3)
    await asyncio.sleep(0.05)
    assert len(running) == 3
    gate.open()
    for entry in entries:
        await replica.reply_to(entry)
    assert len(running) == 3


@pytest.mark.parametrize("function", [fail, fail_async])
async def test_whatever_code_raises_is_the_error_of_that_request_alone(start: Start, function: object) -> None:
    replica = await start(function, config={"max_concurrent_queries": 1})
    names = ("value", "exit", "interrupt", "stop", "generator", "cancelled", "http")
    errors = {name: backend_error_of(await replica.call(from_handle(name))) for name in names}
    types = {name: error.type_name for name, error in errors.items()}
    # Python makes a RuntimeError of a StopIteration that leaves a coroutine (PEP 479).
    assert types == {
        "value": "ValueError",
        "exit": "SystemExit",
        "interrupt": "KeyboardInterrupt",
        "stop": "StopIteration" if function is fail else "RuntimeError",
        "generator": "GeneratorExit",
        "cancelled": "asyncio.exceptions.CancelledError",
        "http": "starlette.exceptions.HTTPException",
    }
    assert errors["value"].message == "bad input"
    assert errors["http"].status == 418


async def test_a_traceback_has_the_users_frames_and_no_others(start: Start) -> None:
    traceback = backend_error_of(await (await start(fail)).call(from_handle("value"))).traceback
    assert "in fail" in traceback
    assert traceback.count("  File ") == 1


@pytest.mark.parametrize("function", [double, double_async, double_each, double_each_async])
async def test_malformed_json_that_code_asks_for_is_a_400(start: Start, function: object) -> None:
    reply = await (await start(function)).call(from_http(b"{", content_type="application/json"))
    assert reply.status == 400
    assert isinstance(error_of(reply), MalformedBody)


async def test_python_objects_pass_only_where_they_are_allowed(start: Start) -> None:
    def as_set(request: Request) -> set[Any]:
        return set(request.data)

    replica = await start(as_set)
    assert "allow_pickle" in backend_error_of(await replica.call(from_handle([1]))).message
    await replica.runner.reconfigure({"allow_pickle": True})
    assert (await replica.call(from_handle([1]))).codec == "pickle"


async def test_nothing_is_kept_of_what_was_answered(start: Start) -> None:
    def kept() -> list[object]:
        return [one for one in gc.get_objects() if isinstance(one, (Request, Entry, Reply))]

    others = kept()  # of tests that ran before
    replica = await start(Mixed)
    for call in ("__call__", "alone", "on_loop", "nope"):
        await replica.call(from_handle(call=call))
    replica.replies.clear()
    await asyncio.sleep(0.01)
    gc.collect()
    assert not [one for one in kept() if not any(one is other for other in others)]
