"""Requests that are cancelled or expire, before and after they start."""

import asyncio
from typing import Any

from hypothesis import given, settings, strategies as st

from penstock.broker.registry.records import BackendSpec
from penstock.broker.wire.requests import Entry
from penstock.handles.errors import RequestCancelled
from penstock.workers.executing.accept_batch import accept_batch
from penstock.workers.executing.request import Request
from penstock.workers.executing.runner import Runner
from penstock.workers.executing.user_code import dump
from tests.support.waiting import wait_until_async
from tests.workers.requests import error_of, from_handle, value_of
from tests.workers.running import Gate, Mixed, Replica, Start, call_hook, double_async, hook, hooks


async def test_a_request_can_be_cancelled_on_a_thread_only_before_it_runs(start: Start, gate: Gate) -> None:
    seen: list[str] = []

    def work(request: Request) -> str:
        seen.append("run")
        gate.wait()
        return "done"

    hooks["cancelled"] = work
    replica = await start(call_hook)
    first, second, third = (from_handle("cancelled") for _ in range(3))
    running, waiting = replica.run(first), replica.run(second)
    replica.run(third)
    await wait_until_async(lambda: seen)
    running.cancel(first)
    waiting.cancel(second)
    assert second.id not in replica.replies, "answered from within cancel()"
    waiting.cancel(second)
    waiting.cancel(from_handle("never run"))
    assert isinstance(error_of(await replica.reply_to(second)), RequestCancelled)
    assert first.id not in replica.replies
    gate.open()
    assert value_of(await replica.reply_to(first)) == "done"
    assert value_of(await replica.reply_to(third)) == "done"
    assert seen == ["run", "run"]


async def test_a_request_that_expires_while_it_waits_for_a_thread_never_starts(start: Start, gate: Gate) -> None:
    seen: list[object] = []
    clock_ms = 1_000.0

    def work(request: Request) -> None:
        seen.append(str(request.query_params["n"]))
        gate.wait()

    hooks["late"] = work
    replica = await start(call_hook)
    replica.runner.attach(None, lambda: clock_ms)
    running, late, in_time, without = (from_handle("late", n=number) for number in range(4))
    running.header.deadline_ms = late.header.deadline_ms = 2_000
    in_time.header.deadline_ms = 2_001
    for entry in (running, late, in_time, without):
        replica.run(entry)
    await wait_until_async(lambda: seen == ["0"])
    clock_ms = 2_000.0
    gate.open()
    assert isinstance(error_of(await replica.reply_to(late)), RequestCancelled)
    for entry in (running, in_time, without):
        assert value_of(await replica.reply_to(entry)) is None
    assert seen == ["0", "2", "3"]


async def test_a_batch_starts_without_expired_requests(start: Start) -> None:
    replica = await start(Mixed)
    replica.runner.attach(None, lambda: 2_000.0)
    late, in_time = from_handle(), from_handle()
    late.header.deadline_ms = 1_000
    replica.run(late, in_time)
    assert isinstance(error_of(await replica.reply_to(late)), RequestCancelled)
    assert value_of(await replica.reply_to(in_time)) == 1


async def test_an_expired_request_for_async_code_never_starts(start: Start) -> None:
    replica = await start(double_async)
    replica.runner.attach(None, lambda: 2_000.0)
    late = from_handle([1])
    late.header.deadline_ms = 1_000
    assert isinstance(error_of(await replica.call(late)), RequestCancelled)


async def test_one_request_of_a_waiting_batch_can_be_cancelled(start: Start, gate: Gate) -> None:
    hooks["hold"] = lambda request: gate.wait()

    class Held(Mixed):
        def hold(self, request: Request) -> None:
            call_hook(request)

    replica = await start(Held)
    replica.run(from_handle("hold", call="hold"))
    first, second = from_handle(), from_handle()
    replica.run(first, second).cancel(first)
    gate.open()
    assert isinstance(error_of(await replica.reply_to(first)), RequestCancelled)
    assert value_of(await replica.reply_to(second)) == 1


async def test_async_code_is_cancelled(start: Start) -> None:
    async def wait(request: Request) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            hook("cleanup")(request)

    cleaned = list[str]()
    hooks["cleanup"] = lambda request: cleaned.append("cleaned")
    replica = await start(wait)
    started, unstarted = from_handle(), from_handle()
    running = replica.run(started)
    await asyncio.sleep(0.01)
    running.cancel(started)
    replica.run(unstarted).cancel(unstarted)
    for entry in (started, unstarted):
        reply = await replica.reply_to(entry)
        assert isinstance(error_of(reply), RequestCancelled)
        assert reply.status == 499
    assert cleaned == ["cleaned"]


async def test_an_async_batch_is_cancelled_when_all_its_requests_are(start: Start) -> None:
    @accept_batch
    async def wait(requests: list[Request]) -> list[Any]:
        await asyncio.sleep(0.1 if requests[0].data else 3600)
        return [1] * len(requests)

    replica = await start(wait)
    first, second = from_handle(True), from_handle(True)
    running = replica.run(first, second)
    await asyncio.sleep(0.01)
    running.cancel(first)
    assert [value_of(await replica.reply_to(entry)) for entry in (first, second)] == [1, 1]

    first, second = from_handle(False), from_handle(False)
    running = replica.run(first, second)
    await asyncio.sleep(0.01)
    running.cancel(first)
    running.cancel(second)
    for entry in (first, second):
        assert isinstance(error_of(await replica.reply_to(entry)), RequestCancelled)


calls = st.sampled_from(["__call__", "alone", "on_loop", "nope", "_x"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(calls, min_size=1, max_size=5), st.integers(0, 3)), max_size=12))
def test_every_request_gets_exactly_one_reply_whenever_it_is_cancelled(
    steps: list[tuple[list[str], int]],
) -> None:
    async def scenario() -> None:
        replica = Replica(await Runner.start("b", "b#1", dump(Mixed), BackendSpec()))
        given: list[Entry] = []
        for step, cancelled in steps:
            entries = [from_handle(call=call) for call in step]
            given += entries
            running = replica.run(*entries)
            if cancelled == 1:
                await asyncio.sleep(0)
            for entry in entries[:cancelled]:
                running.cancel(entry)
        assert await replica.runner.stop(10)
        await asyncio.sleep(0)
        assert set(replica.replies) == {entry.id for entry in given}

    asyncio.run(scenario())
