"""Cancelling a call: before its request starts, while it runs, and after its reply."""

import asyncio
import concurrent.futures
import threading
import time
from typing import Any

import pytest

from penstock.handles import AsyncServeHandle
from penstock.handles.calls.shared_client import SharedClient
from penstock.handles.connection import Connection
from tests.handles.site import INSTANCE, Lingering, Site, echo, noting
from tests.support.waiting import wait_until, wait_until_async


def test_cancelling_a_queued_request_means_that_it_never_starts(site: Site, connected: Connection) -> None:
    started: list[Any] = []
    site.declare()
    handle = connected.get_handle("ask")
    cancelled, kept = handle.remote("cancelled"), handle.remote("kept")
    wait_until(lambda: site.depth() == 2)
    assert cancelled.cancel()
    assert concurrent.futures.wait([cancelled], timeout=5).not_done == set(), "waiters are notified"
    wait_until(lambda: site.depth() == 1)
    site.serve(noting(started))
    kept.result(10)
    assert started == ["kept"]


def test_cancelling_at_once_means_that_it_never_starts(site: Site, connected: Connection) -> None:
    """The cancellation comes before the background loop has the call, while it connects, or just after."""
    started: list[Any] = []
    site.serve(noting(started))
    handle = connected.get_handle("ask")
    cancelled: list[concurrent.futures.Future[Any]] = []
    for n in range(300):
        future = handle.remote(n)
        if n % 3 == 0:
            time.sleep(0.0001 * (n % 7))
        if future.cancel():
            cancelled.append(future)
    assert concurrent.futures.wait(cancelled, timeout=10).not_done == set()
    assert handle.remote("last").result(10) is None
    wait_until(lambda: site.depth() == 0)


def test_cancelling_a_running_request_frees_its_slot(site: Site, connected: Connection) -> None:
    running = threading.Event()

    async def linger(request: Any) -> Any:
        if request.data == "linger":
            running.set()
            await asyncio.sleep(60)
        return request.data

    site.serve(linger, max_concurrent_queries=1)
    handle = connected.get_handle("ask")
    future = handle.remote("linger")
    wait_until(running.is_set)
    assert future.cancel()
    assert handle.remote("next").result(10) == "next"


def test_a_finished_future_cannot_be_cancelled(site: Site, connected: Connection) -> None:
    site.serve(echo)
    future = connected.get_handle("ask").remote("x")
    assert future.result(10) == "x"
    assert not future.cancel()


async def test_cancelling_an_asyncio_future_cancels_its_request(site: Site) -> None:
    lingering = Lingering()
    await asyncio.to_thread(site.serve, lingering.run)
    handle = AsyncServeHandle(site.url, INSTANCE, "ask")
    future = await handle.remote()
    await wait_until_async(lingering.running.is_set)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(future, 0.01)
    await wait_until_async(lingering.cancelled.is_set)
    await wait_until_async(lambda: site.depth() == 0)
    await (await SharedClient.get(site.url, INSTANCE)).close()


async def test_cancelling_remote_withdraws_the_request(site: Site) -> None:
    site.declare()
    handle = AsyncServeHandle(site.url, INSTANCE, "ask")
    await SharedClient.get(site.url, INSTANCE)
    sending = asyncio.ensure_future(handle.remote())
    await asyncio.sleep(0)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    caller = await SharedClient.get(site.url, INSTANCE)
    await caller.registry.snapshot()
    await wait_until_async(lambda: site.depth() == 0)
    await caller.close()
