"""Loading user code in a replica, and calling its methods."""

from typing import Any

import pytest

from penstock.handles.errors import BackendError
from penstock.workers.executing.request import Request
from tests.workers.requests import backend_error_of, from_http
from tests.workers.running import Counter, Gate, Start, double


async def test_a_backend_can_be_named_by_an_import_path(start: Start) -> None:
    assert await (await start("tests.workers.running:double")).ask(2) == 4
    assert await (await start("tests.workers.running:Counter", 5)).ask() == 6


async def test_a_class_is_constructed_once_and_its_methods_can_be_called(start: Start) -> None:
    replica = await start(Counter, 10, step=5)
    assert await replica.ask() == 15
    assert await replica.ask() == 20
    assert await replica.ask(call="peek") == 20
    assert await replica.ask(call="static") == "static"


@pytest.mark.parametrize("call", ["nope", "limit", "Inner", "model", "secret", "", "a.b", "\ud7ff"])
async def test_an_unknown_method_is_a_404_that_lists_the_methods(start: Start, call: str) -> None:
    reply = await (await start(Counter)).call(from_http(call=call))
    assert reply.status == 404
    error = backend_error_of(reply)
    assert error.type_name == "AttributeError"
    assert "'__call__', 'peek', 'static'" in error.message
    assert repr(call) in error.message


@pytest.mark.parametrize("call", ["_private", "__init__", "__class__", "__reduce__", "reconfigure", "check_health"])
async def test_a_method_that_callers_may_not_call_is_refused(start: Start, call: str) -> None:
    reply = await (await start(Counter)).call(from_http(call=call))
    assert reply.status == 400
    assert repr(call) in backend_error_of(reply).message


async def test_a_function_has_no_methods(start: Start) -> None:
    reply = await (await start(double)).call(from_http(call="mro"))
    assert reply.status == 404
    assert "double" in backend_error_of(reply).message


class Unpicklable:
    def __reduce__(self) -> Any:
        return fail_to_load, ()


def fail_to_load() -> None:
    raise ImportError("no module named 'missing'")


@pytest.mark.parametrize(
    ("target", "args", "said"),
    [
        ("no_such_module_:f", (), "ModuleNotFoundError: No module named 'no_such_module_'"),
        ("tests.workers.running:nope", (), "AttributeError"),
        ("tests.workers.running", (), "'module:Name'"),
        ("tests.workers.running:hooks", (), "a backend is a function or a class, not a dict"),
        (Counter, (1, 2, 3), "TypeError"),
        (Counter, (Unpicklable(),), "no module named 'missing'"),
        (Gate, ("x",), "the class Gate has no __call__ method"),
        (double, (1,), "double is not a class"),
    ],
)
async def test_code_that_cannot_be_loaded_raises_the_reason(start: Start, target: Any, args: Any, said: str) -> None:
    with pytest.raises(BackendError) as caught:
        await start(target, *args)
    assert said in str(caught.value)


@pytest.mark.parametrize("error", [ValueError("no weights"), SystemExit(1), StopIteration(), KeyboardInterrupt()])
@pytest.mark.parametrize("is_async", [False, True])
async def test_the_error_of_a_constructor_is_raised(start: Start, error: BaseException, is_async: bool) -> None:
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
