"""Connections: their number, their time limits, and clients that shut down their sending direction."""

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.broker.wire.replies import Reply
from penstock.proxy import server as server_module
from penstock.proxy.http1 import presence, protocol as protocol_module, time_limits
from penstock.proxy.middleware import wrap
from penstock.proxy.server import Server
from tests.proxy.http1.raw_http import responses
from tests.proxy.http1.test_pipelining import Gate, get
from tests.proxy.site import WAYS, Site, running, text
from tests.proxy.test_response_streaming import serve
from tests.proxy.test_server import connected, serving, talk
from tests.support.waiting import wait_until_async


async def read_all(reader: asyncio.StreamReader) -> bytes:
    """Return the bytes received until the server closes or resets the connection."""
    whole = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := await asyncio.wait_for(reader.read(1 << 16), 30):
            whole += piece
    return whole


class Impatient:
    """A middleware that responds without reading the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("no", 401)(scope, receive, send)


class TestIdleConnections:
    @pytest.fixture(autouse=True)
    def short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(time_limits, "KEEP_ALIVE_S", 0.5)
        monkeypatch.setattr(server_module, "_SWEEP_S", 0.05)

    @pytest.mark.parametrize("sent", [b"", b"\r\n", b"\r\n\r\n"])
    async def test_idle_connections_are_closed_whatever_bytes_they_sent(self, site: Site, sent: bytes) -> None:
        await site.endpoint("/a", text("here"))
        async with serving(site) as server, connected(server) as (reader, writer):
            writer.write(get("/a"))
            assert (await asyncio.wait_for(reader.readuntil(b"here"), 30)).startswith(b"HTTP/1.1 200 ")
            writer.write(sent)
            assert await read_all(reader) == b""

    async def test_blank_lines_do_not_keep_a_connection_open(self, site: Site) -> None:
        await site.endpoint("/a", text("here"))
        async with serving(site) as server, connected(server) as (reader, writer):
            writer.write(get("/a"))
            await asyncio.wait_for(reader.readuntil(b"here"), 30)
            ended = asyncio.ensure_future(read_all(reader))
            while not ended.done():
                writer.write(b"\r\n")
                await asyncio.sleep(0.02)
            assert await ended == b""

    async def test_an_unread_body_does_not_keep_a_connection_open(self, redis_url: str) -> None:
        async with running(redis_url) as site:
            site.served = wrap(site.app, [Middleware(Impatient)])
            async with serving(site) as server, connected(server) as (reader, writer):
                writer.write(b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000\r\n\r\n")
                assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\nno"), 30)).startswith(b"HTTP/1.1 401 ")
                ended = asyncio.ensure_future(read_all(reader))
                while not ended.done():
                    writer.write(b"x")
                    await asyncio.sleep(0.02)
                assert await ended == b""

    async def test_a_connection_with_a_waiting_request_is_not_idle(self, site: Site) -> None:
        gate = Gate()
        await site.endpoint("/slow", gate)
        async with serving(site) as server, connected(server) as (reader, writer):
            writer.write(get("/slow"))
            await wait_until_async(lambda: site.started)
            await asyncio.sleep(1.0)  # twice the limit of idle connections
            gate.opened.set()
            assert (await asyncio.wait_for(reader.readuntil(b"/slow"), 30)).startswith(b"HTTP/1.1 200 ")

    async def test_a_connection_whose_response_is_being_read_is_not_idle(self, site: Site) -> None:
        large = bytes(20_000_000)
        await site.endpoint("/a", lambda entry: Reply(entry.id, codec="bytes", body=large))
        async with serving(site) as server, connected(server) as (reader, writer):
            writer.write(get("/a"))
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
            read = 0
            while read < len(large):  # slowly and steadily, for twice the limit of idle connections
                read += len(await asyncio.wait_for(reader.read(1_000_000), 30))
                await asyncio.sleep(0.05)
            assert read == len(large)


class TestHalfClosedConnections:
    @pytest.mark.parametrize("count", [1, 3])
    @pytest.mark.parametrize("is_slow", [False, True])
    async def test_whole_requests_are_answered_before_a_half_closed_connection_ends(
        self, site: Site, count: int, is_slow: bool
    ) -> None:
        gate = Gate()
        await site.endpoint("/{x}", gate)
        async with serving(site) as server, connected(server) as (reader, writer):
            writer.write(count * get("/slow") + get("/none/none") + get("/last") + b"GET /half")
            writer.write_eof()
            if is_slow:  # until the presence of the client was checked
                assert await asyncio.wait_for(reader.readexactly(9), 30) == b"HTTP/1.1 "
                for _ in range(3):
                    assert b"here" not in await talk(server, get("/none/none", "connection: close"))
                    await asyncio.sleep(presence.HALF_CLOSED_S)
                gate.opened.set()
                answered = b"HTTP/1.1 " + await read_all(reader)
            else:
                gate.opened.set()
                answered = await read_all(reader)
        assert [one.status for one in responses(answered)] == count * [200] + [404, 200]

    @pytest.mark.parametrize("sent", [b"", b"GET /a HTTP/1.1\r\nhost: x", b"\r\n"])
    async def test_half_closed_connections_without_a_whole_request_are_closed(self, site: Site, sent: bytes) -> None:
        async with serving(site) as server, connected(server) as (reader, writer):
            writer.write(sent)
            writer.write_eof()
            assert await read_all(reader) == b""

    @pytest.mark.parametrize("version", [b"1.1", b"1.0"])
    async def test_a_client_that_closed_its_socket_cancels_its_request(self, site: Site, version: bytes) -> None:
        """A closed socket sends the same end of data as a half-closed one."""
        await site.endpoint("/", None)
        async with serving(site) as server:
            async with connected(server) as (_, writer):
                writer.write(b"GET / HTTP/%b\r\nhost: x\r\n\r\n" % version)
                await wait_until_async(site.queued)
                writer.write_eof()
            await wait_until_async(site.is_empty)
            await wait_until_async(lambda: not server.connections)
            assert site.app.metrics.of("e").by_status == {499: 1}

    async def test_a_stream_to_a_half_closed_connection_is_completed(self, redis_url: str) -> None:
        go_on = asyncio.Event()

        async def give(request: Any) -> AsyncIterator[str]:
            yield "first "
            await go_on.wait()
            yield "second"

        for way in WAYS:
            go_on.clear()
            async with serve(redis_url, way, give) as served, connected(served.server) as (reader, writer):
                writer.write(get("/s"))
                head = await asyncio.wait_for(reader.readuntil(b"first \r\n"), 30)
                writer.write_eof()
                # The leading zero of the next chunk's length.
                assert await asyncio.wait_for(reader.readexactly(1), 30) == b"0"
                go_on.set()
                (one,) = responses(head + b"0" + await read_all(reader))
                assert (one.status, one.body) == (200, b"first second")

    async def test_a_stream_to_a_closed_socket_ends(self, redis_url: str) -> None:
        for way in WAYS:
            ended = threading.Event()

            async def give(request: Any, ended: threading.Event = ended) -> AsyncIterator[str]:
                try:
                    yield "first"
                    await asyncio.sleep(3600)
                finally:
                    ended.set()

            async with serve(redis_url, way, give) as served:
                async with connected(served.server) as (reader, writer):
                    writer.write(get("/s"))
                    await asyncio.wait_for(reader.readuntil(b"first"), 30)
                    writer.write_eof()
                await wait_until_async(ended.is_set)
                await wait_until_async(served.is_idle)


class TestTheNumberOfConnections:
    async def test_connections_beyond_the_limit_are_refused_and_others_continue(self, site: Site) -> None:
        await site.endpoint("/a", text("here"))
        server = Server(site.served, "127.0.0.1", 0, max_connections=2)
        await server.start()
        try:
            async with connected(server) as first, connected(server) as second:
                for _ in range(2):
                    for reader, writer in (first, second):
                        writer.write(get("/a"))
                        answered = await asyncio.wait_for(reader.readuntil(b"here"), 30)
                        assert answered.startswith(b"HTTP/1.1 200 ")
                    for _ in range(5):
                        (refused,) = responses(await talk(server, get("/a")))
                        assert refused.status == 503
                        assert refused.headers["connection"] == "close"
                        assert refused.headers["retry-after"] == "1"
                        assert b"the server has 2 connections" in refused.body
            await wait_until_async(lambda: not server.connections)
            assert len(site.started) == 4
            (later,) = responses(await talk(server, get("/a", "connection: close")))
            assert later.status == 200
        finally:
            await server.stop(0.5)

    async def test_refused_connections_that_stay_open_are_closed(
        self, site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(protocol_module, "_LINGERING_REFUSALS", 3)
        server = Server(site.served, "127.0.0.1", 0, max_connections=0)
        await server.start()
        try:
            clients = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(20)]
            for reader, _ in clients:
                assert (await asyncio.wait_for(reader.readuntil(b"\r\n"), 30)).startswith(b"HTTP/1.1 503 ")
            await wait_until_async(lambda: len(server.connections) <= 3)
            for _, writer in clients:
                writer.close()
            await wait_until_async(lambda: not server.connections)
        finally:
            await server.stop(0.5)

    def test_the_limit_is_below_the_limit_of_open_files(self) -> None:
        code = (
            "import resource, sys; from penstock.proxy.http1.connection_limit import allowed_connections as allowed;"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[1])));"
            "print(allowed(int(sys.argv[2])), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
        )
        cases = [(4096, 1000, 1000, 1256), (1024, 10_000, 768, 1024), (100, 10_000, 50, 100)]
        for hard, wanted, allowed, soft in cases:
            command = [sys.executable, "-c", code, str(hard), str(wanted)]
            ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
            assert ran.stdout.split() == [str(allowed), str(soft)]
            assert ("raise the hard limit of open files" in ran.stderr) == (allowed < wanted)

    async def test_a_client_whose_body_is_refused_can_read_the_refusal(self, site: Site) -> None:
        server = Server(site.served, "127.0.0.1", 0, max_connections=0)
        await server.start()
        try:
            async with httpx.AsyncClient() as http:
                response = await http.post(f"http://127.0.0.1:{server.port}/a", content=bytes(10_000_000))
            assert response.status_code == 503
        finally:
            await server.stop(0.5)
