"""Pipelined requests: answered in order, one at a time, in bounded memory."""

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from penstock.broker.wire.replies import Reply
from penstock.broker.wire.requests import Entry
from penstock.proxy.http1.protocol import MAX_PIPELINED_BYTES
from tests.proxy.http1.raw_http import responses
from tests.proxy.site import WAYS, Site, text
from tests.proxy.test_response_streaming import serve
from tests.proxy.test_server import connected, serving, talk
from tests.support.waiting import wait_until_async

LARGE = bytes(i % 251 for i in range(600_000))

KINDS: dict[str, tuple[bytes, bytes, int, bytes | None]] = {
    # Method and target, what follows the host, status, and body; a body of None may be anything.
    "fast": (b"GET /s?fast=1", b"\r\n", 200, b"fast"),
    "body": (b"POST /s?echo=1", b"content-length: 5\r\n\r\nhello", 200, b"hello"),
    "large body": (b"POST /s?echo=1", b"content-length: %d\r\n\r\n" % len(LARGE) + LARGE, 200, LARGE),
    "chunked body": (
        b"POST /s?echo=1",
        b"transfer-encoding: chunked\r\n\r\n2\r\n\r\n\r\n3;a=b\r\nabc\r\n0\r\nx-trailer: 1\r\n\r\n",
        200,
        b"\r\nabc",
    ),
    "expecting": (b"GET /s?fast=1", b"expect: other\r\n\r\n", 200, b"fast"),
    "upgrade": (b"GET /s?fast=1", b"connection: upgrade\r\nupgrade: h2c\r\n\r\n", 200, b"fast"),
    "upgrade with a body": (
        b"POST /s?echo=1",
        b"connection: upgrade\r\nupgrade: h2c\r\ncontent-length: 5\r\n\r\nhello",
        200,
        b"hello",
    ),
    "head": (b"HEAD /s?fast=1", b"\r\n", 200, b""),
    "head of a page": (b"HEAD /-/routes", b"\r\n", 200, b""),
    "not found": (b"GET /nope", b"\r\n", 404, None),
    "not allowed": (b"DELETE /s", b"\r\n", 405, None),
    "healthz": (b"GET /-/healthz", b"\r\n", 200, b"ok"),
    "metrics": (b"GET /-/metrics", b"\r\n", 200, None),
    "large": (b"GET /s?large=1", b"\r\n", 200, LARGE),
    "streamed": (b"GET /s?stream=1", b"\r\n", 200, b"onetwo"),
    "error": (b"GET /s?fail=1", b"\r\n", 500, None),
}


def give(request: Any) -> Any:
    asked = request.query_params
    if "stream" in asked:
        return in_parts()
    if "fail" in asked:
        raise LookupError("asked for")
    return LARGE if "large" in asked else request.data if "echo" in asked else "fast"


def in_parts() -> Iterator[str]:
    yield "one"
    yield "two"


def request_of(kind: str, number: int, *, is_last: bool) -> bytes:
    line, rest, _, _ = KINDS[kind]
    close = b"connection: close\r\n" if is_last else b""
    return line + b" HTTP/1.1\r\nhost: x\r\nx-request-id: %d\r\n" % number + close + rest


def check(sent: list[str], answered: bytes) -> None:
    found = responses(answered, [KINDS[kind][0].split()[0].decode() for kind in sent])
    assert [one.id for one in found] == [str(number) for number in range(len(sent))], sent
    for kind, one in zip(sent, found, strict=True):
        _, _, status, body = KINDS[kind]
        assert (one.status, body is None or one.body == body) == (status, True), (sent, kind)


# Each pair, and all of them behind each other in both directions.
PIPELINES = [[first, second] for first in KINDS for second in KINDS] + [[*KINDS, *reversed(KINDS)]]


@pytest.mark.parametrize("middlewares", [(), (Middleware(GZipMiddleware),)], ids=["bare", "middleware"])
@pytest.mark.parametrize("way", WAYS)
async def test_responses_leave_in_the_order_of_their_requests(
    redis_url: str, way: str, middlewares: tuple[Middleware, ...]
) -> None:
    if middlewares and way == "direct":
        pytest.skip("the application has middlewares, so there is no way but ASGI")
    async with serve(redis_url, way, give, middlewares=middlewares) as served:
        for sent in PIPELINES:
            if any(b"upgrade: " in KINDS[kind][1] for kind in sent[-1:]):
                continue  # it has its own connection header, so it cannot be the last
            data = b"".join(request_of(kind, n, is_last=n == len(sent) - 1) for n, kind in enumerate(sent))
            check(sent, await served.raw(data))


class Gate:
    """A backend that replies to ``/slow`` once the gate opens, and to all else at once."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()

    async def __call__(self, entry: Entry) -> Reply:
        if entry.header.path == "/slow":
            await self.opened.wait()
        return Reply(entry.id, codec="text", body=entry.header.path.encode())


def get(path: str, *fields: str) -> bytes:
    return "\r\n".join((f"GET {path} HTTP/1.1", "host: x", *fields, "", "")).encode()


def cycles() -> int:
    """Return the number of requests that servers of this process have in memory."""
    gc.collect()
    return sum(isinstance(one, RequestResponseCycle) for one in gc.get_objects())


async def test_hundreds_of_requests_behind_a_slow_one_are_answered(site: Site) -> None:
    """Enough of them to exhaust Python's stack, if the end of one started the next."""
    gate = Gate()
    await site.endpoint("/slow", gate)
    async with serving(site) as server, connected(server) as (reader, writer):
        writer.write(
            get("/slow") + b"".join(get(f"/none/{n}") for n in range(2_000)) + get("/end", "connection: close")
        )
        await wait_until_async(lambda: site.started)
        gate.opened.set()
        found = responses(await asyncio.wait_for(reader.read(), 60))
    assert [one.status for one in found] == [200] + 2_001 * [404]
    assert [f"'/none/{n}'".encode() in one.body for n, one in enumerate(found[1:-1])] == 2_000 * [True]


