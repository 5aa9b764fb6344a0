"""Sync and asyncio handles with a real replica."""

import asyncio
import concurrent.futures
import time
from collections.abc import Callable
from typing import Any, cast

import pytest
from starlette.responses import JSONResponse

from penstock import handles
from penstock.broker.wire._fields import LARGE
from penstock.handles import AsyncServeHandle, ServeHandle
from penstock.handles.calls.shared_client import SharedClient
from penstock.handles.connection import Connection
from penstock.handles.errors import (
    BackendError,
    BackendNotFound,
    BrokerUnavailable,
    ConfigError,
    EndpointNotFound,
    Overloaded,
    PayloadTooLarge,
    RequestTimeout,
)
from penstock.handles.replies.response import Response
from tests.handles.site import INSTANCE, Site, close_here, describe, echo, in_loop
from tests.support.waiting import wait_until


def fail(request: Any) -> None:
    raise ValueError("on purpose")


def answering(value: object) -> Callable[[Any], object]:
    def answer(request: Any) -> object:
        return value

    return answer


class Counter:
    """A backend with more than one method."""

    def __call__(self, request: Any) -> str:
        return "called"

    def count(self, request: Any) -> int:
        return len(request.data)


def refused_everywhere(connected: Connection, error: type[Exception]) -> None:
    """Check that a call of a sync and of an asyncio handle fails in the same way."""
    handle = ServeHandle(connected.redis_url, INSTANCE, "ask")
    with pytest.raises(error):
        handle.remote().result(10)

    async def ask() -> None:
        with pytest.raises(error):
            await (await in_loop(handle).remote())
        await close_here(handle)

    asyncio.run(ask())


# -- calls, on every kind of broker


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
    await (await SharedClient.get(any_site.url, INSTANCE)).close()


async def test_a_request_is_on_its_stream_when_remote_returns(site: Site) -> None:
    site.declare()
    handle = AsyncServeHandle(site.url, INSTANCE, "ask")
    futures = [await handle.remote(n) for n in range(5)]
    assert site.depth() == 5
    assert not any(future.done() for future in futures)
    await asyncio.to_thread(site.serve, echo)
    assert await asyncio.gather(*futures) == list(range(5))
    await (await SharedClient.get(site.url, INSTANCE)).close()


# -- arguments and results


@pytest.mark.parametrize(
    "value", [None, "tëxt", b"\x00\xff", {"a": [1, 2.5, None]}, 0, "", [], bytes(LARGE + 1)], ids=repr
)
def test_values_arrive_unchanged(site: Site, connected: Connection, value: Any) -> None:
    site.serve(echo)
    answer = connected.get_handle("ask").remote(value).result(10)
    assert (type(answer), answer) == (type(value), value)
    wait_until(lambda: site.depth() == 0 and not site.keys_left())


def test_a_request_has_all_options_of_its_handle(site: Site, connected: Connection) -> None:
    site.serve(describe)
    handle = connected.get_handle("ask").options(http_method="put", http_headers={"X-Test": "yes"})
    assert handle.remote([1], q=1, deep={"list": [1, None]}, self="me").result(10) == {
        "data": [1],
        "query": {"q": 1, "deep": {"list": [1, None]}, "self": "me"},
        "method": "PUT",
        "x": "yes",
    }


def test_arguments_can_be_changed_after_the_call(site: Site, connected: Connection) -> None:
    site.serve(describe)
    handle = connected.get_handle("ask")
    body, query = ["before"], ["before"]
    future = handle.remote(body, q=query)
    body.append("after")
    query.append("after")
    answer = future.result(10)
    assert (answer["data"], answer["query"]["q"]) == (["before"], ["before"])


def test_a_handle_can_call_another_method(site: Site, connected: Connection) -> None:
    site.serve(Counter)
    handle = connected.get_handle("ask")
    assert handle.remote(b"123").result(10) == "called"
    assert handle.options(method_name="count").remote(b"123").result(10) == 3
    with pytest.raises(ConfigError, match="private"):
        handle.options(method_name="__init__")


