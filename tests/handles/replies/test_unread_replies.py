"""Replies that nothing reads: the second ``await`` was forgotten."""

import asyncio
import gc
import itertools
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from penstock.handles import AsyncServeHandle
from penstock.handles.errors import EndpointNotFound
from penstock.handles.replies import futures
from tests.handles.site import INSTANCE, Site, echo

Call = Callable[[AsyncServeHandle], Awaitable[object]]


async def warnings_of(site: Site, monkeypatch: pytest.MonkeyPatch, call: Call, times: int = 1) -> list[str]:
    """Return the warnings of calls whose futures are dropped, in a process that has not warned yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()  # futures of other tests
    monkeypatch.setattr(futures, "_has_warned", False)
    monkeypatch.setattr(futures, "_numbers", itertools.count())
    handle = AsyncServeHandle(site.url, INSTANCE, "ask")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            await call(handle)
            gc.collect()
    return [str(warning.message) for warning in caught if warning.category is RuntimeWarning]


async def test_a_forgotten_second_await_warns_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.serve(echo)

    async def forget(handle: AsyncServeHandle) -> None:
        await handle.remote(1)
        await (await handle.remote(2))  # its reply comes after that of the first, whose future is dropped then

    (warning,) = await warnings_of(site, monkeypatch, forget, times=3)
    assert warning.startswith("a reply of endpoint 'ask' was never read")
    assert "`await (await handle.remote(...))`" in warning


async def _await_twice(handle: AsyncServeHandle) -> object:
    return await (await handle.remote(1))


async def _gather(handle: AsyncServeHandle) -> object:
    return await asyncio.gather(await handle.remote(1), await handle.remote(2))


async def _wait(handle: AsyncServeHandle) -> object:
    return await asyncio.wait([await handle.remote(1)])


async def _wait_for(handle: AsyncServeHandle) -> object:
    return await asyncio.wait_for(await handle.remote(1), 20)


async def _cancel(handle: AsyncServeHandle) -> object:
    return (await handle.remote(1)).cancel()


async def _add_a_callback(handle: AsyncServeHandle) -> None:
    done = asyncio.Event()
    (await handle.remote(1)).add_done_callback(lambda future: done.set())
    await done.wait()


@pytest.mark.parametrize("call", [_await_twice, _gather, _wait, _wait_for, _cancel, _add_a_callback])
async def test_a_reply_that_is_read_warns_of_nothing(site: Site, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    site.serve(echo)
    assert await warnings_of(site, monkeypatch, call) == []


async def test_a_call_that_raises_warns_of_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async def call_nothing(handle: AsyncServeHandle) -> None:
        missing: Any = AsyncServeHandle(site.url, INSTANCE, "missing")
        with pytest.raises(EndpointNotFound):
            await missing.remote(1)
        site.declare()
        with pytest.raises(TypeError):
            await handle.remote(object())

    assert await warnings_of(site, monkeypatch, call_nothing) == []
