"""How a handle connects and closes, and what it warns of."""

import asyncio
import subprocess
import sys
import textwrap
import time
import warnings

import pytest

from penstock import handles
from penstock.broker.embedded import EmbeddedServer
from penstock.handles.connection import Connected
from penstock.handles.errors import RequestCancelled
from tests.handles.site import Site, echo
from tests.waiting import wait_until


def test_a_sync_handle_warns_in_a_running_loop(site: Site, connected: Connected) -> None:
    site.declare()

    async def ask() -> None:
        with pytest.warns(UserWarning, match=r"a sync handle .* would block; get_handle\(..., sync=False\)") as caught:
            connected.get_handle("ask")
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            connected.get_handle("ask", sync=False)

    asyncio.run(ask())


def test_an_asyncio_handle_warns_where_no_loop_runs(site: Site, connected: Connected) -> None:
    site.declare()
    with pytest.warns(UserWarning, match="an asyncio handle .* cannot be awaited here") as caught:
        connected.get_handle("ask", sync=False)
    assert caught[0].filename == __file__


def test_closing_tells_what_is_in_flight_and_the_next_call_connects_anew(site: Site) -> None:
    site.declare()
    connected = handles.connect(site.url)
    handle = connected.get_handle("ask")
    future = handle.remote("left")
    wait_until(lambda: site.depth() == 1)
    connected.close()
    with pytest.raises(RequestCancelled):
        future.result(10)
    wait_until(lambda: site.depth() == 0)
    connected.close()
    site.serve(echo)
    assert handle.remote("anew").result(10) == "anew"
    connected.close()


def test_closing_needs_no_broker(durable: EmbeddedServer) -> None:
    connected = handles.connect(durable.url)
    durable.stop()
    started_at = time.monotonic()
    connected.close()
    connected.close()
    assert time.monotonic() - started_at < 4.5  # a command would wait for 5 s for its connection


def test_endpoints_are_listed(site: Site, connected: Connected) -> None:
    assert connected.list_endpoints() == {}
    site.declare()
    assert connected.list_endpoints() == {
        "ask": {"route": None, "methods": ["GET"], "traffic": {"model": 1.0}, "shadows": {}}
    }


@pytest.mark.parametrize("ending", ["", "handle.remote('left in flight')", "connected.close()"])
def test_a_script_ends_by_itself_and_quietly(site: Site, ending: str) -> None:
    site.serve(echo)
    script = f"""
        from penstock import handles
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
