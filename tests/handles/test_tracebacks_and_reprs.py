"""Output in a REPL: tracebacks that end in their own line, and objects that describe themselves."""

from collections.abc import Callable
from typing import Any, cast

import pytest

from penstock import handles
from penstock.handles import AsyncServeHandle, Response, ServeHandle
from penstock.handles.connection import Connection
from penstock.handles.errors import ConfigError, EndpointNotFound
from tests.handles.site import INSTANCE, Site, echo
from tests.support.frames import frames_below
from tests.support.notebooks import shown_in_notebook

_MISTAKES: dict[str, tuple[type[Exception], Callable[[Connection], object]]] = {
    "an unknown endpoint": (EndpointNotFound, lambda connected: connected.get_handle("aks")),
    "an unknown endpoint of a batch": (EndpointNotFound, lambda connected: connected.batch("aks")),
    "an argument of get_handle": (TypeError, lambda connected: cast(Any, connected).get_handle("ask", sync=1)),
    "an option's name": (TypeError, lambda connected: cast(Any, ServeHandle("", "i", "ask")).options(timeout=3)),
    "an option": (ConfigError, lambda connected: ServeHandle("", "i", "ask").options(timeout_s=-1)),
    "an option's type": (TypeError, lambda connected: cast(Any, ServeHandle("", "i", "ask")).options(method_name=3)),
    "two bodies": (TypeError, lambda connected: ServeHandle("", "i", "ask").remote(1, 2)),
    "a query": (TypeError, lambda connected: ServeHandle("", "i", "ask").remote(q=object())),
    "an id of a dead letter": (ConfigError, lambda connected: connected.dead_letters("model").get("x")),
    "a URL": (ConfigError, lambda connected: handles.connect("http://example.org")),
}


@pytest.mark.parametrize("case", _MISTAKES)
def test_an_error_shows_the_users_line_and_at_most_two_frames_of_the_library(
    site: Site, connected: Connection, case: str
) -> None:
    site.declare()
    error, call = _MISTAKES[case]
    with pytest.raises(error) as raised:
        call(connected)
    assert frames_below(__file__, raised.value) <= 2


def test_a_handle_shows_the_options_that_were_set_and_no_header_value() -> None:
    handle = ServeHandle("redis://:secret@broker", "shop", "ask")
    assert repr(handle) == "ServeHandle('ask', instance='shop')"
    assert repr(handle.options(timeout_s=2, shard_key="k")) == (
        "ServeHandle('ask', instance='shop', shard_key='k', timeout_s=2)"
    )
    shown = repr(handle.options(http_headers={"Authorization": "secret"}))
    assert shown == "ServeHandle('ask', instance='shop', http_headers=<Authorization>)"
    assert repr(handle.options(stream=True)) == "StreamingHandle('ask', instance='shop', stream=True)"


def test_a_connection_and_what_it_makes_describe_themselves(site: Site, connected: Connection) -> None:
    site.declare()
    assert repr(connected) == f"Connection({site.url!r}, instance={INSTANCE!r})"
    assert repr(Connection("redis://:secret@broker:6379", "shop")) == (
        "Connection('redis://broker:6379', instance='shop')"
    )
    assert repr(connected.dead_letters("model")) == f"DeadLetters('model', instance={INSTANCE!r})"
    producer = connected.batch("ask", window=10, job="nightly", timeout_s=5)
    assert repr(producer) == f"BatchProducer('ask', instance={INSTANCE!r}, timeout_s=5, window=10, job='nightly')"
    batch = connected.batch("ask").map([])
    assert repr(batch) == "Batch('ask', in_order=True)"
    assert list(batch) == []
    assert repr(batch) == "Batch('ask', in_order=True, iterated)"


def test_a_notebook_shows_tables_without_secrets(site: Site, connected: Connection) -> None:
    site.serve(echo)
    handle = ServeHandle("redis://:secret@broker", "shop", "ask").options(
        timeout_s=2, http_headers={"Authorization": "secret"}
    )
    assert shown_in_notebook(handle) == [
        ["ServeHandle"],
        ["endpoint", "ask"],
        ["instance", "shop"],
        ["http_headers", "<Authorization>"],
        ["timeout_s", "2"],
    ]
    assert shown_in_notebook(Connection("redis://:secret@broker:6379", "shop")) == [
        ["Connection"],
        ["redis_url", "redis://broker:6379"],
        ["instance", "shop"],
    ]
    producer = connected.batch("ask", job="nightly")
    assert shown_in_notebook(producer)[1:] == [["endpoint", "ask"], ["instance", INSTANCE], ["job", "'nightly'"]]
    batch = producer.map([])
    assert shown_in_notebook(batch)[1:] == [["endpoint", "ask"], ["in_order", "True"], ["iterated", "False"]]
    letters = connected.dead_letters("model")
    assert shown_in_notebook(letters) == [["DeadLetters"], ["backend", "model"], ["instance", INSTANCE]]
    stream = connected.get_handle("ask").options(stream=True).remote(1)
    assert list(stream) == [1]
    assert shown_in_notebook(stream) == [["ResponseStream"], ["endpoint", "ask"], ["state", "closed"]]
    submitted = connected.get_handle("ask").submit(1)
    assert submitted.result(timeout=20) == 1
    assert shown_in_notebook(submitted)[1] == ["id", f"{submitted.id[:6]}…"]
    assert submitted.id not in str(shown_in_notebook(submitted))
    response = Response(200, {"a": "<b>"}, b"short", [("A", "<b>")])
    assert shown_in_notebook(response)[1:] == [
        ["status_code", "200"],
        ["headers", "{'a': '<b>'}"],
        ["body", "b'short'"],
    ]


def test_a_response_shows_the_beginning_of_a_long_body() -> None:
    assert repr(Response(200, {"a": "b"}, b"short", [("A", "b")])) == (
        "Response(status_code=200, headers={'a': 'b'}, body=b'short')"
    )
    long = repr(Response(200, {}, bytes(1_000_000), []))
    assert "<1,000,000 bytes, b'" in long
    assert len(long) < 400


def test_a_stream_shows_whether_it_is_open(site: Site, connected: Connection) -> None:
    site.serve(echo)
    stream = connected.get_handle("ask").options(stream=True).remote(1)
    assert repr(stream) == "<ResponseStream of endpoint 'ask', open>"
    assert list(stream) == [1]
    assert repr(stream) == "<ResponseStream of endpoint 'ask', closed>"


async def test_an_asyncio_stream_shows_whether_it_is_open(site: Site) -> None:
    site.serve(echo)
    stream = await AsyncServeHandle(site.url, INSTANCE, "ask").options(stream=True).remote(1)
    assert repr(stream) == "<AsyncResponseStream of endpoint 'ask', open>"
    assert [value async for value in stream] == [1]
    assert repr(stream) == "<AsyncResponseStream of endpoint 'ask', closed>"


def test_the_class_of_a_handle_follows_its_options() -> None:
    for plain, streaming, ref in (
        (handles.ServeHandle, handles.StreamingHandle, handles.ObjectRefHandle),
        (handles.AsyncServeHandle, handles.AsyncStreamingHandle, handles.AsyncObjectRefHandle),
    ):
        handle: Any = plain("redis://broker", "i", "ask")
        assert type(handle.options(stream=True)) is streaming
        assert type(handle.options(stream=True).options(timeout_s=1)) is streaming
        assert type(handle.options(stream=True).options(stream=False)) is plain
        assert type(handle.options(return_type="object_ref")) is ref
        assert type(handle.options(return_type="object_ref").options(return_type="future")) is plain
