"""Bodies that break off behind middlewares never look complete, and clients that disconnect log no errors."""

import asyncio
import os
import zlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.proxy.middleware import wrap
from penstock.proxy.server import Server
from tests.proxy.site import running
from tests.proxy.test_response_streaming import Serving, serve
from tests.support.waiting import wait_until_async

GET = b"GET /s HTTP/1.1\r\nhost: x\r\naccept-encoding: gzip\r\n\r\n"
LAST_CHUNK = b"\r\n0\r\n\r\n"


class Passes(BaseHTTPMiddleware):
    """Starlette's base class for middlewares: it sends the body again, piece by piece."""

    async def dispatch(self, request: Request, call_next: Any) -> Response:
        return await call_next(request)  # type: ignore[no-any-return]


class Collects(BaseHTTPMiddleware):
    """Collects the body and sends it as a whole, even if it broke off."""

    async def dispatch(self, request: Request, call_next: Any) -> Response:
        response = await call_next(request)
        collected = b"".join([chunk async for chunk in response.body_iterator])
        return Response(collected, response.status_code)


class Plain:
    """A middleware that is an ASGI application."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app


class Swallows(Plain):
    """Ends the body itself if the application fails."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except Exception:
            await send({"type": "http.response.body", "body": b"the end", "more_body": False})


class Replaces(Plain):
    """Delays the response, and sends its own error if the application fails."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held: list[Message] = []

        async def hold(message: Message) -> None:
            held.append(message)

        try:
            await self.app(scope, receive, hold)
        except Exception:
            await Response("try elsewhere", 502)(scope, receive, send)
        else:
            for message in held:
                await send(message)


class FailsAtTheEnd(Plain):
    """Raises when the body ends."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def fail_at_the_end(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                raise ZeroDivisionError("a fault in a middleware")
            await send(message)

        await self.app(scope, receive, fail_at_the_end)


class Forgets(Plain):
    """Omits the end of the body."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def forget(message: Message) -> None:
            if message["type"] != "http.response.body" or message.get("more_body", False):
                await send(message)

        await self.app(scope, receive, forget)


class ReadsBodies(BaseHTTPMiddleware):
    """Reads the whole request body before it calls the application."""

    async def dispatch(self, request: Request, call_next: Any) -> Response:
        await request.body()
        return await call_next(request)  # type: ignore[no-any-return]


class Announces(Plain):
    """Sets an event when a request arrives."""

    def __init__(self, app: ASGIApp, came: asyncio.Event) -> None:
        super().__init__(app)
        self.came = came

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.came.set()
        await self.app(scope, receive, send)


GZIP = Middleware(GZipMiddleware, minimum_size=1)
PASSES = Middleware(Passes)
STACKS: dict[str, tuple[Middleware, ...]] = {
    "base": (PASSES,),
    "base twice": (PASSES, PASSES),
    "gzip around base": (GZIP, PASSES),
    "base around gzip": (PASSES, GZIP),
    "gzip within two": (PASSES, GZIP, PASSES),
    "swallows": (Middleware(Swallows),),
    "base around swallows": (PASSES, Middleware(Swallows)),
    "gzip around swallows": (GZIP, Middleware(Swallows)),
}


class Breaking:
    """A generator that raises after its first value, when a test sets `go_on`."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()

    async def __call__(self, request: Any) -> AsyncIterator[bytes]:
        yield b"first"
        await self.go_on.wait()
        raise LookupError("no more")


async def give(request: Any) -> AsyncIterator[bytes]:
    yield b"first"
    yield b"second"


async def broken_off(serving: Serving, code: Breaking) -> bytes:
    """Return the bytes that a client gets of a response that breaks off after its head."""
    reader, writer = await asyncio.open_connection("127.0.0.1", serving.server.port)
    try:
        writer.write(GET)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
        code.go_on.set()
        return head + await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()


def unchunked(answer: bytes) -> bytes:
    """Return the body of a chunked response, which may be incomplete."""
    rest, body = answer.partition(b"\r\n\r\n")[2], b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body, rest = body + rest[:length], rest[length + 2 :]
    return body


@pytest.mark.parametrize("stack", STACKS)
async def test_a_body_that_breaks_off_has_no_end(redis_url: str, stack: str, caplog: pytest.LogCaptureFixture) -> None:
    code = Breaking()
    async with serve(redis_url, "direct", code.__call__, middlewares=STACKS[stack]) as serving:
        answer = await broken_off(serving, code)
        await wait_until_async(lambda: serving.site.app.metrics.in_flight == 0)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"transfer-encoding: chunked" in answer
    assert not answer.endswith(LAST_CHUNK)
    body = unchunked(answer)
    assert b"the end" not in body
    if GZIP in STACKS[stack]:
        stream = zlib.decompressobj(wbits=31)
        assert b"first".startswith(stream.decompress(body))
        assert not stream.eof
    else:
        assert body == b"first"
    logged = [one.getMessage() for one in caplog.records if one.name.startswith(("penstock.proxy", "uvicorn"))]
    assert [message.partition(" is ")[2] for message in logged] == ["cut off: LookupError: no more"]


