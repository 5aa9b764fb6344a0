"""The memory budget for bodies: it bounds what a proxy holds, and all of it is released."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import httpx
import pytest

from penstock.broker.wire.replies import Reply
from penstock.broker.wire.requests import Entry
from penstock.proxy.http1.buffers import Buffers, BuffersFull, default_bytes
from penstock.proxy.server import Server
from tests.proxy.site import running
from tests.support.waiting import wait_until_async

MIB = 1024 * 1024


async def test_bodies_beyond_the_budget_are_refused_until_others_are_answered(redis_url: str) -> None:
    gate = asyncio.Event()

    async def answer(entry: Entry) -> Reply:
        await gate.wait()
        return Reply(entry.id, body=b"%d" % len(entry.body), codec="bytes")

    async with running(redis_url, max_buffered_bytes=8 * MIB, max_body_bytes=4 * MIB) as site:
        await site.endpoint("/", answer)
        waiting = [asyncio.ensure_future(site.http.post("/", content=bytes(2 * MIB))) for _ in range(4)]
        await wait_until_async(lambda: site.app.buffers.requests_bytes == 8 * MIB)
        for size in (2 * MIB, 1000, 1):
            refused = await site.http.post("/", content=bytes(size))
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["type"] == "BuffersFull"
            assert "max_buffered_bytes is 8388608" in refused.json()["error"]["message"]
        assert (await site.http.get("/-/healthz")).status_code == 200
        gate.set()
        assert [(await response).content for response in waiting] == [b"2097152"] * 4
        assert (await site.http.post("/", content=bytes(4 * MIB))).content == b"4194304"
        assert site.app.buffers.requests_bytes == 0


async def test_failed_and_cancelled_requests_release_their_bytes(redis_url: str) -> None:
    async with running(redis_url, max_buffered_bytes=8 * MIB, max_body_bytes=4 * MIB, request_timeout_s=0.3) as site:
        await site.endpoint("/", None)
        late = await site.http.post("/", content=bytes(MIB))
        too_long = await site.http.post("/", content=_pieces(5))
        assert (late.status_code, too_long.status_code) == (504, 413)
        assert site.app.buffers.requests_bytes == 0
        leaving = asyncio.ensure_future(site.http.post("/", content=bytes(MIB)))
        await wait_until_async(lambda: site.app.buffers.requests_bytes == MIB)
        leaving.cancel()
        await wait_until_async(lambda: site.app.buffers.requests_bytes == 0)


async def test_unread_replies_use_up_the_budget(redis_url: str) -> None:
    def answer(entry: Entry) -> Reply:
        return Reply(entry.id, body=bytes(200_000), codec="bytes")

    async with running(redis_url, max_buffered_bytes=4 * MIB, max_body_bytes=MIB) as site:
        await site.endpoint("/", answer)
        server = Server(site.served, "127.0.0.1", 0)
        await server.start()
        site.app.buffers.measure = server.unsent_bytes
        slow: list[socket.socket] = []
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as reader:
                # Each connection takes as much as the kernel buffers, which is little here.
                while (await reader.get("/")).status_code == 200:
                    assert len(slow) < 500
                    connection = socket.socket()
                    slow.append(connection)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    connection.connect(("127.0.0.1", server.port))
                    await asyncio.get_running_loop().run_in_executor(
                        None, connection.sendall, 20 * b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
                    )
                assert server.unsent_bytes() <= 5 * MIB
                for connection in slow:
                    connection.close()

                async def serves_again() -> bool:
                    return (await reader.get("/")).status_code == 200

                await wait_until_async(serves_again)
        finally:
            for connection in slow:
                connection.close()
            await server.stop(0.1)


def test_the_estimate_of_unsent_replies_is_made_exact_before_a_refusal() -> None:
    buffers = Buffers(100)
    buffers.replies_bytes = 1_000_000
    buffers.measure = lambda: 40
    buffers.reserve(60)
    with pytest.raises(BuffersFull, match="holds 100 bytes"):
        buffers.reserve(1)
    buffers.release(60)
    buffers.reserve(60)


def test_the_default_budget_has_room_for_one_body() -> None:
    assert default_bytes(2**50) == 2**50
    assert default_bytes(1, 2) == default_bytes(1) // 2


async def _pieces(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield bytes(MIB)
