"""The fast path: which requests it leaves to ASGI, and that clients see no difference."""

import asyncio
import gc
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware

from penstock.broker.wire.replies import Reply
from penstock.broker.wire.requests import Entry
from penstock.proxy.http1 import fast_path
from penstock.proxy.http1.disconnects import WATCH_AFTER_S, ClientDisconnected
from penstock.proxy.http1.fast_path import FastPath, protocol_for
from penstock.proxy.middleware import wrap
from penstock.proxy.server import Server
from tests.proxy.site import WAYS, Answerer, Site, running, text
from tests.support.waiting import wait_until_async


async def raw(server: Server, *sent: bytes) -> bytes:
    """Send pieces separately, and return the bytes received until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        for piece in sent:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.02)  # usually they then arrive separately; the test holds either way
        return await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()


def without_date(answer: bytes) -> list[bytes]:
    return [line for line in answer.split(b"\r\n") if not line.startswith(b"date: ")]


REQUESTS = {
    "get": [b"GET /a HTTP/1.1\r\nhost: x\r\nx-request-id: r\r\nconnection: close\r\n\r\n"],
    "http/1.0": [b"GET /a HTTP/1.0\r\nx-request-id: r\r\n\r\n"],
    "head": [b"HEAD /a HTTP/1.1\r\nhost: x\r\nx-request-id: r\r\nconnection: close\r\n\r\n"],
    "post": [b"POST /a HTTP/1.1\r\nhost: x\r\nx-request-id: r\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi"],
    "a body apart": [
        b"POST /a HTTP/1.1\r\nhost: x\r\nx-request-id: r\r\nconnection: close\r\ncontent-length: 2\r\n\r\n",
        b"h",
        b"i",
    ],
    "a body bit by bit": [
        b"POST /a HTTP/1.1\r\nhost: x\r\nx-request-id: r\r\nconnection: close\r\ncontent-length: 8\r\n\r\n",
        *[b"x"] * 8,
    ],
    "pipelined, the last body apart": [
        b"POST /a HTTP/1.1\r\nhost: x\r\nx-request-id: r\r\ncontent-length: 2\r\n\r\nhi"
        b"POST /a HTTP/1.1\r\nhost: x\r\nx-request-id: s\r\ncontent-length: 3\r\nconnection: close\r\n\r\nl",
        b"o",
        b"w",
    ],
    "chunked": [
        b"POST /a HTTP/1.1\r\nhost: x\r\nx-request-id: r\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n",
        b"2\r\nhi\r\n0\r\n\r\n",
    ],
    "a long body": [
        b"POST /a HTTP/1.1\r\nhost: x\r\nx-request-id: r\r\nconnection: close\r\ncontent-length: 100000\r\n\r\n",
        b"x" * 100_000,
    ],
    "too long a body": [
        b"POST /a HTTP/1.1\r\nhost: x\r\nx-request-id: r\r\nconnection: close\r\ncontent-length: 200000\r\n\r\n",
    ],
    "expect": [
        b"POST /a HTTP/1.1\r\nhost: x\r\nx-request-id: r\r\nconnection: close\r\nexpect: 100-continue\r\n"
        b"content-length: 2\r\n\r\n",
        b"hi",
    ],
    "pipelined": [
        b"GET /a HTTP/1.1\r\nhost: x\r\nx-request-id: r\r\n\r\n"
        b"GET /none HTTP/1.1\r\nhost: x\r\nx-request-id: s\r\n\r\n"
        b"POST /a HTTP/1.1\r\nhost: x\r\nx-request-id: t\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhi"
    ],
    "no such path": [b"GET /b HTTP/1.1\r\nhost: x\r\nx-request-id: r\r\nconnection: close\r\n\r\n"],
    "no such method": [b"PUT /a HTTP/1.1\r\nhost: x\r\nx-request-id: r\r\nconnection: close\r\n\r\n"],
    "a private method": [
        b"GET /a HTTP/1.1\r\nhost: x\r\nx-request-id: r\r\nx-serve-call-method: _m\r\nconnection: close\r\n\r\n"
    ],
    "of itself": [b"GET /-/routes HTTP/1.1\r\nhost: x\r\nx-request-id: r\r\nconnection: close\r\n\r\n"],
    "a bad chunk": [
        b"POST /a HTTP/1.1\r\nhost: x\r\nx-request-id: r\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
}


@pytest.mark.parametrize("sent", REQUESTS.values(), ids=REQUESTS)
async def test_the_response_is_the_same_on_both_paths(redis_url: str, sent: list[bytes]) -> None:
    answers: list[list[bytes]] = []
    for way in WAYS:
        async with running(redis_url, way=way, max_body_bytes=150_000) as site:
            await site.endpoint("/a", lambda entry: Reply(entry.id, codec="json", body=b"%d" % len(entry.body)))
            server = Server(site.served, "127.0.0.1", 0)
            await server.start()
            try:
                answers.append(without_date(await raw(server, *sent)))
            finally:
                await server.stop(0.1)
            assert "penstock_http_requests_in_flight 0\n" in site.app.metrics.render()
    assert answers[0] == answers[1]
    assert answers[0][0].startswith(b"HTTP/1.1 ")


async def test_a_client_that_disconnects_cancels_its_request(redis_url: str) -> None:
    async with running(redis_url, way="direct") as site:
        await site.endpoint("/", answer=None)
        with pytest.raises(httpx.ReadTimeout):
            await site.http.get("/", timeout=httpx.Timeout(10, read=0.2))
        await wait_until_async(lambda: 'status="499"} 1' in site.app.metrics.render())
        await wait_until_async(site.is_empty)
        assert "in_flight 0" in site.app.metrics.render()


@pytest.mark.parametrize("way", WAYS)
async def test_a_client_that_disconnects_in_its_body_is_counted(
    redis_url: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_path, "_BODY_WAIT_S", 60.0)
    async with running(redis_url, way=way) as site:
        await site.endpoint("/", answer=None)
        server = Server(site.served, "127.0.0.1", 0)
        await server.start()
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nhalf of it")
        await writer.drain()
        writer.close()
        await wait_until_async(lambda: 'status="499"} 1' in site.app.metrics.render())
        assert "in_flight 0" in site.app.metrics.render()
        await server.stop(0.1)


async def test_unfinished_requests_get_503_at_the_end(redis_url: str) -> None:
    async with running(redis_url, way="direct") as site:
        await site.endpoint("/", answer=None)
        server = Server(site.served, "127.0.0.1", 0)
        await server.start()
        asking = asyncio.ensure_future(raw(server, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"))
        await wait_until_async(lambda: _is_queued(site))
        site.app.draining = True
        await server.stop(0.2)
        answer = await asking
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: 1\r\n" in answer
        await wait_until_async(site.is_empty)


async def test_middlewares_disable_the_fast_path(redis_url: str) -> None:
    async with running(redis_url, way="direct", middlewares=(Middleware(GZipMiddleware, minimum_size=10),)) as site:
        assert protocol_for(site.app) is FastPath
        assert protocol_for(wrap(site.app, [Middleware(GZipMiddleware)])) is not FastPath
        await site.endpoint("/", text("x" * 1_000))
        response = await site.http.get("/", headers={"accept-encoding": "gzip"})
        assert response.headers["content-encoding"] == "gzip"
        assert response.text == "x" * 1_000


async def slow_echo(entry: Entry) -> Reply:
    await asyncio.sleep(3 * WATCH_AFTER_S)  # so that its client is watched
    return Reply(entry.id, codec="bytes", body=entry.body)


@contextmanager
def uncollected() -> Generator[list[object]]:
    """Context manager that then lists our objects that became garbage in it."""
    ours: list[object] = []
    gc.collect()
    gc.disable()
    try:
        yield ours
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        ours += [one for one in gc.garbage if type(one).__module__.startswith("penstock.")]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("answer", [text("hello"), slow_echo])
@pytest.mark.parametrize("size", [0, 100_000])
async def test_a_request_leaves_nothing_for_the_garbage_collector(redis_url: str, answer: Answerer, size: int) -> None:
    """A cycle keeps large bodies until a collection, and a collection delays every request."""
    async with running(redis_url, way="direct") as site:
        await site.endpoint("/", answer)
        for _ in range(3):
            await site.http.post("/", content=bytes(size))
        site.started.clear()
        with uncollected() as ours:
            for _ in range(5):
                assert (await site.http.post("/", content=bytes(size))).status_code == 200
    assert ours == []


async def test_a_client_that_disconnects_leaves_no_body_for_the_garbage_collector(redis_url: str) -> None:
    async with running(redis_url, way="direct") as site:
        await site.endpoint("/", answer=None)
        with uncollected() as ours:
            for _ in range(3):
                with pytest.raises(httpx.ReadTimeout):
                    await site.http.post("/", content=bytes(100_000), timeout=httpx.Timeout(10, read=0.2))
            await wait_until_async(lambda: 'status="499"} 3' in site.app.metrics.render())
    assert [one for one in ours if isinstance(one, ClientDisconnected)] == []


async def _is_queued(site: Site) -> bool:
    return await site.queued() == 1


async def test_a_request_whose_dispatch_fails_late_gets_one_response(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its reply would be taken for the response to the next request of the connection."""
    async with running(redis_url, way="direct") as site:
        await site.endpoint(
            "/{name}", answer=lambda entry: Reply(entry.id, codec="text", body=entry.header.path.encode())
        )
        dispatch = site.caller.dispatch

        def fail_late(*args: Any, **kwargs: Any) -> Any:
            dispatch(*args, **kwargs)
            raise RuntimeError("after it was published")

        monkeypatch.setattr(site.caller, "dispatch", fail_late)
        reader, writer = await asyncio.open_connection(site.http.base_url.host, site.http.base_url.port)
        writer.write(b"GET /first HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 500 ")
        await wait_until_async(lambda: len(site.started) == 1)
        await wait_until_async(lambda: not site.caller.in_flight.by_id)  # its reply has arrived
        monkeypatch.undo()
        writer.write(b"GET /second HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        rest = await asyncio.wait_for(reader.read(), 20)
        writer.close()
        assert rest.count(b"HTTP/1.1 ") == 1
        assert rest.endswith(b"\r\n\r\n/second")
    assert "after it was published" in caplog.text