def test_a_shard_key_always_selects_the_same_backend(site: Site, connected: Connection) -> None:
    for tag in ("one", "two"):
        site.serve(answering(tag), tag=tag)
    site.send_traffic("ask", {"one": 0.5, "two": 0.5})
    handle = connected.get_handle("ask")
    wait_until(lambda: {handle.remote().result(10) for _ in range(8)} == {"one", "two"})
    for key in ("a", "b", "c"):
        assert len({handle.options(shard_key=key).remote().result(10) for _ in range(10)}) == 1


def test_a_response_arrives_as_a_response(site: Site, connected: Connection) -> None:
    site.serve(answering(JSONResponse({"a": 1}, 201, {"X-More": "yes"})))
    response = connected.get_handle("ask").remote().result(10)
    assert isinstance(response, Response)
    assert (response.status_code, response.json(), response.headers["x-more"]) == (201, {"a": 1}, "yes")


def test_python_values_arrive_only_where_the_backend_allows_pickle(site: Site, connected: Connection) -> None:
    site.serve(echo, allow_pickle=True)
    assert connected.get_handle("ask").remote({1, 2, 3}).result(10) == {1, 2, 3}
    site.declare("strict", tag="strict")
    with pytest.raises(TypeError, match=r"a set cannot be sent.*backend 'strict' would take it pickled"):
        connected.get_handle("strict").remote({1, 2}).result(10)


def test_arguments_that_cannot_be_sent_raise_in_remote(site: Site, connected: Connection) -> None:
    site.declare()
    handle = connected.get_handle("ask")
    with pytest.raises(TypeError, match="the keyword arguments must be JSON values"):
        handle.remote(q={1, 2})
    with pytest.raises(TypeError, match="one positional argument"):
        handle.remote(1, 2)
    for name in ("sync", "missing_ok"):
        with pytest.raises(TypeError, match=f"{name} must be a bool, not str"):
            connected.get_handle("ask", **cast(Any, {name: "no"}))


SMALL_LIMIT = LARGE + 1000


@pytest.fixture
def small_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small limit in place of Redis's 512 MiB, so that a test need not allocate as much."""
    monkeypatch.setattr("penstock.handles.calls.large_bodies.LARGEST", SMALL_LIMIT)


@pytest.mark.usefixtures("small_redis")
def test_a_body_that_is_too_long_for_redis_is_refused(site: Site, connected: Connection) -> None:
    """If it were sent, Redis would close the connection that all handles share."""
    site.serve(echo)
    ask, said = (
        connected.get_handle("ask"),
        rf"{SMALL_LIMIT + 1} bytes or more \(proto-max-bulk-len of Redis is {SMALL_LIMIT}\)",
    )
    beside = ask.remote(bytes(SMALL_LIMIT))
    with pytest.raises(PayloadTooLarge, match=said):
        ask.remote(bytes(SMALL_LIMIT + 1)).result(timeout=10)
    with pytest.raises(PayloadTooLarge, match=said):
        next(iter(cast(Any, ask.options(stream=True).remote(bytes(SMALL_LIMIT + 1)))))
    (small, large) = connected.batch("ask").map([b"1", bytes(SMALL_LIMIT + 1)])
    assert small.get() == b"1"
    with pytest.raises(PayloadTooLarge, match=said):
        large.get()
    assert beside.result(timeout=10) == bytes(SMALL_LIMIT)
    wait_until(lambda: site.depth() == 0)


@pytest.mark.usefixtures("small_redis")
async def test_an_asyncio_handle_refuses_it_before_sending(site: Site) -> None:
    site.declare()
    with pytest.raises(PayloadTooLarge, match=f"{SMALL_LIMIT + 1} bytes or more"):
        await AsyncServeHandle(site.url, INSTANCE, "ask").remote(bytes(SMALL_LIMIT + 1))
    assert site.depth() == 0


