"""Endpoints that offer some methods of their backend's class, and no others."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from penstock import handles
from penstock.handles.errors import CallMethodRefused
from tests.handles.site import INSTANCE, Site

REFUSED = "endpoint 'ask' offers the methods 'predict', not '__call__'"


@pytest.fixture
def url(site: Site) -> str:
    site.declare()
    site.offer("ask", "model", ("predict",))
    return site.url


def test_a_sync_handle_is_refused_a_method_that_is_not_offered(url: str) -> None:
    with handles.connect(url, INSTANCE) as door:
        with pytest.raises(CallMethodRefused, match=REFUSED):
            door.get_handle("ask").remote().result(timeout=30)
        offered = door.get_handle("ask").options(method_name="predict").remote()
        assert offered.cancel()


async def test_an_asyncio_handle_is_refused_it_when_it_calls(url: str) -> None:
    handle = handles.AsyncServeHandle(url, INSTANCE, "ask")
    with pytest.raises(CallMethodRefused, match=REFUSED):
        await handle.remote()
    offered: asyncio.Future[Any] = await handle.options(method_name="predict").remote()
    assert offered.cancel()


def test_so_is_each_item_of_a_batch(url: str) -> None:
    with handles.connect(url, INSTANCE) as door:
        (result,) = door.batch("ask").map([1])
        assert isinstance(result.error, CallMethodRefused)


def test_what_is_offered_is_listed_where_it_is_restricted(url: str, site: Site) -> None:
    site.declare("any", tag="other")
    with handles.connect(url, INSTANCE) as door:
        listed = door.list_endpoints()
    assert listed["ask"]["call_methods"] == ["predict"]
    assert "call_methods" not in listed["any"]
