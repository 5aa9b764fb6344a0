"""The context of user code: its tags, and the ids in its log lines."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from penstock.broker.registry.records import BackendSpec
from penstock.handles.log_context import request_ids
from penstock.workers.executing.accept_batch import accept_batch
from penstock.workers.executing.context import get_current_backend_tag, get_current_replica_tag
from penstock.workers.executing.request import Request
from penstock.workers.executing.runner import Runner
from penstock.workers.executing.user_code import dump
from tests.workers.requests import from_handle, from_http, value_of
from tests.workers.running import Replica, Start, double


async def test_user_code_can_read_its_tags(start: Start) -> None:
    class Asking:
        def __init__(self) -> None:
            self.at_construction = [get_current_backend_tag(), get_current_replica_tag()]

        def __call__(self, request: Request) -> Any:
            of_a_thread: list[Any] = []
            thread = threading.Thread(target=lambda: of_a_thread.append(get_current_replica_tag()))
            thread.start()
            thread.join()
            return [*self.at_construction, get_current_backend_tag(), get_current_replica_tag(), *of_a_thread]

        async def on_loop(self, request: Request) -> Any:
            return [get_current_backend_tag(), get_current_replica_tag()]

    replica = await start(Asking)
    assert await replica.ask() == ["b", "b#1", "b", "b#1", "b#1"]
    assert await replica.ask(call="on_loop") == ["b", "b#1"]
    other = Replica(await Runner.start("c", "c#1", dump(double), BackendSpec()))
    assert await replica.ask() == ["b", "b#1", "b", "b#1", "c#1"]
    await other.runner.stop()


def log_lines_are_about(request: Any) -> str:
    return request_ids()


async def log_lines_are_about_async(request: Any) -> str:
    await asyncio.sleep(0)
    return request_ids()


@accept_batch
def log_lines_of_each_are_about(requests: Sequence[Request]) -> list[str]:
    return [request_ids()] * len(requests)


@pytest.mark.parametrize("function", [log_lines_are_about, log_lines_are_about_async])
async def test_log_lines_have_the_id_of_their_request(start: Start, function: object) -> None:
    replica = await start(function)
    entries = [from_http(request_id=f"r{n}") for n in range(3)]
    for entry in entries:
        replica.run(entry)
    assert [value_of(await replica.reply_to(entry)) for entry in entries] == ["r0", "r1", "r2"]
    call = from_handle(None)
    assert value_of(await replica.call(call)) == call.shown_id
    assert call.id not in call.shown_id


async def test_log_lines_of_a_batch_have_all_its_ids(start: Start) -> None:
    replica = await start(log_lines_of_each_are_about)
    entries = [from_http(request_id=f"r{n}") for n in range(3)]
    replica.run(*entries)
    assert value_of(await replica.reply_to(entries[0])) == "r0,r1,r2"


async def test_log_lines_outside_requests_have_no_id(start: Start) -> None:
    class Checked:
        about = ""

        def __call__(self, request: Request) -> str:
            return self.about

        def check_health(self) -> None:
            self.about = request_ids()

    replica = await start(Checked)
    assert await replica.ask() == ""
    await replica.runner.check_health()  # on the thread of the last request
    assert await replica.ask() == "-"
