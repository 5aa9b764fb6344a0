"""Handles in many threads, in other processes, and in one event loop after another."""

import asyncio
import concurrent.futures
import multiprocessing
import pickle
import subprocess
import sys
import textwrap
import warnings
from typing import Any

from penstock.handles import AsyncServeHandle
from penstock.handles.connection import Connection
from tests.handles.site import INSTANCE, Site, describe, echo


def test_many_threads_share_one_handle(site: Site, connected: Connection) -> None:
    site.serve(echo)
    handle = connected.get_handle("ask")

    def ask(thread: int) -> bool:
        return all(handle.remote([thread, n]).result(20) == [thread, n] for n in range(50))

    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        assert all(threads.map(ask, range(16)))


def test_callbacks_of_a_future_may_call_again(site: Site, connected: Connection) -> None:
    site.serve(echo)
    handle = connected.get_handle("ask")
    second: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def again(first: "concurrent.futures.Future[Any]") -> None:
        handle.remote(first.result() + 1).add_done_callback(lambda future: second.set_result(future.result()))

    handle.remote(1).add_done_callback(again)
    assert second.result(10) == 2


def test_a_handle_can_be_pickled_with_its_options(site: Site, connected: Connection) -> None:
    site.serve(describe)
    handle = connected.get_handle("ask").options(http_headers={"x-test": "kept"})
    assert pickle.loads(pickle.dumps(handle)).remote().result(10)["x"] == "kept"
    assert "redis" not in repr(handle), "it may hold a password"


def test_a_pickled_handle_works_in_a_process_without_ray(site: Site, connected: Connection) -> None:
    site.serve(echo)
    script = """
        import pickle, sys
        handle = pickle.load(sys.stdin.buffer)
        print(handle.remote("from afar").result(20))
        print([name for name in ("ray", "starlette", "uvicorn", "pydantic") if name in sys.modules])
    """
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        input=pickle.dumps(connected.get_handle("ask")),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stdout.decode().split("\n"), ran.stderr) == (0, ["from afar", "[]", ""], b"")


def test_a_forked_child_and_its_parent_use_connections_of_their_own(site: Site, connected: Connection) -> None:
    site.serve(echo)
    handle = connected.get_handle("ask")
    assert handle.remote("parent").result(10) == "parent"

    def in_child(to_parent: Any) -> None:
        to_parent.send([handle.remote(f"child {n}").result(10) for n in range(3)])

    here, there = multiprocessing.get_context("fork").Pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this test forks a process with threads on purpose
        child = multiprocessing.get_context("fork").Process(target=in_child, args=(there,))
        child.start()
    assert handle.remote("meanwhile").result(10) == "meanwhile"
    assert here.poll(20)
    assert here.recv() == ["child 0", "child 1", "child 2"]
    child.join(10)
    assert child.exitcode == 0
    assert [handle.remote(n).result(10) for n in range(20)] == list(range(20))
    here.close()
    there.close()


def test_a_handle_can_be_used_in_one_loop_after_another(site: Site) -> None:
    site.serve(echo)
    handle = AsyncServeHandle(site.url, INSTANCE, "ask")

    async def ask(value: int) -> Any:
        return await (await handle.remote(value))

    assert [asyncio.run(ask(n)) for n in range(3)] == [0, 1, 2]
