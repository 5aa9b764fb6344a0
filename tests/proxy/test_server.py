import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import httpx
import pytest

from penstock.broker.errors import ConfigError, PenstockError
from penstock.broker.wire.replies import Reply
from penstock.broker.wire.requests import Entry
from penstock.proxy import server as server_module
from penstock.proxy.http1 import time_limits
from penstock.proxy.http1.listening import PortInUse, is_wildcard
from penstock.proxy.server import Server
from tests.proxy.site import Site, running, text
from tests.support.waiting import wait_until_async


@asynccontextmanager
async def serving(site: Site, port: int = 0, *, shared: bool = False) -> AsyncGenerator[Server]:
    server = Server(site.served, "127.0.0.1", port, shared=shared)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0.5)


@asynccontextmanager
async def connected(server: Server) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def talk(server: Server, sent: bytes, timeout_s: float = 20.0) -> bytes:
    """Send bytes, and return the bytes received until the server closes."""
    async with connected(server) as (reader, writer):
        writer.write(sent)
        return await asyncio.wait_for(reader.read(), timeout_s)


class TestServing:
    async def test_port_0_picks_a_free_port(self, site: Site) -> None:
        await site.endpoint("/a/{x:int}", text("hello"))
        async with serving(site) as server, httpx.AsyncClient() as http:
            assert server.port > 0
            response = await http.get(f"http://127.0.0.1:{server.port}/a/1")
            assert (response.status_code, response.text) == (200, "hello")
            assert sorted(response.headers) == ["content-length", "content-type", "date", "x-request-id"]

    async def test_a_connection_serves_many_requests_with_and_without_bodies(self, site: Site) -> None:
        await site.endpoint("/", lambda entry: Reply(entry.id, codec="bytes", body=entry.body))
        limits = httpx.Limits(max_connections=1)
        async with serving(site) as server, httpx.AsyncClient(limits=limits) as http:
            url = f"http://127.0.0.1:{server.port}/"
            for size in (0, 10, 100_000, 1, 3_000_000):
                body = bytes(i % 251 for i in range(size))
                assert (await http.post(url, content=body)).content == body
                assert (await http.get(url)).content == b""
                assert (await http.head(url)).status_code == 200

    async def test_pipelined_requests_are_answered_in_order(self, site: Site) -> None:
        async def answer(entry: Entry) -> Reply:
            await asyncio.sleep(0.1 if entry.header.path == "/1" else 0)
            return Reply(entry.id, codec="text", body=entry.header.path.encode())

        await site.endpoint("/{x}", answer)
        async with serving(site) as server:
            requests = b"".join(b"GET /%d HTTP/1.1\r\nhost: x\r\n\r\n" % n for n in (1, 2))
            answered = await talk(server, requests + b"GET /3 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert answered.count(b"HTTP/1.1 200 OK") == 3
            assert answered.index(b"\r\n\r\n/1") < answered.index(b"\r\n\r\n/2") < answered.index(b"\r\n\r\n/3")

    async def test_a_client_that_expects_100_continue_sends_its_body(self, site: Site) -> None:
        await site.endpoint("/")
        async with serving(site) as server, connected(server) as (reader, writer):
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n")
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"abc")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")

    async def test_a_client_that_expects_100_continue_gets_a_refusal_at_once(self, redis_url: str) -> None:
        async with running(redis_url, max_body_bytes=10) as site:
            await site.endpoint("/")
            async with serving(site) as server:
                head = b"POST / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 11\r\n\r\n"
                assert (await talk(server, head)).startswith(b"HTTP/1.1 413 ")

    @pytest.mark.parametrize("size", [11, 100_000, 20_000_000])
    async def test_a_body_that_is_too_long_gets_a_413(self, redis_url: str, size: int) -> None:
        async with running(redis_url, max_body_bytes=10) as site:
            await site.endpoint("/")
            async with serving(site) as server, httpx.AsyncClient() as http:
                url = f"http://127.0.0.1:{server.port}/"
                for _ in range(3):
                    assert (await http.post(url, content=b"x" * size)).status_code == 413
                assert not site.started

    async def test_a_client_that_disconnects_cancels_its_request_and_is_counted(self, site: Site) -> None:
        await site.endpoint("/", None)
        async with serving(site) as server:
            async with connected(server) as (_, writer):
                writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                await wait_until_async(site.queued)
            await wait_until_async(site.is_empty)

    async def test_upgrades_are_ignored(self, site: Site) -> None:
        await site.endpoint("/", text("plain"))
        async with serving(site) as server:
            head = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
            async with connected(server) as (reader, writer):
                writer.write(head)
                assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200 ")


