import asyncio
import gc
import threading
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from penstock import serve
from penstock.broker.registry.records import BackendSpec, RetrySpec
from penstock.broker.wire.replies import Reply
from penstock.broker.wire.requests import Entry
from penstock.handles.errors import ConfigError, MalformedBody
from penstock.workers.executing.request import Request
from tests.support.waiting import wait_until_async
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
async def test_the_reply_is_the_result_of_user_code(start: Start, function: object) -> None:
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
    assert replica.runner.is_blocking
    assert replica.runner.concurrency() == 1


async def test_a_class_with_an_async_call_is_constructed_on_the_loop(start: Start) -> None:
    class Async:
        def __init__(self) -> None:
            self.loop = asyncio.get_running_loop()

        async def __call__(self, request: Request) -> bool:
            return self.loop is asyncio.get_running_loop()

    replica = await start(Async)
    assert await replica.ask() is True
    assert not replica.runner.is_blocking
    assert replica.runner.concurrency() == 100


async def test_max_concurrent_queries_is_the_number_of_threads(start: Start, gate: Gate) -> None:
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
async def test_an_exception_is_the_error_of_its_request_alone(start: Start, function: object) -> None:
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
async def test_malformed_json_that_user_code_reads_is_a_400(start: Start, function: object) -> None:
    reply = await (await start(function)).call(from_http(b"{", content_type="application/json"))
    assert reply.status == 400
    assert isinstance(error_of(reply), MalformedBody)


async def test_results_are_pickled_only_where_that_is_allowed(start: Start) -> None:
    def as_set(request: Request) -> set[Any]:
        return set(request.data)

    replica = await start(as_set)
    assert "allow_pickle" in backend_error_of(await replica.call(from_handle([1]))).message
    await replica.runner.reconfigure(BackendSpec(allow_pickle=True))
    assert (await replica.call(from_handle([1]))).codec == "pickle"


async def test_nothing_is_kept_of_finished_requests(start: Start) -> None:
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


class Unprintable(Exception):
    def __str__(self) -> str:
        raise SystemExit("even this")


def _raise(error: BaseException) -> None:
    raise error


# Made by a call: type checkers reject it as an exception class.
Pretending: Any = type(
    "Pretending", (Exception,), {"__class__": property(lambda self: _raise(RuntimeError("not telling")))}
)
any_exception: Any = HTTPException


class Endless:
    def tolist(self) -> list[int]:
        return []

    def __iter__(self) -> Any:
        raise KeyboardInterrupt


def raise_oddly(request: Request) -> str:
    if request.data == "ok":
        return "ok"
    raise {
        "unprintable": Unprintable(),
        "pretending": Pretending("x"),
        "status": any_exception("404", "a status that is text"),
        "headers": any_exception(401, "headers that are no dict", headers=["x"]),
    }[request.data]


async def raise_oddly_async(request: Request) -> str:
    return raise_oddly(request)


@pytest.mark.parametrize("function", [raise_oddly, raise_oddly_async])
@pytest.mark.parametrize(
    ("name", "status"), [("unprintable", 500), ("pretending", 500), ("status", 500), ("headers", 401)]
)
async def test_an_exception_that_cannot_be_described_gets_a_reply_too(
    start: Start, function: object, name: str, status: int
) -> None:
    replica = await start(function)
    reply = await replica.call(from_handle(name))
    assert (reply.status, reply.error is None) == (status, False)
    assert await replica.ask("ok") == "ok"


@serve.accept_batch
def return_endless(requests: list[Request]) -> Any:
    return Endless() if requests[0].data == "endless" else ["ok"] * len(requests)


async def test_unreadable_batch_results_fail_only_their_requests(start: Start) -> None:
    replica = await start(return_endless)
    entries = [from_handle("endless"), from_handle("behind")]
    replica.run(*entries)
    for entry in entries:
        assert backend_error_of(await replica.reply_to(entry)).type_name == "KeyboardInterrupt"
    assert await replica.ask("ok") == "ok"


async def test_a_request_runs_on_another_thread_if_none_can_be_started(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    replica = await start(double, config={"max_concurrent_queries": 4})
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert await asyncio.gather(*(replica.ask(n) for n in range(4))) == [0, 2, 4, 6]


class Leaving(StreamingResponse):
    def __init__(self) -> None:
        super().__init__(self.values())

    async def values(self) -> AsyncGenerator[bytes]:
        try:
            yield b"x"
            raise RuntimeError("broken")
        finally:
            raise SystemExit


async def respond_and_leave(request: Request) -> Any:
    return Leaving() if request.data == "leave" else "ok"


async def test_system_exit_in_a_body_iterator_does_not_end_the_replica(start: Start) -> None:
    replica = await start(respond_and_leave)
    assert (await replica.call(from_handle("leave"))).error is not None
    assert await replica.ask("ok") == "ok"


class Backend:
    """A backend whose configuration can change."""

    def __init__(self) -> None:
        self.user_config: Any = None

    def __call__(self, request: Request) -> Any:
        return self.user_config

    def reconfigure(self, user_config: Any) -> None:
        self.user_config = user_config


async def test_a_retry_of_an_error_that_does_not_exist_is_refused_by_the_replica(start: Start) -> None:
    with pytest.raises(ConfigError, match=r"RetryConfig.on has 'no_such_module.Error', and its module cannot be"):
        await start(double, config={"retry": RetrySpec(on=("no_such_module.Error",))})
    replica = await start(Backend, config={"user_config": 1})
    with pytest.raises(ConfigError, match=r"RetryConfig.on has 'Eror'"):
        await replica.runner.reconfigure(BackendSpec(user_config=2, retry=RetrySpec(on=("Eror",))))
    assert await replica.ask() == 1
    assert replica.runner.config.retry is None
    await replica.runner.reconfigure(BackendSpec(user_config=2, retry=RetrySpec(on=("OSError",))))
    assert await replica.ask() == 2


@pytest.mark.parametrize(
    ("content_type", "said"),
    [
        ("application/x-www-form-urlencoded", "the content type is 'application/x-www-form-urlencoded'"),
        ("", "there is no content type"),
    ],
)
async def test_code_that_takes_the_bytes_of_a_json_body_for_its_value_is_told_the_content_type(
    start: Start, content_type: str, said: str
) -> None:
    """As `curl -d '{}'` declares a form."""

    def greet(request: Request) -> Any:
        return request.data["name"]

    error = backend_error_of(await (await start(greet)).call(from_http(b'{"name": "Ada"}', content_type=content_type)))
    assert error.type_name == "TypeError"
    assert f"(the request's data is bytes, because {said}: send the header" in error.message


async def test_other_errors_say_nothing_of_the_content_type(start: Start) -> None:
    def greet(request: Request) -> Any:
        return None + request.data

    replica = await start(greet)
    for entry in (from_http(b"[1]", content_type="application/json"), from_http(b"abc"), from_handle(b"[1]")):
        assert "content" not in backend_error_of(await replica.call(entry)).message