@pytest.mark.parametrize("stack", STACKS)
async def test_a_body_that_is_complete_has_one(redis_url: str, stack: str) -> None:
    async with serve(redis_url, "direct", give, middlewares=STACKS[stack]) as serving:
        response = await serving.http.get("/s")
        assert response.content == b"firstsecond"
        answer = await serving.raw(GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        assert answer.endswith(LAST_CHUNK)


async def test_a_middleware_that_collects_a_broken_body_does_not_send_it_as_complete(redis_url: str) -> None:
    code = Breaking()
    code.go_on.set()
    async with serve(redis_url, "direct", code.__call__, middlewares=(Middleware(Collects),)) as serving:
        response = await serving.http.get("/s")
        assert response.status_code == 500
        assert response.json()["error"] == {"type": "LookupError", "message": "no more"}
        assert response.headers["x-request-id"]
    async with serve(redis_url, "direct", give, middlewares=(Middleware(Collects),)) as serving:
        response = await serving.http.get("/s")
        assert (response.status_code, response.content) == (200, b"firstsecond")


async def test_a_middleware_may_respond_to_a_broken_body_with_its_own_error(redis_url: str) -> None:
    code = Breaking()
    code.go_on.set()
    async with serve(redis_url, "direct", code.__call__, middlewares=(PASSES, Middleware(Replaces))) as serving:
        response = await serving.http.get("/s")
        assert (response.status_code, response.text) == (502, "try elsewhere")


@pytest.mark.parametrize(("kind", "errors"), [(FailsAtTheEnd, 1), (Forgets, 0)])
async def test_a_body_that_a_middleware_breaks_off_has_no_end_either(
    redis_url: str, kind: Any, errors: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(redis_url, "direct", give, middlewares=(PASSES, Middleware(kind))) as serving:
        answer = await serving.raw(GET)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert unchunked(answer) == b"firstsecond"
    assert not answer.endswith(LAST_CHUNK)
    assert len([one for one in caplog.records if one.levelname == "ERROR"]) == errors


HANG_UPS: dict[str, tuple[Middleware, ...]] = {
    "plain": (),
    "base": (PASSES,),
    "gzip": (GZIP, PASSES),
    "reads": (Middleware(ReadsBodies),),
}


@pytest.mark.parametrize("stack", HANG_UPS.values(), ids=HANG_UPS)
@pytest.mark.parametrize("body", [b"x", b"x" * 10], ids=["in its body", "before the head"])
async def test_a_client_that_disconnects_logs_no_error(
    redis_url: str, stack: tuple[Middleware, ...], body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    came = asyncio.Event()
    async with running(redis_url, way="direct") as site:
        await site.endpoint("/s", None)
        server = Server(wrap(site.app, (Middleware(Announces, came=came), *stack)), "127.0.0.1", 0)
        await server.start()
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"POST /s HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n" + body)
            await asyncio.wait_for(came.wait(), 20)
            if len(body) == 10:
                await wait_until_async(site.queued)
            writer.close()
            await wait_until_async(lambda: site.app.metrics.in_flight == 0)
            await wait_until_async(site.is_empty)
        finally:
            await server.stop(0.1)
    assert [one.getMessage() for one in caplog.records if one.levelname in ("WARNING", "ERROR")] == []


@pytest.mark.parametrize("stack", [(), *STACKS.values()], ids=["bare", *STACKS])
async def test_a_client_that_disconnects_in_the_middle_of_a_stream_logs_no_error(
    redis_url: str, stack: tuple[Middleware, ...], caplog: pytest.LogCaptureFixture
) -> None:
    ended = asyncio.Event()

    async def go_on(request: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                yield os.urandom(4096)  # incompressible, so that no compressor buffers it
                await asyncio.sleep(0)
        finally:
            ended.set()

    async with serve(redis_url, "direct", go_on, middlewares=stack) as serving:
        reader, writer = await asyncio.open_connection("127.0.0.1", serving.server.port)
        writer.write(GET)
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
        await asyncio.wait_for(reader.read(100), 20)
        writer.close()
        await asyncio.wait_for(ended.wait(), 20)
        await wait_until_async(serving.is_idle)
        await wait_until_async(lambda: serving.site.app.metrics.in_flight == 0)
    assert [one.getMessage() for one in caplog.records if one.levelname in ("WARNING", "ERROR")] == []