class TestInvalidHTTP:
    @pytest.mark.parametrize(
        "garbage",
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"GET / HTTP/1.1\r\ncontent-length: abc\r\n\r\n",
            b"GET / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
            b"POST / HTTP/1.1\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
            b"GET / HTTP/1.1\r\nx y: 1\r\n\r\n",
            b"GET / HTTP/1.1\r\nx: a\x00b\r\n\r\n",
            b"\r\n\r\n\x00\r\n\r\n",
        ],
    )
    async def test_invalid_http_is_refused_and_harms_no_other_connection(self, site: Site, garbage: bytes) -> None:
        await site.endpoint("/", text("fine"))
        async with serving(site) as server, httpx.AsyncClient() as http:
            assert (await talk(server, garbage)).startswith(b"HTTP/1.1 400 ")
            assert (await http.get(f"http://127.0.0.1:{server.port}/")).text == "fine"
            assert all(entry.header.method == "GET" for entry in site.started)


class TestLimits:
    @pytest.mark.parametrize("chunk", [1 << 10, 1 << 20])
    async def test_an_endless_head_is_refused(self, site: Site, chunk: int) -> None:
        async with serving(site) as server, connected(server) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nx: ")
            with contextlib.suppress(ConnectionError):
                for _ in range(0, 1 << 20, chunk):
                    writer.write(b"a" * chunk)
                    await writer.drain()
            assert (await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)).startswith(b"HTTP/1.1 431 ")

    async def test_a_long_path_counts_as_part_of_the_head(self, site: Site) -> None:
        async with serving(site) as server:
            assert (await talk(server, b"GET /" + b"a" * 200_000)).startswith(b"HTTP/1.1 431 ")

    async def test_heads_below_the_limit_and_larger_bodies_pass(self, site: Site) -> None:
        await site.endpoint("/")
        async with serving(site) as server, httpx.AsyncClient() as http:
            url = f"http://127.0.0.1:{server.port}/"
            received = (await http.post(url, headers={"x": "a" * 60_000}, content=b"b" * 200_000)).json()
            assert received["size"] == 200_000
            assert ["x", "a" * 60_000] in received["headers"]

    @pytest.mark.parametrize(
        ("begun", "expected"), [(b"", b""), (b"GET / HTTP/1.1\r\n", b"HTTP/1.1 408 Request Timeout")]
    )
    async def test_a_slow_head_ends_the_connection(
        self, site: Site, monkeypatch: pytest.MonkeyPatch, begun: bytes, expected: bytes
    ) -> None:
        monkeypatch.setattr(time_limits, "HEAD_TIMEOUT_S", 0.3)
        monkeypatch.setattr(server_module, "_SWEEP_S", 0.1)
        async with serving(site) as server, connected(server) as (reader, writer):
            writer.write(begun)
            answered = await asyncio.wait_for(reader.read(), 20)
            assert answered.partition(b"\r\n")[0] == expected
            assert (b"\r\nconnection: close\r\n" in answered) == bool(expected)

    async def test_a_response_that_is_not_read_ends_the_connection(
        self, site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(time_limits, "STALL_TIMEOUT_S", 0.3)
        monkeypatch.setattr(server_module, "_SWEEP_S", 0.1)
        await site.endpoint("/", lambda entry: Reply(entry.id, codec="bytes", body=b"x" * 20_000_000))
        async with serving(site) as server, connected(server) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            await reader.read(10)
            await asyncio.sleep(1.0)
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(20_000_000)


class TestPorts:
    @pytest.mark.parametrize("shares", [False, True])
    async def test_a_port_in_use_is_refused_by_name(self, site: Site, shares: bool) -> None:
        with socket.socket() as taken:
            if shares:
                taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(PortInUse, match=f"127.0.0.1:{port}: the port is in use") as raised:
                await Server(site.app, "127.0.0.1", port).start()
            assert isinstance(raised.value, ConfigError)

    async def test_proxies_of_one_node_share_a_port(self, redis_url: str) -> None:
        async with (
            running(redis_url) as one,
            running(redis_url, guest=True) as other,
            serving(one) as first,
            serving(other, first.port, shared=True) as second,
        ):
            assert second.port == first.port
            async with httpx.AsyncClient(headers={"connection": "close"}) as http:
                for _ in range(100):
                    assert (await http.get(f"http://127.0.0.1:{first.port}/x")).status_code == 404
            counts = [site.app.metrics.of("").by_status.get(404, 0) for site in (one, other)]
            assert sum(counts) == 100
            assert min(counts) > 10

    async def test_a_port_can_be_used_again_at_once(self, site: Site) -> None:
        async with serving(site) as server, httpx.AsyncClient() as http:
            await http.get(f"http://127.0.0.1:{server.port}/")
        async with serving(site, server.port):
            pass

    @pytest.mark.parametrize(
        ("host", "because"),
        [("192.0.2.1", "not an address of this machine"), ("no.such.host.invalid", "cannot be resolved")],
    )
    async def test_a_foreign_host_is_refused_by_name(self, site: Site, host: str, because: str) -> None:
        with pytest.raises(ConfigError, match=because) as raised:
            await Server(site.app, host, 0).start()
        assert host in str(raised.value)

    async def test_a_host_name_is_served_on_all_its_addresses(self, site: Site) -> None:
        server = Server(site.served, "localhost", 0)
        await server.start()
        try:
            async with httpx.AsyncClient() as http:
                assert (await http.get(f"http://localhost:{server.port}/")).status_code == 404
                assert (await http.get(f"http://127.0.0.1:{server.port}/")).status_code == 404
        finally:
            await server.stop(1)

    def test_wildcards_are_not_addresses_for_urls(self) -> None:
        assert [is_wildcard(host) for host in ("0.0.0.0", "::", "", "127.0.0.1", "::1", "localhost")] == [
            True,
            True,
            True,
            False,
            False,
            False,
        ]


class TestStopping:
    async def test_requests_in_progress_are_finished(self, site: Site) -> None:
        release = asyncio.Event()

        async def later(entry: Entry) -> Reply:
            await release.wait()
            return Reply(entry.id, codec="text", body=b"done")

        await site.endpoint("/", later)
        async with httpx.AsyncClient() as http:
            server = Server(site.served, "127.0.0.1", 0)
            await server.start()
            url = f"http://127.0.0.1:{server.port}/"
            asked = asyncio.ensure_future(http.get(url))
            await wait_until_async(lambda: site.started)
            site.app.draining = True
            stopping = asyncio.ensure_future(server.stop(10))
            await asyncio.sleep(0.1)
            async with httpx.AsyncClient() as other:
                with pytest.raises(httpx.ConnectError):
                    await other.get(url)
            release.set()
            response = await asked
            assert (response.text, response.headers["connection"]) == ("done", "close")
            await asyncio.wait_for(stopping, 5)

    async def test_requests_that_are_unfinished_in_time_get_503(self, site: Site) -> None:
        await site.endpoint("/", None)
        server = Server(site.served, "127.0.0.1", 0)
        await server.start()
        async with httpx.AsyncClient() as http:
            asked = asyncio.ensure_future(http.get(f"http://127.0.0.1:{server.port}/"))
            await wait_until_async(site.queued)
            site.app.draining = True
            await asyncio.wait_for(server.stop(0.5), 5)
            response = await asked
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert "shutting down" in response.text
        await wait_until_async(site.is_empty)

    async def test_check_reports_whether_the_server_runs(self, site: Site) -> None:
        async with serving(site) as server:
            await server.check()
        with pytest.raises(PenstockError, match=f"127.0.0.1:{server.port} has ended"):
            await server.check()

    async def test_idle_connections_do_not_delay_the_stop(self, site: Site) -> None:
        async with httpx.AsyncClient() as http:
            server = Server(site.served, "127.0.0.1", 0)
            await server.start()
            await http.get(f"http://127.0.0.1:{server.port}/")
            async with connected(server):
                await asyncio.wait_for(server.stop(30), 5)

    async def test_clients_with_open_connections_move_to_another_proxy_without_an_error(self, redis_url: str) -> None:
        async with running(redis_url) as one, running(redis_url, guest=True) as other:
            await one.endpoint("/", text("one"))
            async with serving(one) as stays:
                leaves = Server(other.app, "127.0.0.1", stays.port, shared=True)
                await leaves.start()
                answered = 0
                going_on = True

                async def client() -> None:
                    nonlocal answered
                    async with httpx.AsyncClient() as http:
                        while going_on:
                            response = await http.get(f"http://127.0.0.1:{stays.port}/")
                            assert response.status_code == 200
                            answered += 1

                clients: list[asyncio.Future[None]] = []
                # The kernel chooses one of the two for each connection: open more until the one that stops has some.
                while other.app.metrics.of("e").by_status.get(200, 0) <= 20:
                    clients += [asyncio.ensure_future(client()) for _ in range(8)]
                    before = answered
                    await wait_until_async(lambda: answered >= before + 100)  # noqa: B023 - it is awaited here
                other.app.draining = True
                await leaves.stop(5)
                before = answered
                await wait_until_async(lambda: answered > before + 50)
                going_on = False
                await asyncio.gather(*clients)

    async def test_clients_that_connect_during_the_stop_get_their_responses(self, redis_url: str) -> None:
        async with running(redis_url) as one, running(redis_url, guest=True) as other:
            await one.endpoint("/", text("one"))
            async with serving(one) as stays:
                answered = 0
                going_on = True

                async def client() -> None:
                    nonlocal answered
                    while going_on:
                        answer = await talk(stays, b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                        assert answer.startswith(b"HTTP/1.1 200 ")
                        answered += 1

                clients = [asyncio.ensure_future(client()) for _ in range(16)]
                for _ in range(6):
                    other.app.draining = False
                    leaves = Server(other.app, "127.0.0.1", stays.port, shared=True)
                    await leaves.start()
                    before = answered
                    await wait_until_async(lambda: answered > before + 50)  # noqa: B023 - it is awaited here
                    other.app.draining = True
                    await leaves.stop(5)
                going_on = False
                await asyncio.gather(*clients)