async def test_many_short_requests_in_one_write_are_not_one_long_head(site: Site) -> None:
    await site.endpoint("/{x}", text("here"))
    async with serving(site) as server:
        sent = 3_000 * get("/none/none/none/none", "x: y") + get("/a", "connection: close")
        found = responses(await talk(server, sent, timeout_s=60))
    assert [one.status for one in found] == 3_000 * [404] + [200]


@pytest.mark.parametrize("size", [10, 100_000, 400_000])
@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_request_with_half_of_the_next_head_is_answered(site: Site, size: int, is_chunked: bool) -> None:
    await site.endpoint("/{x}", lambda entry: Reply(entry.id, codec="text", body=b"%d" % len(entry.body)))
    body = bytes(size)
    framing = b"content-length: %d\r\n\r\n%b" % (size, body)
    if is_chunked:
        framing = b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (size, body)
    async with serving(site) as server, connected(server) as (reader, writer):
        next_one = get("/b", "connection: close")
        writer.write(b"POST /a HTTP/1.1\r\nhost: x\r\n" + framing + next_one[:20])
        first = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
        assert first.startswith(b"HTTP/1.1 200 ")
        assert await reader.readexactly(len(str(size))) == b"%d" % size
        for byte in next_one[20:]:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        assert [one.status for one in responses(await asyncio.wait_for(reader.read(), 20))] == [200]


@pytest.mark.parametrize("count", [500, 5_000], ids=["few", "more than are read"])
async def test_a_connection_starts_one_request_at_a_time_and_none_after_it_is_lost(site: Site, count: int) -> None:
    await site.endpoint("/slow", None)
    sent = count * get("/slow")
    async with serving(site) as server:
        known = cycles()
        async with connected(server) as (_, writer):
            writer.write(get("/slow"))
            await wait_until_async(site.queued)
            writer.write(sent)
            await wait_until_async(lambda: waiting_bytes(server) >= min(len(sent), MAX_PIPELINED_BYTES))
            for _ in range(100):  # turns of the loop, each of which could start another
                await asyncio.sleep(0)
            assert waiting_bytes(server) < 10 * MAX_PIPELINED_BYTES
            assert await site.queued() == 1
            assert cycles() <= known + 1
        await wait_until_async(lambda: not server.connections)
        await wait_until_async(site.is_empty)
        assert site.app.metrics.of("e").by_status == {499: 1}  # no other request was routed
        await wait_until_async(lambda: cycles() <= known)


def waiting_bytes(server: Any) -> int:
    return sum(connection.waiting_bytes for connection in server.connections)


async def test_a_client_that_reads_nothing_gets_at_most_two_large_responses(site: Site) -> None:
    large = bytes(4_000_000)
    await site.endpoint("/large", lambda entry: Reply(entry.id, codec="bytes", body=large))
    await site.endpoint("/small", text("small"), name="other")
    async with serving(site) as server, connected(server) as (reader, writer):
        writer.write(11 * get("/large") + get("/large", "connection: close"))
        await wait_until_async(lambda: site.started)
        for _ in range(50):  # time for other connections
            assert b"small" in await talk(server, get("/small", "connection: close"))
        assert sum(entry.header.path == "/large" for entry in site.started) <= 2
        sizes = [len(one.body) for one in responses(await asyncio.wait_for(reader.read(), 120))]
    assert sizes == 12 * [len(large)]


@pytest.mark.parametrize(
    ("broken", "status"),
    [
        (b"NOT HTTP\r\n\r\n", 400),
        (b"GET /slow HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n", 400),
        (b"GET /slow HTTP/1.1\r\n" + b"x: y\r\n" * 200 + b"\r\n", 431),
        (b"GET /slow HTTP/1.1\r\nx: " + b"y" * 70_000, 431),
        (b"POST /slow HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400),
    ],
    ids=["no head", "two hosts", "many fields", "long head", "bad chunk"],
)
async def test_a_refused_request_does_not_take_the_response_of_the_one_before(
    site: Site, broken: bytes, status: int
) -> None:
    gate = Gate()
    await site.endpoint("/slow", gate)
    async with serving(site) as server, connected(server) as (reader, writer):
        writer.write(get("/slow") + broken + get("/slow"))
        await wait_until_async(lambda: site.started)
        gate.opened.set()
        found = responses(await asyncio.wait_for(reader.read(), 20))
    assert [one.status for one in found] == [200, status]
    assert found[1].headers["connection"] == "close"
    assert len(site.started) == 1


async def test_a_pipelined_100_continue_is_sent_in_its_turn(site: Site) -> None:
    gate = Gate()
    await site.endpoint("/slow", gate)
    async with serving(site) as server, connected(server) as (reader, writer):
        asking = b"POST /slow HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n"
        writer.write(get("/slow") + asking)
        await wait_until_async(lambda: site.started)
        gate.opened.set()
        assert (await asyncio.wait_for(reader.readuntil(b"/slow"), 20)).startswith(b"HTTP/1.1 200 ")
        assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20) == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"abc" + get("/none", "connection: close"))
        assert [one.status for one in responses(await asyncio.wait_for(reader.read(), 20))] == [200, 404]


async def test_no_request_behind_a_closing_response_is_started(site: Site) -> None:
    await site.endpoint("/{x}", text("here"))
    async with serving(site) as server:
        found = responses(await talk(server, get("/a", "connection: close") + 100 * get("/b")))
    assert [one.status for one in found] == [200]
    assert [entry.header.path for entry in site.started] == ["/a"]