@pytest.mark.usefixtures("small_redis")
def test_a_reply_that_is_too_long_for_redis_is_an_error_of_the_backend(site: Site, connected: Connection) -> None:
    site.serve(answering(bytes(SMALL_LIMIT + 1)))
    with pytest.raises(BackendError, match=f"PayloadTooLarge: the body has {SMALL_LIMIT + 1} bytes or more"):
        connected.get_handle("ask").remote().result(timeout=10)


def test_an_exception_of_the_backend_is_raised_by_the_future(site: Site, connected: Connection) -> None:
    site.serve(fail)
    with pytest.raises(BackendError, match="ValueError: on purpose") as caught:
        connected.get_handle("ask").remote().result(10)
    assert (caught.value.type_name, caught.value.message) == ("ValueError", "on purpose")


# -- refusals


def test_an_unknown_endpoint_is_refused_by_name(site: Site, connected: Connection) -> None:
    site.declare("other")
    with pytest.raises(EndpointNotFound, match="no endpoint 'ask'; this instance has 'other'"):
        connected.get_handle("ask")
    refused_everywhere(connected, EndpointNotFound)


def test_an_endpoint_whose_backend_is_gone_is_refused(site: Site, connected: Connection) -> None:
    site.send_traffic("ask", {"gone": 1.0})
    refused_everywhere(connected, BackendNotFound)


def test_a_full_queue_is_an_error_of_the_future(site: Site, connected: Connection) -> None:
    site.declare(max_queued_requests=0)
    refused_everywhere(connected, Overloaded)


@pytest.mark.slow
def test_a_missing_broker_is_an_error_that_does_not_show_the_password() -> None:
    with pytest.raises(BrokerUnavailable) as caught:
        handles.connect("redis://:geheim@127.0.0.1:1")
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("timeout_s", [0.2, 1.0])
def test_a_deadline_holds_while_connecting(timeout_s: float) -> None:
    handle = ServeHandle("redis://127.0.0.1:1", INSTANCE, "ask").options(timeout_s=timeout_s)
    started_at = time.monotonic()
    with pytest.raises(RequestTimeout):
        handle.remote().result(10)
    # Without a deadline the connection attempt takes 5 s.
    assert timeout_s - 0.05 < time.monotonic() - started_at < timeout_s + 3.5


def test_a_request_without_any_replica_times_out_on_time(site: Site, connected: Connection) -> None:
    site.declare()
    handle = connected.get_handle("ask").options(timeout_s=0.3)
    started_at = time.monotonic()
    with pytest.raises(RequestTimeout, match="did not answer within"):
        handle.remote().result(10)
    assert 0.29 < time.monotonic() - started_at < 5
    wait_until(lambda: site.depth() == 0)


def test_a_wrong_url_or_name_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="http://x"):
        handles.connect("http://x")
    with pytest.raises(ConfigError, match="an instance 'a b'"):
        handles.connect("redis://127.0.0.1:1", "a b")
    with pytest.raises(ConfigError, match="an endpoint"):
        ServeHandle("redis://127.0.0.1:1", INSTANCE, "a b")


# -- endpoints that are created later


def test_a_missing_ok_handle_waits_for_its_endpoint(site: Site, connected: Connection) -> None:
    future = connected.get_handle("ask", missing_ok=True).remote("early")
    site.serve(echo)
    assert future.result(10) == "early"


def test_a_missing_ok_handle_waits_until_the_deadline(site: Site, connected: Connection) -> None:
    handle = connected.get_handle("ask", missing_ok=True).options(timeout_s=0.2)
    started_at = time.monotonic()
    with pytest.raises(EndpointNotFound):
        handle.remote().result(10)
    assert 0.19 < time.monotonic() - started_at < 5


def test_waiting_for_an_endpoint_can_be_cancelled(site: Site, connected: Connection) -> None:
    future = connected.get_handle("ask", missing_ok=True).remote("never")
    assert future.cancel()
    assert concurrent.futures.wait([future], timeout=5).not_done == set()
    site.serve(echo)
    assert site.depth() == 0
