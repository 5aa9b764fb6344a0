"""Streamed replies over HTTP: a server, a broker, and a replica that runs the backend."""

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import FileResponse, StreamingResponse

from penstock.broker.queue.flow_control import WINDOW
from penstock.broker.registry.records import BackendRecord, BackendSpec, Change, EndpointRecord
from penstock.proxy.middleware import wrap
from penstock.proxy.server import Server
from penstock.workers.executing import user_code
from penstock.workers.executing.runner import Runner
from penstock.workers.replica import Replica
from tests.proxy.site import INSTANCE, WAYS, Site, running
from tests.support.waiting import wait_until_async
from tests.workers.serving import ByReference


class Serving:
    """A server whose one endpoint, ``/s``, is served by a worker of this process."""

    def __init__(self, site: Site, server: Server, worker: Replica, http: httpx.AsyncClient) -> None:
        self.site, self.server, self.worker, self.http = site, server, worker, http

    async def raw(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        try:
            writer.write(request)
            return await asyncio.wait_for(reader.read(), 10)
        finally:
            writer.close()

    async def is_idle(self) -> bool:
        return self.worker.in_progress == 0 and await self.site.queued("s") == 0


@asynccontextmanager
async def serve(
    url: str, way: str, function: Callable[..., Any], *, middlewares: tuple[Middleware, ...] = (), **options: Any
) -> AsyncGenerator[Serving]:
    async with running(url, way=way, **options) as site:
        backend = BackendRecord(tag="s", version="1", code="")
        endpoint = EndpointRecord(name="s", route="/s", methods=("GET", "HEAD", "POST"), traffic={"s": 1.0})
        await site.change(Change({"s": backend}, {"s": endpoint}))
        runner = await Runner.start("s", "s#1", user_code.dump(ByReference(function)), BackendSpec())
        worker = Replica(url, INSTANCE, "s", "s#1", runner)
        await worker.start()
        server = Server(wrap(site.served, middlewares), "127.0.0.1", 0)
        await server.start()
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as http:
                yield Serving(site, server, worker, http)
        finally:
            await server.stop(0.1)
            await worker.drain(5.0)
            await worker.stop()
            await runner.stop()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Any:
    return request.param


async def test_the_first_chunk_arrives_before_the_last_is_yielded(redis_url: str, way: str) -> None:
    go_on = asyncio.Event()

    async def give(request: Any) -> AsyncIterator[str]:
        yield "first "
        await go_on.wait()
        yield "second"

    async with serve(redis_url, way, give) as serving, serving.http.stream("GET", "/s") as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/plain; charset=utf-8"
        assert response.headers["transfer-encoding"] == "chunked"
        chunks = response.aiter_text()
        assert await chunks.__anext__() == "first "
        go_on.set()
        assert [chunk async for chunk in chunks] == ["second"]


VALUES: list[tuple[list[Any], str, bytes]] = [
    (["a", b"\xff", "b"], "text/plain; charset=utf-8", b"a\xffb"),
    ([b"a", "b"], "application/octet-stream", b"ab"),
    ([{"n": 1}, "two", None, [3]], "application/x-ndjson", b'{"n":1}\n"two"\nnull\n[3]\n'),
    ([None, "x" * 200_000], "application/x-ndjson", b'null\n"' + b"x" * 200_000 + b'"\n'),
]


@pytest.mark.parametrize(("values", "content_type", "body"), VALUES, ids=["text", "bytes", "json", "large"])
async def test_values_are_sent_unchanged_or_as_lines_of_json(
    redis_url: str, way: str, values: list[Any], content_type: str, body: bytes
) -> None:
    def give(request: Any) -> Iterator[Any]:
        yield from values

    async with serve(redis_url, way, give) as serving:
        response = await serving.http.get("/s")
        assert (response.status_code, response.headers["content-type"], response.content) == (200, content_type, body)
        # HTTP/1.0 has no chunks.
        head, _, rest = (await serving.raw(b"GET /s HTTP/1.0\r\n\r\n")).partition(b"\r\n\r\n")
        assert b"content-length: %d" % len(body) in head
        assert rest == body


async def test_a_generator_without_values_is_an_empty_response(redis_url: str, way: str) -> None:
    def give(request: Any) -> Iterator[str]:
        yield from ()

    async with serve(redis_url, way, give) as serving:
        response = await serving.http.get("/s")
        assert (response.status_code, response.content) == (200, b"")


async def test_a_streaming_response_keeps_its_status_and_headers(redis_url: str, way: str) -> None:
    async def give(request: Any) -> StreamingResponse:
        async def chunks() -> AsyncIterator[str]:
            for n in range(100):
                yield f"{n};"
                await asyncio.sleep(0)

        return StreamingResponse(chunks(), 202, {"x-mine": "1", "connection": "x-mine", "x-request-id": "no"})

    async with serve(redis_url, way, give) as serving:
        response = await serving.http.get("/s", headers={"x-request-id": "yes"})
        assert (response.status_code, response.headers["x-request-id"]) == (202, "yes")
        assert "x-mine" not in response.headers
        assert response.text == "".join(f"{n};" for n in range(100))


async def test_a_known_length_is_sent(redis_url: str, way: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 3 * WINDOW)

    def give(request: Any) -> FileResponse:
        return FileResponse(file)

    async with serve(redis_url, way, give) as serving:
        response = await serving.http.get("/s")
        assert response.headers["content-length"] == str(3 * WINDOW)
        assert response.content == file.read_bytes()
        response = await serving.http.head("/s")
        assert (response.headers["content-length"], response.content) == (str(3 * WINDOW), b"")
        await wait_until_async(serving.is_idle)


async def test_an_error_before_the_first_value_is_a_500_and_a_later_one_breaks_off(redis_url: str, way: str) -> None:
    def give(request: Any) -> Iterator[str]:
        if "late" in request.query_params:
            yield "some"
        raise LookupError("no more")

    async with serve(redis_url, way, give) as serving:
        response = await serving.http.get("/s")
        assert response.status_code == 500
        assert response.json()["error"] == {"type": "LookupError", "message": "no more"}
        with pytest.raises(httpx.RemoteProtocolError):
            await serving.http.get("/s?late=1")
        answer = await serving.raw(b"GET /s?late=1 HTTP/1.1\r\nhost: x\r\n\r\n")
        assert answer.endswith(b"4\r\nsome\r\n")  # no last chunk
        assert b" 500 " in (await serving.raw(b"GET /s?late=1 HTTP/1.0\r\n\r\n")).partition(b"\r\n")[0]


@pytest.mark.parametrize("middlewares", [(), (Middleware(GZipMiddleware, minimum_size=1),)], ids=["bare", "gzip"])
async def test_a_response_that_breaks_off_is_one_log_line_and_closes_its_connection(
    redis_url: str, way: str, middlewares: tuple[Middleware, ...], caplog: pytest.LogCaptureFixture
) -> None:
    def give(request: Any) -> Iterator[str]:
        yield "some"
        raise LookupError("no more")

    async with serve(redis_url, way, give, middlewares=middlewares) as serving:
        get = b"GET /s HTTP/1.1\r\nhost: x\r\naccept-encoding: gzip\r\n\r\n"
        answer = await serving.raw(get + get)
        assert answer.count(b"HTTP/1.1 200 OK") == 1  # the pipelined request gets no response
        assert b"transfer-encoding: chunked" in answer
        assert not answer.endswith(b"0\r\n\r\n")
        await wait_until_async(lambda: serving.site.app.metrics.in_flight == 0)
    logged = [(one.name, one.getMessage()) for one in caplog.records if one.levelname in ("WARNING", "ERROR")]
    ((name, message),) = [one for one in logged if one[0].startswith(("penstock.proxy", "uvicorn"))]
    assert name == "penstock.proxy"
    assert message.endswith("is cut off: LookupError: no more")


async def test_a_response_that_breaks_off_before_its_head_is_an_error(
    redis_url: str, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> str:
        raise LookupError("no more")

    async def nothing() -> AsyncIterator[str]:
        for _ in range(10):  # turns of the loop, in which the head would be sent
            await asyncio.sleep(0)
        yield fails()

    async def give(request: Any) -> StreamingResponse:
        return StreamingResponse(nothing())

    middlewares = (Middleware(GZipMiddleware, minimum_size=1),)
    async with serve(redis_url, way, give, middlewares=middlewares) as serving:
        get = b"GET /s HTTP/1.1\r\nhost: x\r\naccept-encoding: gzip\r\nconnection: close\r\n\r\n"
        answer = await serving.raw(get)
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert answer.endswith(b'\r\n\r\n{"error":{"type":"LookupError","message":"no more"}}')
    assert {one.name for one in caplog.records if one.levelname == "ERROR"} == {
        "penstock.backend"
    }  # of the user's code


@pytest.mark.parametrize("on_loop", [False, True])
async def test_a_client_that_disconnects_stops_the_generator(redis_url: str, way: str, on_loop: bool) -> None:
    ended = threading.Event()

    def give(request: Any) -> Iterator[bytes]:
        try:
            while True:
                yield b"x"
                threading.Event().wait(0.001)
        finally:
            ended.set()

    async def give_async(request: Any) -> AsyncIterator[bytes]:
        try:
            yield b"x"
            await asyncio.sleep(3600)
        finally:
            ended.set()

    async with serve(redis_url, way, give_async if on_loop else give) as serving:
        async with serving.http.stream("GET", "/s") as response:
            assert await response.aiter_raw().__anext__()
        await wait_until_async(ended.is_set, 10.0)  # a silent reader would have 20 s
        await wait_until_async(serving.is_idle)
        await wait_until_async(lambda: serving.site.app.metrics.in_flight == 0)


async def test_a_client_that_does_not_read_slows_the_generator(redis_url: str, way: str) -> None:
    size = 16 * 1024
    made: list[int] = []

    async def give(request: Any) -> AsyncIterator[bytes]:
        for n in range(4096):  # 64 MiB: more than the kernel and a server would buffer
            made.append(n)
            yield bytes(size)

    async with serve(redis_url, way, give) as serving:
        reader, writer = await asyncio.open_connection("127.0.0.1", serving.server.port, limit=1024)
        try:
            writer.write(b"GET /s HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            await reader.readline()
            replies = serving.site.keys.replies(serving.site.caller.id)
            stood_still = 0
            while stood_still < 20:
                before = len(made)
                await asyncio.sleep(0.05)
                stood_still = stood_still + 1 if len(made) == before else 0
            assert len(made) < 4096
            assert (await serving.site.redis.memory_usage(replies, samples=0) or 0) < 2 * WINDOW
            rest = b""
            while chunk := await reader.read(1 << 20):
                rest = rest[-16:] + chunk
            assert rest.endswith(b"0\r\n\r\n")
            assert len(made) == 4096
        finally:
            writer.close()


async def test_middlewares_see_the_stream(redis_url: str) -> None:
    def give(request: Any) -> Iterator[Any]:
        for n in range(1000):
            yield {"n": n}

    middlewares = (Middleware(GZipMiddleware, minimum_size=1),)
    async with serve(redis_url, "direct", give, middlewares=middlewares) as serving:
        response = await serving.http.get("/s")
        assert response.headers["content-encoding"] == "gzip"
        assert [json.loads(line)["n"] for line in response.text.splitlines()] == list(range(1000))


async def test_requests_pipelined_behind_a_stream_are_answered(redis_url: str, way: str) -> None:
    def give(request: Any) -> Iterator[str]:
        yield from ("a", "b")

    async with serve(redis_url, way, give) as serving:
        get = b"GET /s HTTP/1.1\r\nhost: x\r\n"
        answer = await serving.raw(get + b"\r\n" + get + b"\r\n" + get + b"connection: close\r\n\r\n")
        assert answer.count(b"HTTP/1.1 200 OK") == 3
        assert answer.count(b"0\r\n\r\n") == 3
