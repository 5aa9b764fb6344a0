"""Connecting and closing, and warnings about the kind of handle."""

import asyncio
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis

from penstock import handles
from penstock.broker.embedded.server import EmbeddedServer
from penstock.handles import ServeHandle
from penstock.handles.connection import Connection
from penstock.handles.errors import ConfigError, PenstockError
from tests.handles.site import INSTANCE, Lingering, Site, echo, noting
from tests.support.waiting import wait_until


def test_a_sync_handle_warns_in_a_running_loop(site: Site, connected: Connection) -> None:
    site.declare()

    async def ask() -> None:
        with pytest.warns(UserWarning, match=r"a sync handle .* would block; get_handle\(..., sync=False\)") as caught:
            connected.get_handle("ask")
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            connected.get_handle("ask", sync=False)

    asyncio.run(ask())


def test_an_asyncio_handle_warns_where_no_loop_runs(site: Site, connected: Connection) -> None:
    site.declare()
    with pytest.warns(UserWarning, match="an asyncio handle .* cannot be awaited here") as caught:
        connected.get_handle("ask", sync=False)
    assert caught[0].filename == __file__


def test_leaving_the_block_waits_until_every_call_is_queued(site: Site) -> None:
    site.declare()
    with handles.connect(site.url) as connected:
        handle = connected.get_handle("ask")
        futures = [handle.remote(number) for number in range(500)]
    assert site.depth() == 500
    site.serve(echo)
    assert [future.result(30) for future in futures] == list(range(500))


def test_a_script_that_ends_with_the_block_has_queued_its_calls(site: Site) -> None:
    site.declare()
    script = f"""
        from penstock import handles
        with handles.connect({site.url!r}) as connected:
            handle = connected.get_handle("ask")
            for number in range(50):
                handle.remote(number)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=60, check=True)
    assert site.depth() == 50
    seen: list[int] = []
    site.serve(noting(seen))
    wait_until(lambda: len(seen) == 50)
    assert sorted(seen) == list(range(50))


def test_leaving_the_block_waits_for_calls_that_are_still_connecting(site: Site) -> None:
    site.declare()
    with handles.connect(site.url) as connected:
        handle = connected.get_handle("ask")
    with connected:  # closed: the calls connect again
        futures = [handle.remote("a"), handle.remote("b")]
    assert site.depth() == 2
    for future in futures:
        future.cancel()


def test_leaving_the_block_cancels_no_call_of_another_handle(site: Site) -> None:
    lingering = Lingering()
    site.serve(lingering.run)
    with handles.connect(site.url) as one:
        running = one.get_handle("ask").remote("mine")
        assert lingering.running.wait(30)
        with handles.connect(site.url) as other:
            other.list_endpoints()
        bare = ServeHandle(site.url, INSTANCE, "ask").remote("of no block")
    assert not lingering.cancelled.is_set()
    assert not running.done()
    assert not bare.done()
    for future in (running, bare):
        future.cancel()
    assert lingering.cancelled.wait(30)


def test_leaving_the_block_does_not_end_a_batch_of_another_thread(site: Site) -> None:
    site.serve(echo)
    waiting, left = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 1
        waiting.set()
        assert left.wait(30)
        yield 2

    with handles.connect(site.url) as connected:
        producer = connected.batch("ask")
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.extend(result.get() for result in producer.map(items())))
    thread.start()
    assert waiting.wait(30)
    with handles.connect(site.url) as connected:
        connected.get_handle("ask").remote("x").result(30)
    left.set()
    thread.join(30)
    assert results == [1, 2]


def test_calls_that_cannot_be_queued_in_time_are_counted(site: Site) -> None:
    site.declare()
    connected = handles.connect(site.url, close_timeout_s=0.2)
    handle = connected.get_handle("ask")
    with Redis.from_url(site.url) as redis:
        redis.client_pause(60_000, all=False)
        try:
            futures = [handle.remote(number) for number in range(3)]
            with pytest.raises(
                PenstockError, match=r"3 calls to .* not queued within close_timeout_s=0\.2, and are lost"
            ):
                connected.close()
        finally:
            redis.client_unpause()
    wait_until(lambda: site.depth() == 3)
    for future in futures:
        future.cancel()
    wait_until(lambda: site.depth() == 0)


def test_an_error_in_the_block_is_not_hidden_by_calls_that_were_not_queued(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    connected = handles.connect(site.url, close_timeout_s=0)
    future = connected.get_handle("later", missing_ok=True).remote()
    with pytest.raises(ZeroDivisionError), connected:
        raise ZeroDivisionError
    assert "1 calls to" in caplog.text
    future.cancel()


@pytest.mark.parametrize(("value", "error"), [("10", TypeError), (True, TypeError), (-1, ConfigError)])
def test_a_wrong_close_timeout_is_refused(site: Site, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="close_timeout_s must be"):
        handles.connect(site.url, close_timeout_s=value)


def test_a_call_after_closing_connects_again(site: Site) -> None:
    site.serve(echo)
    connected = handles.connect(site.url)
    handle = connected.get_handle("ask")
    connected.close()
    connected.close()
    assert handle.remote("anew").result(10) == "anew"
    connected.close()


def test_the_connection_is_closed_with_its_last_user_once_nothing_is_in_flight(site: Site) -> None:
    site.declare()
    with Redis.from_url(site.url) as redis:

        def connections() -> int:
            return sum(client["name"].startswith("penstock-caller") for client in redis.client_list())

        before = connections()
        with handles.connect(site.url) as connected:
            future = connected.get_handle("ask").remote("x")
            with handles.connect(site.url):
                pass
            assert connections() == before + 1
        assert connections() == before + 1
        site.serve(echo)
        assert future.result(30) == "x"
        wait_until(lambda: connections() == before)


def test_closing_needs_no_broker(durable: EmbeddedServer) -> None:
    connected = handles.connect(durable.url)
    durable.stop()
    started_at = time.monotonic()
    connected.close()
    connected.close()
    assert time.monotonic() - started_at < 4.5  # a command would wait 5 s for the connection


def test_endpoints_are_listed(site: Site, connected: Connection) -> None:
    assert connected.list_endpoints() == {}
    site.declare()
    assert connected.list_endpoints() == {
        "ask": {"route": None, "methods": ["GET"], "traffic": {"model": 1.0}, "shadows": {}}
    }


@pytest.mark.parametrize("ending", ["", "handle.remote('left in flight')", "connected.close()"])
def test_a_script_ends_without_closing_and_without_output(site: Site, ending: str) -> None:
    site.serve(echo)
    script = f"""
        import logging
        from penstock import handles
        # No warnings of slow callbacks, which a busy machine has.
        logging.getLogger("asyncio").setLevel(logging.ERROR)
        connected = handles.connect({site.url!r})
        handle = connected.get_handle("ask")
        print(handle.remote("x").result(20))
        {ending}
    """
    started_at = time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"x\n", b"")
    assert time.monotonic() - started_at < 30
