"""Calls while the broker dies and restarts."""

import asyncio
import os
import signal
import threading
from typing import Any

import pytest
from redis import Redis

from penstock import handles
from penstock.broker.embedded.server import EmbeddedServer
from penstock.handles import ServeHandle
from penstock.handles.errors import BrokerUnavailable, Overloaded
from tests.handles.site import INSTANCE, Site, close_here, echo, in_loop
from tests.support.waiting import wait_until


@pytest.mark.parametrize("face", ["sync", "asyncio"])
def test_a_running_request_is_answered_after_the_broker_was_killed(durable: EmbeddedServer, face: str) -> None:
    site = Site(durable.url)
    running, release = threading.Event(), threading.Event()

    def hold(request: Any) -> Any:
        running.set()
        release.wait(20)
        return request.data

    site.serve(hold)
    handle = ServeHandle(durable.url, INSTANCE, "ask")

    def kill_and_release() -> None:
        wait_until(running.is_set)
        pid = durable.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: durable.pid not in (None, pid))
        release.set()

    killing = threading.Thread(target=kill_and_release)
    killing.start()
    if face == "sync":
        assert handle.remote("kept").result(20) == "kept"
        handles.connect(durable.url).close()
    else:

        async def ask() -> Any:
            answer = await asyncio.wait_for(await in_loop(handle).remote("kept"), 20)
            await close_here(handle)
            return answer

        assert asyncio.run(ask()) == "kept"
    killing.join()
    wait_until(lambda: site.depth() == 0)
    site.close()


def test_calls_made_while_the_broker_is_away_are_answered_when_it_is_back(durable: EmbeddedServer) -> None:
    site = Site(durable.url)
    site.serve(echo)
    connected = handles.connect(durable.url)
    handle = connected.get_handle("ask")
    assert handle.remote("before").result(10) == "before"
    pid = durable.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    futures = [handle.remote(n) for n in range(50)]
    assert [future.result(20) for future in futures] == list(range(50))
    connected.close()
    site.close()


def test_a_password_is_used_and_never_shown(durable: EmbeddedServer) -> None:
    with Redis.from_url(durable.url) as admin:
        admin.config_set("requirepass", "geheim")
    with pytest.raises(BrokerUnavailable, match="Authentication required"):
        handles.connect(durable.url)
    site = Site(durable.url.replace("unix://", "unix://:geheim@"))
    site.declare(max_queued_requests=0)
    with handles.connect(site.url) as connected:
        handle = connected.get_handle("ask")
        with pytest.raises(Overloaded):
            handle.remote().result(10)
        durable.stop()
        with pytest.raises(BrokerUnavailable) as caught:
            handle.remote().result(10)
    assert "geheim" not in f"{caught.value!r} {caught.value} {handle!r}"
    site.abandon()
