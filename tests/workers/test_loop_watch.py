"""The watch over a replica's event loop: one warning about user code that blocks it."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from penstock.testing import local
from penstock.workers.executing.request import Request
from tests.support.waiting import wait_until

LOG = "penstock.workers.loop_watch"


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOG]


def watches() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loop watch of")]


def test_async_code_that_blocks_the_loop_is_reported_once_with_its_stack(caplog: pytest.LogCaptureFixture) -> None:
    async def block(request: Request) -> None:
        wait_until(lambda: warnings(caplog), 20)

    with local(block) as backend:
        for _ in range(2):
            backend.handle.remote().result()
        (warning,) = warnings(caplog)
        assert "`async def` code of backend 'local' has blocked the event loop" in warning
        stack = warning.partition("It is here:\n")[2].splitlines()
        assert stack[0].endswith(", in block")
        assert stack[1].strip() == "wait_until(lambda: warnings(caplog), 20)"
        wait_until(lambda: not watches())


def test_a_task_that_user_code_has_started_is_watched_too(caplog: pytest.LogCaptureFixture) -> None:
    async def block() -> None:
        await asyncio.sleep(0)
        wait_until(lambda: warnings(caplog), 20)

    async def begin(request: Request) -> None:
        await asyncio.create_task(block())

    with local(begin) as backend:
        backend.handle.remote().result()
    (warning,) = warnings(caplog)
    assert ", in block\n" in warning


def test_code_that_waits_or_blocks_a_thread_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    go_on = threading.Event()

    class Patient:
        async def __call__(self, request: Request) -> None:
            await asyncio.to_thread(go_on.wait)

        def on_thread(self, request: Request) -> None:
            go_on.wait()

    with local(Patient) as backend:
        futures = [backend.handle.remote(), backend.handle.options(method_name="on_thread").remote()]
        ends_s = time.monotonic() + 0.5  # five times as long as a loop may be blocked
        wait_until(lambda: time.monotonic() > ends_s)
        go_on.set()
        assert [future.result() for future in futures] == [None, None]
    assert warnings(caplog) == []


def test_code_that_runs_on_threads_alone_has_no_watch() -> None:
    wait_until(lambda: not watches())  # of the tests before

    def work(request: Request) -> int:
        return len(watches())

    with local(work) as backend:
        assert backend.handle.remote().result() == 0


def test_the_watch_ends_with_its_replica() -> None:
    async def work(request: Request) -> int:
        return len(watches())

    with local(work) as backend:
        wait_until(lambda: backend.handle.remote().result() == 1)
    wait_until(lambda: not watches())
