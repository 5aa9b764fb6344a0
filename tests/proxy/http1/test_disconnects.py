import asyncio
from typing import Any

import pytest

from penstock.broker.wire.replies import Reply
from penstock.broker.wire.requests import Entry
from tests.proxy.site import Connected, Site, text
from tests.support.waiting import wait_until_async


class TestAClientThatDisconnects:
    async def test_a_request_whose_client_disconnects_while_it_waits_is_never_started(self, site: Site) -> None:
        await site.endpoint("/", None)
        client = Connected(site)
        await wait_until_async(site.queued)
        client.gone.set()
        await asyncio.wait_for(client.served, 5)
        await wait_until_async(site.is_empty)
        assert client.sent == []
        assert 'status="499"} 1' in site.app.metrics.render()

    async def test_fast_responses_start_no_watcher(self, site: Site) -> None:
        await site.endpoint("/", text("fast"))
        received: list[int] = []
        while 0 not in received and len(received) < 50:  # one is fast, also on a busy machine
            client = Connected(site)
            await asyncio.wait_for(client.served, 5)
            received.append(client.received)
        assert 0 in received

    async def test_a_client_that_disconnects_in_its_body_gets_no_response(self, site: Site) -> None:
        await site.endpoint("/")

        async def receive() -> Any:
            return {"type": "http.disconnect"}

        client = Connected(site, method="GET")
        await client.served
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "query_string": b"",
            "headers": [(b"content-length", b"5")],
            "client": None,
        }
        await site.app(scope, receive, send)
        assert sent == []
        assert len(site.started) == 1

    async def test_a_request_whose_task_is_cancelled_is_withdrawn(self, site: Site) -> None:
        await site.endpoint("/", None)
        client = Connected(site)
        await wait_until_async(site.queued)
        client.served.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client.served
        await wait_until_async(site.is_empty)

    async def test_a_waiting_request_leaves_no_task_behind(self, site: Site) -> None:
        release = asyncio.Event()

        async def later(entry: Entry) -> Reply:
            await release.wait()
            return Reply(entry.id)

        await site.endpoint("/", later)
        clients = [Connected(site) for _ in range(20)]
        await wait_until_async(lambda: all(client.received == 2 for client in clients))
        release.set()
        await asyncio.gather(*(client.served for client in clients))
        await wait_until_async(lambda: not any("coro=<_watch()" in repr(task) for task in asyncio.all_tasks()))
        assert all(client.sent[0]["status"] == 200 for client in clients)
