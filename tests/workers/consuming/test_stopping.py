"""The end of a runner: it waits for running calls, and after a timeout they get no reply."""

import asyncio
import threading
import time

from penstock.workers.executing.request import Request
from tests.workers.requests import from_handle, value_of
from tests.workers.running import Gate, Start, call_hook, double, hooks


async def test_stopping_waits_for_running_calls(start: Start) -> None:
    class Slow:
        def __call__(self, request: Request) -> str:
            time.sleep(0.1)
            return "sync"

        async def on_loop(self, request: Request) -> str:
            await asyncio.sleep(0.1)
            return "async"

    replica = await start(Slow)
    first, second = from_handle(), from_handle(call="on_loop")
    replica.run(first)
    replica.run(second)
    assert await replica.runner.stop(10)
    assert {value_of(reply) for reply in replica.replies.values()} == {"sync", "async"}


async def test_calls_that_outlast_the_timeout_get_no_reply(start: Start, gate: Gate) -> None:
    hooks["stopped"] = lambda request: gate.wait()

    class Slow:
        def __call__(self, request: Request) -> None:
            call_hook(request)

        async def on_loop(self, request: Request) -> None:
            await asyncio.sleep(3600)

    replica = await start(Slow)
    replica.run(from_handle("stopped"))
    waiting = from_handle("stopped")
    replica.run(waiting)
    replica.run(from_handle(call="on_loop"))
    await asyncio.sleep(0.01)
    began_at = time.monotonic()
    assert not await replica.runner.stop(0.05)
    assert time.monotonic() - began_at < 5
    gate.open()
    await asyncio.sleep(0.05)
    assert replica.replies == {}


async def test_stopping_ends_the_threads(start: Start) -> None:
    before = threading.active_count()
    replica = await start(double, config={"max_concurrent_queries": 4})
    for n in range(20):
        replica.run(from_handle(n))
    assert await replica.runner.stop(10)
    assert len(replica.replies) == 20
    assert threading.active_count() <= before
