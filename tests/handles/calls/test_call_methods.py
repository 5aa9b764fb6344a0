"""Endpoints that offer only some methods of their backend's class."""

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


def test_a_sync_handle_cannot_call_a_method_that_is_not_offered(url: str) -> None:
    with handles.connect(url, INSTANCE) as connection:
        with pytest.raises(CallMethodRefused, match=REFUSED):
            connection.get_handle("ask").remote().result(timeout=30)
        offered = connection.get_handle("ask").options(method_name="predict").remote()
        assert offered.cancel()


async def test_an_asyncio_handle_cannot_call_a_method_that_is_not_offered(url: str) -> None:
    handle = handles.AsyncServeHandle(url, INSTANCE, "ask")
    with pytest.raises(CallMethodRefused, match=REFUSED):
        await handle.remote()
    offered: asyncio.Future[Any] = await handle.options(method_name="predict").remote()
    assert offered.cancel()


def test_a_batch_item_cannot_call_a_method_that_is_not_offered(url: str) -> None:
    with handles.connect(url, INSTANCE) as connection:
        (result,) = connection.batch("ask").map([1])
        assert isinstance(result.error, CallMethodRefused)


def test_offered_methods_are_listed_only_where_they_are_restricted(url: str, site: Site) -> None:
    site.declare("any", tag="other")
    with handles.connect(url, INSTANCE) as connection:
        listed = connection.list_endpoints()
    assert listed["ask"]["call_methods"] == ["predict"]
    assert "call_methods" not in listed["any"]
