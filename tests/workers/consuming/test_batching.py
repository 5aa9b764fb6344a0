"""One call of user code for several requests."""

import importlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from penstock.workers.executing.accept_batch import accept_batch, accepts_batch
from penstock.workers.executing.request import Request
from penstock.workers.executing.user_code import LoadedCode, dump
from tests.workers.requests import backend_error_of, from_handle, value_of
from tests.workers.running import Mixed, Start, double, double_each, double_each_async


@pytest.mark.parametrize("function", [double_each, double_each_async])
async def test_a_batch_is_one_call(start: Start, function: object) -> None:
    replica = await start(function)
    assert replica.runner.accepts_batch
    entries = [from_handle(n) for n in range(5)]
    replica.run(*entries)
    assert [value_of(await replica.reply_to(entry)) for entry in entries] == [0, 2, 4, 6, 8]


async def test_code_without_accept_batch_gets_one_request_per_call(start: Start) -> None:
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
async def test_a_batch_that_fails_fails_all_its_requests(start: Start, what: str, said: str) -> None:
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
async def test_a_batch_may_return_a_tuple_or_an_array(start: Start, what: str, values: list[Any]) -> None:
    replica = await start(misbehave)
    entries = [from_handle(what), from_handle("ok")]
    replica.run(*entries)
    assert [value_of(await replica.reply_to(entry)) for entry in entries] == values


async def test_a_batch_is_split_by_method(start: Start) -> None:
    replica = await start(Mixed)
    calls = ["__call__", "alone", "on_loop", "__call__", "nope", "on_loop", "alone"]
    entries = [from_handle(call=call) for call in calls]
    replica.run(*entries)
    replies = [await replica.reply_to(entry) for entry in entries]
    assert [reply.status for reply in replies] == [200, 200, 200, 200, 404, 200, 200]
    assert [value_of(r) for r in replies if not r.error] == [2, "alone", 20, 2, 20, "alone"]


SHARED = """
def sums(requests):
    return [len(requests)] * len(requests)

class Model:
    def __call__(self, requests): ...
    def more(self, requests): ...
    def alone(self, request): ...
    @staticmethod
    def still(requests): ...
"""
"""A module without Penstock that replicas import themselves: its code is pickled by name."""


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "shared_code_.py").write_text(SHARED)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("shared_code_")
    sys.modules.pop("shared_code_")


def loaded_elsewhere(target: Any) -> LoadedCode:
    blob = dump(target)
    assert len(blob) < 300, "it is not pickled by its name"
    del sys.modules["shared_code_"]
    return LoadedCode.load(blob)


def test_a_function_decorated_where_it_is_deployed_takes_batches(shared: Any) -> None:
    code = loaded_elsewhere(accept_batch(shared.sums))
    assert code.target is not shared.sums
    assert code.construct().call.accepts_batch


@pytest.mark.parametrize("within", [False, True])
def test_a_partial_of_a_decorated_function_takes_batches(shared: Any, within: bool) -> None:
    whole = partial(accept_batch(shared.sums)) if within else accept_batch(partial(shared.sums))
    assert accepts_batch(whole)
    assert loaded_elsewhere(whole).construct().call.accepts_batch


def test_only_the_decorated_methods_of_a_class_take_batches(shared: Any) -> None:
    for name in ("__call__", "more", "still"):
        accept_batch(getattr(shared.Model, name))
    target = loaded_elsewhere(shared.Model).construct()
    taking = {name: target.method(name).accepts_batch for name in ("__call__", "more", "still", "alone")}
    assert taking == {"__call__": True, "more": True, "still": True, "alone": False}


def test_an_object_that_cannot_be_marked_is_refused() -> None:
    for function in (len, Mixed().alone):
        with pytest.raises(TypeError, match="accept_batch cannot mark"):
            accept_batch(function)
