"""Blocking calls on the background loop, where the callbacks of sync handles' futures run."""

import concurrent.futures
from collections.abc import Callable
from typing import Any, cast

import pytest

from penstock import handles
from penstock.handles import ServeHandle, background_loop
from penstock.handles.connection import Connection
from tests.handles.site import INSTANCE, Site, echo

Attempt = Callable[[ServeHandle, Connection], object]

WAITS: dict[str, Attempt] = {
    "result": lambda handle, connected: handle.remote(2).result(),
    "result with a timeout": lambda handle, connected: handle.remote(2).result(60),
    "exception": lambda handle, connected: handle.remote(2).exception(),
    "wait": lambda handle, connected: concurrent.futures.wait([handle.remote(2)]),
    "as_completed": lambda handle, connected: list(concurrent.futures.as_completed([handle.remote(2)])),
    "stream": lambda handle, connected: list(cast(Any, handle.options(stream=True).remote(2))),
    "batch": lambda handle, connected: list(connected.batch("ask").map([2])),
    "get_handle": lambda handle, connected: connected.get_handle("ask"),
    "list_endpoints": lambda handle, connected: connected.list_endpoints(),
    "dead letters": lambda handle, connected: len(connected.dead_letters("model")),
    "connect": lambda handle, connected: handles.connect(connected.redis_url, INSTANCE),
}


def in_a_callback(connected: Connection, attempt: Attempt) -> Any:
    """Return what ``attempt`` returns in the callback of a future. Raises what it raises."""
    outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()
    handle = connected.get_handle("ask")

    def call_back(first: "concurrent.futures.Future[Any]") -> None:
        try:
            outcome.set_result(attempt(handle, connected))
        except BaseException as e:
            outcome.set_exception(e)

    # Called on the loop, so that the future cannot be done before it has the callback.
    background_loop.soon(lambda: handle.remote(1).add_done_callback(call_back))
    return outcome.result(20)


@pytest.mark.parametrize("how", WAITS)
def test_a_blocking_call_on_the_background_loop_raises_at_once(site: Site, connected: Connection, how: str) -> None:
    site.serve(echo)
    with pytest.raises(RuntimeError, match="cannot be waited for on its own event loop, such as in a callback"):
        in_a_callback(connected, WAITS[how])
    assert connected.get_handle("ask").remote("the loop still answers").result(20) == "the loop still answers"


def test_a_finished_future_can_be_read_on_the_background_loop(site: Site, connected: Connection) -> None:
    site.serve(echo)
    done = connected.get_handle("ask").remote("there")
    assert done.result(20) == "there"
    assert in_a_callback(connected, lambda _, __: done.result()) == "there"
    assert in_a_callback(connected, lambda _, __: done.exception()) is None
    assert in_a_callback(connected, lambda _, __: list(concurrent.futures.as_completed([done]))) == [done]
    assert in_a_callback(connected, lambda _, __: concurrent.futures.wait([done]).done) == {done}


def test_a_read_with_timeout_zero_is_allowed_on_the_background_loop(site: Site, connected: Connection) -> None:
    site.serve(echo)
    futures: list[concurrent.futures.Future[Any]] = []

    def read_at_once(handle: ServeHandle, connected: Connection) -> Any:
        futures.append(handle.remote(2))
        return futures[0].result(0)

    with pytest.raises(concurrent.futures.TimeoutError):
        in_a_callback(connected, read_at_once)
    assert futures[0].result(20) == 2


def test_a_future_that_is_cancelled_on_the_background_loop_is_done_one_turn_later(
    site: Site, connected: Connection
) -> None:
    site.serve(echo)
    cancelled: list[concurrent.futures.Future[Any]] = []

    def cancel_and_wait(handle: ServeHandle, connected: Connection) -> None:
        future = handle.remote(2)
        assert future.cancel()
        cancelled.append(future)
        with pytest.raises(concurrent.futures.CancelledError):
            future.result()
        concurrent.futures.wait([future])

    with pytest.raises(RuntimeError, match="its own event loop"):
        in_a_callback(connected, cancel_and_wait)
    done, _ = concurrent.futures.wait(cancelled, 20)
    assert done == set(cancelled)
    assert in_a_callback(connected, lambda _, __: concurrent.futures.wait(cancelled).done) == done


def test_other_threads_can_wait(site: Site, connected: Connection) -> None:
    site.serve(echo)
    handle = connected.get_handle("ask")
    futures = [handle.remote(n) for n in range(20)]
    assert sorted(future.result() for future in concurrent.futures.as_completed(futures, 20)) == list(range(20))
    done, late = concurrent.futures.wait([handle.remote(n) for n in range(20)], 20)
    assert (len(done), len(late)) == (20, 0)
