import asyncio
import gc
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings, strategies as st
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, PlainTextResponse, StreamingResponse

from penstock.broker.wire import Entry, Reply
from penstock.handles.errors import BackendError, ConfigError, MalformedBody, RequestCancelled
from penstock.handles.log_lines import request_ids
from penstock.workers import Request, accept_batch, get_current_backend_tag, get_current_replica_tag
from penstock.workers.runner import Runner
from penstock.workers.running import Running
from penstock.workers.target import dump
from tests.waiting import wait_until_async
from tests.workers.requests import backend_error_of, error_of, from_handle, from_http, value_of

Start = Callable[..., Awaitable["Replica"]]


class Replica:
    """A runner, and the answers that it gave."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.replies: dict[str, Reply] = {}
        self._loop_thread = threading.get_ident()

    def run(self, *entries: Entry) -> Running:
        given_before = len(self.replies)
        running = self.runner.run(entries, self.done)
        assert len(self.replies) == given_before, "answered from within run()"
        return running

    def done(self, entry: Entry, reply: Reply) -> None:
        assert threading.get_ident() == self._loop_thread
        assert entry.id == reply.id
        assert entry.id not in self.replies, "answered twice"
        assert reply.replica == "b#1"
        reply.fields()  # it can travel
        self.replies[entry.id] = reply

    async def reply_to(self, entry: Entry) -> Reply:
        await wait_until_async(lambda: entry.id in self.replies)
        return self.replies[entry.id]

    async def call(self, entry: Entry) -> Reply:
        self.run(entry)
        return await self.reply_to(entry)

    async def ask(self, value: object = None, *, call: str = "__call__") -> Any:
        return value_of(await self.call(from_handle(value, call=call)))


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    replicas: list[Replica] = []

    async def start(target: Any, *args: Any, config: Mapping[str, Any] | None = None, **kwargs: Any) -> Replica:
        replica = Replica(Runner("b", "b#1", dump(target, args, kwargs), config or {}))
        replicas.append(replica)
        await replica.runner.start()
        return replica

    yield start
    for replica in replicas:
        await replica.runner.stop()


def double(request: Request) -> Any:
    return 2 * request.data


async def double_async(request: Request) -> Any:
    await asyncio.sleep(0)
    return 2 * request.data


@accept_batch
def double_each(requests: Sequence[Request]) -> list[Any]:
    return [2 * request.data for request in requests]


@accept_batch
async def double_each_async(requests: Sequence[Request]) -> list[Any]:
    await asyncio.sleep(0)
    return [2 * request.data for request in requests]


class Gate:
    """Holds code on a thread until it is opened. Pickled, it is still the same one."""

    opened: ClassVar[dict[str, threading.Event]] = {}

    def __init__(self, name: str) -> None:
        self.name = name
        self.opened.setdefault(name, threading.Event())

    def open(self) -> None:
        self.opened[self.name].set()

    def wait(self) -> None:
        assert self.opened[self.name].wait(10)


@pytest.fixture
def gate(request: pytest.FixtureRequest) -> Iterator[Gate]:
    gate = Gate(request.node.nodeid)
    yield gate
    gate.open()


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

    replica = await start("tests.workers.test_runner:call_hook", config={"max_concurrent_queries": 3})
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


hooks: dict[str, Callable[[Request], Any]] = {}
"""What a test shares with its backend. Local code is pickled, and with it copies of all that it names; these functions
are not, as they can be imported."""


def hook(name: str) -> Callable[[Request], Any]:
    return hooks[name]


def call_hook(request: Request) -> Any:
    return hook(request.data)(request)


async def test_a_backend_can_be_named_by_an_import_path(start: Start) -> None:
    assert await (await start("tests.workers.test_runner:double")).ask(2) == 4
    assert await (await start("tests.workers.test_runner:Counter", 5)).ask() == 6


class Counter:
    limit = 10

    class Inner:
        pass

    def __init__(self, start: int = 0, *, step: int = 1) -> None:
        self.value, self.step = start, step
        self.model = double

    def __call__(self, request: Request) -> int:
        self.value += self.step
        return self.value

    def peek(self, request: Request) -> int:
        return self.value

    @staticmethod
    def static(request: Request) -> str:
        return "static"

    @property
    def secret(self) -> Callable[[Request], str]:
        return lambda request: "secret"

    def _private(self, request: Request) -> str:
        return "private"

    def reconfigure(self, user_config: Any) -> None:
        self.step = user_config["step"]

    def check_health(self) -> None:
        if self.step < 0:
            raise RuntimeError("it runs backwards")


async def test_a_class_is_constructed_once_and_its_methods_can_be_called(start: Start) -> None:
    replica = await start(Counter, 10, step=5)
    assert await replica.ask() == 15
    assert await replica.ask() == 20
    assert await replica.ask(call="peek") == 20
    assert await replica.ask(call="static") == "static"


@pytest.mark.parametrize("call", ["nope", "limit", "Inner", "model", "secret", "", "a.b", "\ud7ff"])
async def test_a_method_that_is_not_there_is_a_404_that_lists_those_that_are(start: Start, call: str) -> None:
    reply = await (await start(Counter)).call(from_http(call=call))
    assert reply.status == 404
    error = backend_error_of(reply)
    assert error.type_name == "AttributeError"
    assert "'__call__', 'peek', 'static'" in error.message
    assert repr(call) in error.message


@pytest.mark.parametrize("call", ["_private", "__init__", "__class__", "__reduce__", "reconfigure", "check_health"])
async def test_a_method_that_is_not_for_callers_is_refused(start: Start, call: str) -> None:
    reply = await (await start(Counter)).call(from_http(call=call))
    assert reply.status == 400
    assert repr(call) in backend_error_of(reply).message


async def test_a_function_has_no_methods(start: Start) -> None:
    reply = await (await start(double)).call(from_http(call="mro"))
    assert reply.status == 404
    assert "double" in backend_error_of(reply).message


def fail(request: Request) -> None:
    raise {
        "value": ValueError("bad input"),
        "exit": SystemExit(3),
        "interrupt": KeyboardInterrupt(),
        "stop": StopIteration(1),
        "generator": GeneratorExit(),
        "cancelled": asyncio.CancelledError(),
        "http": HTTPException(418, "teapot"),
    }[request.data]


async def fail_async(request: Request) -> None:
    await asyncio.sleep(0)
    fail(request)


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


@pytest.mark.parametrize("function", [double_each, double_each_async])
async def test_a_batch_is_one_call(start: Start, function: object) -> None:
    replica = await start(function)
    assert replica.runner.accepts_batch
    entries = [from_handle(n) for n in range(5)]
    replica.run(*entries)
    assert [value_of(await replica.reply_to(entry)) for entry in entries] == [0, 2, 4, 6, 8]


async def test_requests_for_code_that_takes_no_batches_are_one_call_each(start: Start) -> None:
    replica = await start(double)
    assert not replica.runner.accepts_batch
    entries = [from_handle(n) for n in range(5)]
    replica.run(*entries)
    assert [value_of(await replica.reply_to(entry)) for entry in entries] == [0, 2, 4, 6, 8]


@accept_batch
def misbehave(requests: list[Request]) -> Any:
    import numpy as np

    match requests[0].data:
        case "short":
            return [1]
        case "none":
            return None
        case "text":
            return "ab"
        case "dict":
            return {"a": 1, "b": 2}
        case "raise":
            raise ValueError("all of them")
        case "one":
            return [ValueError("this one"), len(requests)]
        case "tuple":
            return (1, 2)
        case "array":
            return np.array([[1, 2], [3, 4]])
        case _:
            return ["ok"] * len(requests)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("short", "'b' returned 1 results for a batch of 2 requests"),
        ("none", "'b' must return a list of 2 results for 2 requests, not a NoneType"),
        ("text", "not a str"),
        ("dict", "not a dict"),
        ("raise", "all of them"),
    ],
)
async def test_a_batch_that_goes_wrong_fails_every_request_of_it(start: Start, what: str, said: str) -> None:
    replica = await start(misbehave)
    entries = [from_handle(what), from_handle("ok")]
    replica.run(*entries)
    for entry in entries:
        assert said in backend_error_of(await replica.reply_to(entry)).message


async def test_an_element_that_is_an_exception_fails_its_request_alone(start: Start) -> None:
    replica = await start(misbehave)
    first, second = from_handle("one"), from_handle("ok")
    replica.run(first, second)
    assert backend_error_of(await replica.reply_to(first)).message == "this one"
    assert value_of(await replica.reply_to(second)) == 2


@pytest.mark.parametrize(("what", "values"), [("tuple", [1, 2]), ("array", [[1, 2], [3, 4]])])
async def test_a_batch_may_be_answered_with_a_tuple_or_an_array(start: Start, what: str, values: list[Any]) -> None:
    replica = await start(misbehave)
    entries = [from_handle(what), from_handle("ok")]
    replica.run(*entries)
    assert [value_of(await replica.reply_to(entry)) for entry in entries] == values


class Mixed:
    @accept_batch
    def __call__(self, requests: list[Request]) -> list[int]:
        return [len(requests)] * len(requests)

    def alone(self, request: Request) -> str:
        return "alone"

    @accept_batch
    async def on_loop(self, requests: list[Request]) -> list[int]:
        return [10 * len(requests)] * len(requests)


async def test_a_batch_is_split_by_the_methods_that_it_is_for(start: Start) -> None:
    replica = await start(Mixed)
    calls = ["__call__", "alone", "on_loop", "__call__", "nope", "on_loop", "alone"]
    entries = [from_handle(call=call) for call in calls]
    replica.run(*entries)
    replies = [await replica.reply_to(entry) for entry in entries]
    assert [reply.status for reply in replies] == [200, 200, 200, 200, 404, 200, 200]
    assert [value_of(r) for r in replies if not r.error] == [2, "alone", 20, 2, 20, "alone"]


async def test_what_waits_for_a_thread_can_be_cancelled_and_what_runs_cannot(start: Start, gate: Gate) -> None:
    seen: list[str] = []

    def work(request: Request) -> str:
        seen.append("run")
        gate.wait()
        return "done"

    hooks["cancelled"] = work
    replica = await start(call_hook)
    first, second, third = (from_handle("cancelled") for _ in range(3))
    running, waiting = replica.run(first), replica.run(second)
    replica.run(third)
    await wait_until_async(lambda: seen)
    running.cancel(first.id)
    waiting.cancel(second.id)
    assert second.id not in replica.replies, "answered from within cancel()"
    waiting.cancel(second.id)
    waiting.cancel("unknown")
    assert isinstance(error_of(await replica.reply_to(second)), RequestCancelled)
    assert first.id not in replica.replies
    gate.open()
    assert value_of(await replica.reply_to(first)) == "done"
    assert value_of(await replica.reply_to(third)) == "done"
    assert seen == ["run", "run"]


async def test_what_expires_while_it_waits_for_a_thread_is_never_started(start: Start, gate: Gate) -> None:
    seen: list[object] = []
    clock_ms = 1_000.0

    def work(request: Request) -> None:
        seen.append(str(request.query_params["n"]))
        gate.wait()

    hooks["late"] = work
    replica = await start(call_hook)
    replica.runner.keep_time_by(lambda: clock_ms)
    running, late, in_time, without = (from_handle("late", n=number) for number in range(4))
    running.header.deadline_ms = late.header.deadline_ms = 2_000
    in_time.header.deadline_ms = 2_001
    for entry in (running, late, in_time, without):
        replica.run(entry)
    await wait_until_async(lambda: seen == ["0"])
    clock_ms = 2_000.0
    gate.open()
    assert isinstance(error_of(await replica.reply_to(late)), RequestCancelled)
    for entry in (running, in_time, without):
        assert value_of(await replica.reply_to(entry)) is None
    assert seen == ["0", "2", "3"]


async def test_a_batch_begins_without_what_has_expired(start: Start) -> None:
    replica = await start(Mixed)
    replica.runner.keep_time_by(lambda: 2_000.0)
    late, in_time = from_handle(), from_handle()
    late.header.deadline_ms = 1_000
    replica.run(late, in_time)
    assert isinstance(error_of(await replica.reply_to(late)), RequestCancelled)
    assert value_of(await replica.reply_to(in_time)) == 1


async def test_async_code_that_would_begin_too_late_is_not_begun(start: Start) -> None:
    replica = await start(double_async)
    replica.runner.keep_time_by(lambda: 2_000.0)
    late = from_handle([1])
    late.header.deadline_ms = 1_000
    assert isinstance(error_of(await replica.call(late)), RequestCancelled)


async def test_one_of_a_batch_that_waits_can_be_cancelled(start: Start, gate: Gate) -> None:
    hooks["hold"] = lambda request: gate.wait()

    class Held(Mixed):
        def hold(self, request: Request) -> None:
            call_hook(request)

    replica = await start(Held)
    replica.run(from_handle("hold", call="hold"))
    first, second = from_handle(), from_handle()
    replica.run(first, second).cancel(first.id)
    gate.open()
    assert isinstance(error_of(await replica.reply_to(first)), RequestCancelled)
    assert value_of(await replica.reply_to(second)) == 1


async def test_async_code_is_cancelled(start: Start) -> None:
    async def wait(request: Request) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            hook("cleanup")(request)

    cleaned = list[str]()
    hooks["cleanup"] = lambda request: cleaned.append("cleaned")
    replica = await start(wait)
    started, unstarted = from_handle(), from_handle()
    running = replica.run(started)
    await asyncio.sleep(0.01)
    running.cancel(started.id)
    replica.run(unstarted).cancel(unstarted.id)
    for entry in (started, unstarted):
        reply = await replica.reply_to(entry)
        assert isinstance(error_of(reply), RequestCancelled)
        assert reply.status == 499
    assert cleaned == ["cleaned"]


async def test_an_async_batch_is_cancelled_once_nobody_waits_for_it(start: Start) -> None:
    @accept_batch
    async def wait(requests: list[Request]) -> list[Any]:
        await asyncio.sleep(0.1 if requests[0].data else 3600)
        return [1] * len(requests)

    replica = await start(wait)
    first, second = from_handle(True), from_handle(True)
    running = replica.run(first, second)
    await asyncio.sleep(0.01)
    running.cancel(first.id)
    assert [value_of(await replica.reply_to(entry)) for entry in (first, second)] == [1, 1]

    first, second = from_handle(False), from_handle(False)
    running = replica.run(first, second)
    await asyncio.sleep(0.01)
    running.cancel(first.id)
    running.cancel(second.id)
    for entry in (first, second):
        assert isinstance(error_of(await replica.reply_to(entry)), RequestCancelled)


def respond(request: Request) -> Any:
    match request.data:
        case "stream":
            return StreamingResponse(iter(["a", "b", "c"]), 201, {"x-mine": "1"}, "text/plain")
        case "broken stream":
            return StreamingResponse(f"{1 / (1 - n)}" for n in range(2))
        case "generator":
            return (n for n in range(3))
        case ["file", path]:
            return FileResponse(path)
        case "background":
            return PlainTextResponse("first", background=BackgroundTask(hooks["background"], request))
        case _:
            return PlainTextResponse("plain", 202)


async def respond_async(request: Request) -> Any:
    return respond(request)


@pytest.mark.parametrize("function", [respond, respond_async])
async def test_responses_are_sent_whole(start: Start, function: object, tmp_path: Path) -> None:
    replica = await start(function)
    reply = await replica.call(from_handle("plain"))
    assert (reply.status, reply.codec, reply.body) == (202, "response", b"plain")

    reply = await replica.call(from_handle("stream"))
    assert (reply.status, reply.codec, reply.body) == (201, "response", b"abc")
    assert ("x-mine", "1") in reply.headers

    (tmp_path / "a.txt").write_bytes(b"x" * 200_000)
    reply = await replica.call(from_handle(["file", str(tmp_path / "a.txt")]))
    assert (reply.status, len(reply.body)) == (200, 200_000)
    assert ("content-length", "200000") in reply.headers

    reply = await replica.call(from_handle(["file", str(tmp_path / "missing.txt")]))
    assert "missing.txt" in backend_error_of(reply).message

    assert backend_error_of(await replica.call(from_handle("broken stream"))).type_name == "ZeroDivisionError"
    reply = await replica.call(from_handle("generator"))
    assert backend_error_of(reply).type_name == "TypeError"
    assert "generator" in backend_error_of(reply).message


@pytest.mark.parametrize("function", [respond, respond_async])
async def test_a_background_task_runs_after_the_answer(
    start: Start, function: object, caplog: pytest.LogCaptureFixture
) -> None:
    replica = await start(function)
    entry = from_handle("background")
    answered: list[bool] = []
    hooks["background"] = lambda request: answered.append(entry.id in replica.replies)
    assert (await replica.call(entry)).body == b"first"
    await wait_until_async(lambda: answered)
    assert answered == [True]

    hooks["background"] = lambda request: fail(request)
    assert (await replica.call(from_handle("background"))).body == b"first"
    with caplog.at_level(logging.ERROR):
        await wait_until_async(lambda: "background task" in caplog.text)


async def test_a_stream_can_be_cancelled(start: Start) -> None:
    async def endless(request: Request) -> StreamingResponse:
        async def chunks() -> AsyncIterator[str]:
            while True:
                yield "."
                await asyncio.sleep(0.001)

        return StreamingResponse(chunks())

    replica = await start(endless)
    for pause_s in (0, 0.02):
        entry = from_handle()
        running = replica.run(entry)
        await asyncio.sleep(pause_s)
        running.cancel(entry.id)
        assert isinstance(error_of(await replica.reply_to(entry)), RequestCancelled)


class Unpicklable:
    def __reduce__(self) -> Any:
        return fail_to_load, ()


def fail_to_load() -> None:
    raise ImportError("no module named 'missing'")


@pytest.mark.parametrize(
    ("target", "args", "said"),
    [
        ("no_such_module_:f", (), "ModuleNotFoundError: No module named 'no_such_module_'"),
        ("tests.workers.test_runner:nope", (), "AttributeError"),
        ("tests.workers.test_runner", (), "'module:Name'"),
        ("tests.workers.test_runner:hooks", (), "a backend is a function or a class, not a dict"),
        (Counter, (1, 2, 3), "TypeError"),
        (Counter, (Unpicklable(),), "no module named 'missing'"),
        (Gate, ("x",), "the class Gate has no __call__ method"),
        (double, (1,), "double is not a class"),
    ],
)
async def test_code_that_cannot_be_loaded_says_why(start: Start, target: Any, args: Any, said: str) -> None:
    with pytest.raises(BackendError) as caught:
        await start(target, *args)
    assert said in str(caught.value)


@pytest.mark.parametrize("error", [ValueError("no weights"), SystemExit(1), StopIteration(), KeyboardInterrupt()])
@pytest.mark.parametrize("is_async", [False, True])
async def test_a_constructor_that_raises_says_so(start: Start, error: BaseException, is_async: bool) -> None:
    class Failing:
        def __init__(self) -> None:
            raise error

    class Sync(Failing):
        def __call__(self, request: Request) -> None: ...

    class Async(Failing):
        async def __call__(self, request: Request) -> None: ...

    with pytest.raises(BackendError) as caught:
        await start(Async if is_async else Sync)
    assert caught.value.type_name == type(error).__name__
    assert "raise error" in caught.value.traceback
    assert caught.value.traceback.count("  File ") == 1


async def test_a_user_config_is_given_at_the_start_and_when_it_changes(start: Start) -> None:
    replica = await start(Counter, config={"user_config": {"step": 3}})
    assert await replica.ask() == 3
    await replica.runner.reconfigure({"user_config": {"step": 4}, "max_concurrent_queries": 2})
    assert await replica.ask() == 7
    assert replica.runner.concurrency() == 2


async def test_a_user_config_that_is_the_same_is_not_given_again(start: Start) -> None:
    class Counting:
        given = 0

        async def reconfigure(self, user_config: Any) -> None:
            self.given += 1

        def __call__(self, request: Request) -> int:
            return self.given

    replica = await start(Counting, config={"user_config": {"step": 3}})
    await replica.runner.reconfigure({"user_config": {"step": 3}, "max_concurrent_queries": 2})
    assert await replica.ask() == 1
    await replica.runner.reconfigure({"user_config": None})
    assert await replica.ask() == 2


async def test_a_config_that_is_refused_leaves_the_old_one(start: Start) -> None:
    replica = await start(Counter, config={"user_config": {"step": 3}})
    with pytest.raises(BackendError, match="KeyError: 'step'"):
        await replica.runner.reconfigure({"user_config": {"stepp": 3}, "max_concurrent_queries": 2})
    assert replica.runner.concurrency() == 1
    assert replica.runner.config == {"user_config": {"step": 3}}
    assert await replica.ask() == 3


async def test_a_user_config_needs_a_reconfigure_method(start: Start) -> None:
    with pytest.raises(ConfigError, match="double has no method reconfigure to take it"):
        await start(double, config={"user_config": {}})


async def test_the_users_health_check_is_asked(start: Start) -> None:
    replica = await start(Counter)
    await replica.runner.check_health()
    await replica.runner.reconfigure({"user_config": {"step": -1}})
    with pytest.raises(BackendError, match="it runs backwards"):
        await replica.runner.check_health()
    await (await start(double)).runner.check_health()


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_health_check_that_takes_too_long_fails(start: Start, gate: Gate, is_async: bool) -> None:
    class Sync(Counter):
        def check_health(self) -> None:
            gate.wait()

    class Async:
        async def __call__(self, request: Request) -> None: ...

        async def check_health(self) -> None:
            await asyncio.sleep(3600)

    replica = await start(Async if is_async else Sync, config={"health_check_timeout_s": 0.05})
    with pytest.raises(BackendError, match=r"'b' took longer than 0.05 s"):
        await replica.runner.check_health()


async def test_a_long_request_is_not_a_failed_health_check(start: Start) -> None:
    class Slow(Counter):
        def __call__(self, request: Request) -> int:
            time.sleep(0.3)
            return 1

    replica = await start(Slow, config={"health_check_timeout_s": 0.1})
    entry = from_handle()
    replica.run(entry)
    await replica.runner.check_health()
    assert value_of(await replica.reply_to(entry)) == 1


async def test_code_can_ask_where_it_runs(start: Start) -> None:
    class Asking:
        def __init__(self) -> None:
            self.at_construction = [get_current_backend_tag(), get_current_replica_tag()]

        def __call__(self, request: Request) -> Any:
            of_a_thread: list[Any] = []
            thread = threading.Thread(target=lambda: of_a_thread.append(get_current_replica_tag()))
            thread.start()
            thread.join()
            return [*self.at_construction, get_current_backend_tag(), get_current_replica_tag(), *of_a_thread]

        async def on_loop(self, request: Request) -> Any:
            return [get_current_backend_tag(), get_current_replica_tag()]

    replica = await start(Asking)
    assert await replica.ask() == ["b", "b#1", "b", "b#1", "b#1"]
    assert await replica.ask(call="on_loop") == ["b", "b#1"]
    other = Replica(Runner("c", "c#1", dump(double), {}))
    await other.runner.start()
    assert await replica.ask() == ["b", "b#1", "b", "b#1", "c#1"]
    await other.runner.stop()


async def test_python_objects_pass_only_where_they_are_allowed(start: Start) -> None:
    def as_set(request: Request) -> set[Any]:
        return set(request.data)

    replica = await start(as_set)
    assert "allow_pickle" in backend_error_of(await replica.call(from_handle([1]))).message
    await replica.runner.reconfigure({"allow_pickle": True})
    assert (await replica.call(from_handle([1]))).codec == "pickle"


async def test_stopping_waits_for_what_runs(start: Start) -> None:
    class Slow:
        def __call__(self, request: Request) -> str:
            time.sleep(0.1)
            return "sync"

        async def on_loop(self, request: Request) -> str:
            await asyncio.sleep(0.1)
            return "async"

    replica = await start(Slow)
    first, second = from_handle(), from_handle(call="on_loop")
    replica.run(first)
    replica.run(second)
    assert await replica.runner.stop(10)
    assert {value_of(reply) for reply in replica.replies.values()} == {"sync", "async"}


async def test_what_outlasts_the_stopping_is_never_heard_of_again(start: Start, gate: Gate) -> None:
    hooks["stopped"] = lambda request: gate.wait()

    class Slow:
        def __call__(self, request: Request) -> None:
            call_hook(request)

        async def on_loop(self, request: Request) -> None:
            await asyncio.sleep(3600)

    replica = await start(Slow)
    replica.run(from_handle("stopped"))
    waiting = from_handle("stopped")
    replica.run(waiting)
    replica.run(from_handle(call="on_loop"))
    await asyncio.sleep(0.01)
    began_at = time.monotonic()
    assert not await replica.runner.stop(0.05)
    assert time.monotonic() - began_at < 5
    gate.open()
    await asyncio.sleep(0.05)
    assert replica.replies == {}


async def test_stopping_ends_the_threads(start: Start) -> None:
    before = threading.active_count()
    replica = await start(double, config={"max_concurrent_queries": 4})
    for n in range(20):
        replica.run(from_handle(n))
    assert await replica.runner.stop(10)
    assert len(replica.replies) == 20
    assert threading.active_count() <= before


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


calls = st.sampled_from(["__call__", "alone", "on_loop", "nope", "_x"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(calls, min_size=1, max_size=5), st.integers(0, 3)), max_size=12))
def test_every_request_gets_exactly_one_answer_whatever_is_cancelled_when(
    steps: list[tuple[list[str], int]],
) -> None:
    async def scenario() -> None:
        replica = Replica(Runner("b", "b#1", dump(Mixed), {}))
        await replica.runner.start()
        given: list[Entry] = []
        for step, cancelled in steps:
            entries = [from_handle(call=call) for call in step]
            given += entries
            running = replica.run(*entries)
            if cancelled == 1:
                await asyncio.sleep(0)
            for entry in entries[:cancelled]:
                running.cancel(entry.id)
        assert await replica.runner.stop(10)
        await asyncio.sleep(0)
        assert set(replica.replies) == {entry.id for entry in given}

    asyncio.run(scenario())


def log_lines_are_about(request: Any) -> str:
    return request_ids()


async def log_lines_are_about_async(request: Any) -> str:
    await asyncio.sleep(0)
    return request_ids()


@accept_batch
def log_lines_of_each_are_about(requests: Sequence[Request]) -> list[str]:
    return [request_ids()] * len(requests)


@pytest.mark.parametrize("function", [log_lines_are_about, log_lines_are_about_async])
async def test_log_lines_have_the_id_of_their_request(start: Start, function: object) -> None:
    replica = await start(function)
    entries = [from_http(request_id=f"r{n}") for n in range(3)]
    for entry in entries:
        replica.run(entry)
    assert [value_of(await replica.reply_to(entry)) for entry in entries] == ["r0", "r1", "r2"]
    call = from_handle(None)
    assert value_of(await replica.call(call)) == call.id


async def test_those_of_a_batch_have_all_of_theirs(start: Start) -> None:
    replica = await start(log_lines_of_each_are_about)
    entries = [from_http(request_id=f"r{n}") for n in range(3)]
    replica.run(*entries)
    assert value_of(await replica.reply_to(entries[0])) == "r0,r1,r2"


async def test_what_runs_for_no_request_logs_of_none(start: Start) -> None:
    class Checked:
        about = ""

        def __call__(self, request: Request) -> str:
            return self.about

        def check_health(self) -> None:
            self.about = request_ids()

    replica = await start(Checked)
    assert await replica.ask() == ""
    await replica.runner.check_health()  # on the thread of the request before
    assert await replica.ask() == "-"
