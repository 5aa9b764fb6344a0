"""One call of the user's code for several requests."""

from typing import Any

import pytest

from penstock.workers import Request, accept_batch
from tests.workers.requests import backend_error_of, from_handle, value_of
from tests.workers.running import Mixed, Start, double, double_each, double_each_async


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


async def test_a_batch_is_split_by_the_methods_that_it_is_for(start: Start) -> None:
    replica = await start(Mixed)
    calls = ["__call__", "alone", "on_loop", "__call__", "nope", "on_loop", "alone"]
    entries = [from_handle(call=call) for call in calls]
    replica.run(*entries)
    replies = [await replica.reply_to(entry) for entry in entries]
    assert [reply.status for reply in replies] == [200, 200, 200, 200, 404, 200, 200]
    assert [value_of(r) for r in replies if not r.error] == [2, "alone", 20, 2, 20, "alone"]
