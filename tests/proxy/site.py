"""The application of a proxy over a real broker and a real request client; tests play the backends."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import httpx
from redis.asyncio import Redis
from redis.exceptions import ResponseError
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.broker.queue.group.member import GROUP
from penstock.broker.registry.records import DEFAULTS, BackendRecord, BackendSpec, Change, EndpointRecord
from penstock.broker.wire.keys import Keys
from penstock.broker.wire.replies import Reply
from penstock.broker.wire.requests import Entry
from penstock.handles.calls.request_client import RequestClient
from penstock.proxy.app import App
from penstock.proxy.middleware import wrap
from penstock.proxy.server import Server

INSTANCE = "proxy-tests"

Answerer = Callable[[Entry], Reply | Awaitable[Reply | None] | None]
"""Returns the reply to an entry, or None to leave it unanswered."""


def text(of: str) -> Answerer:
    return lambda entry: Reply(entry.id, codec="text", body=of.encode())


def header_as_json(entry: Entry) -> Reply:
    header = entry.header
    params = {name: [type(value).__name__, str(value)] for name, value in header.path_params.items()}
    fields = {
        "endpoint": header.endpoint,
        "method": header.method,
        "path": header.path,
        "params": params,
        "query": header.query,
        "headers": header.headers,
        "codec": header.codec,
        "call": header.call,
        "request_id": header.request_id,
        "client": header.client,
        "deadline_ms": header.deadline_ms,
        "size": len(entry.body),
    }
    return Reply(entry.id, codec="json", body=json.dumps(fields).encode())


WAYS = ("asgi", "direct")
"""Paths through a proxy: its ASGI application, or the fast path."""


class Site:
    """A running application, and what tests need around it."""

    def __init__(self, redis: Redis, caller: RequestClient) -> None:
        self.redis, self.caller = redis, caller
        self.keys = Keys(INSTANCE)
        self.app: App = cast(Any, None)
        self.served: ASGIApp = cast(Any, None)
        """The application for a `Server`: wrapped if the path is ``asgi``."""
        self.http: httpx.AsyncClient = cast(Any, None)
        self.started: list[Entry] = []
        """Every entry that a backend claimed."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def endpoint(
        self,
        route: str | None,
        answer: Answerer | None = header_as_json,
        *,
        name: str = "e",
        methods: tuple[str, ...] = ("GET", "POST"),
        call_methods: tuple[str, ...] | None = None,
        max_queued_requests: int = DEFAULTS.max_queued_requests,
        max_queued_bytes: int = DEFAULTS.max_queued_bytes,
    ) -> None:
        """Create an endpoint with a backend of the same name; without an ``answer`` no entry is claimed."""
        config = BackendSpec(max_queued_requests=max_queued_requests, max_queued_bytes=max_queued_bytes)
        backend = BackendRecord(tag=name, version="1", code="", config=config)
        endpoint = EndpointRecord(
            name=name, route=route, methods=methods, traffic={name: 1.0}, call_methods=call_methods
        )
        await self.change(Change({name: backend}, {name: endpoint}))
        if answer is not None:
            task = asyncio.create_task(self._serve(name, answer))
            self._tasks.add(task)
            await asyncio.sleep(0)

    async def change(self, change: Change) -> None:
        version = await self.caller.registry.change(lambda _: change)
        await self.caller.watcher.wait_for(version, 5)

    async def _serve(self, backend: str, answer: Answerer) -> None:
        stream = self.keys.requests(backend)
        with contextlib.suppress(ResponseError):
            await self.redis.xgroup_create(stream, GROUP, "0", mkstream=True)
        # Checks a flag as well: redis-py can swallow a cancellation while it connects.
        while not self._closed:
            claimed: Any = await self.redis.xreadgroup(GROUP, "tests", {stream: ">"}, 16, 200)
            for ref, fields in claimed[0][1] if claimed else ():
                self._tasks.add(asyncio.create_task(self._answer(backend, ref, Entry.of(fields), answer)))

    async def _answer(self, backend: str, ref: bytes, entry: Entry, answer: Answerer) -> None:
        if entry.large:
            entry.body = cast(bytes, await self.redis.get(self.keys.body(backend, entry.id)))
        self.started.append(entry)
        reply = answer(entry)
        if isinstance(reply, Awaitable):
            reply = await reply
        if reply is None:
            return
        async with self.redis.pipeline() as pipe:
            fields = reply.fields()
            pipe.xadd(
                self.keys.replies(entry.caller), dict(zip(fields[::2], fields[1::2], strict=True)), nomkstream=True
            )
            pipe.xack(self.keys.requests(backend), GROUP, ref)
            pipe.xdel(self.keys.requests(backend), ref)
            await pipe.execute()

    async def queued(self, backend: str = "e") -> int:
        return await self.redis.xlen(self.keys.requests(backend))

    async def is_empty(self) -> bool:
        return await self.queued() == 0

    async def close(self, *, erase: bool) -> None:
        self._closed = True
        for task in self._tasks:
            task.cancel()
        # An exception in a backend fails the test.
        done = await asyncio.gather(*self._tasks, return_exceptions=True)
        raised = [e for e in done if isinstance(e, Exception)]
        if erase:
            await self.caller.registry.erase()
        await self.caller.close()
        if raised:
            raise raised[0]


class Connected:
    """The server side of one ASGI request, whose client disconnects when a test sets `gone`."""

    def __init__(self, site: Site, **scope: Any) -> None:
        self.gone = asyncio.Event()
        self.sent: list[Any] = []
        self.received = 0
        base: dict[str, Any] = {
            "type": "http",
            "method": "GET",
            "path": "/",
            "query_string": b"",
            "headers": [],
            "client": None,
        }
        self.served = asyncio.ensure_future(site.app({**base, **scope}, self.receive, self.send))

    async def receive(self) -> Any:
        self.received += 1
        if self.received == 1:
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)


@asynccontextmanager
async def running(
    url: str,
    *,
    way: str = "asgi",
    guest: bool = False,
    middlewares: tuple[Middleware, ...] = (),
    client: tuple[str, int] = ("127.0.0.1", 123),
    **options: Any,
) -> AsyncGenerator[Site]:
    """Run a site on the broker at ``url``; ``site.http`` is its client.

    The client uses ASGI, or HTTP to a server if the ``way`` is ``direct``. A ``guest`` is a second proxy of an instance
    that belongs to another site.
    """
    caller = RequestClient(url, INSTANCE)
    await caller.open()
    async with Redis.from_url(url) as redis:
        site = Site(redis, caller)
        site.app = App(caller, **options)
        caller.watcher.add_listener(site.app.apply)
        site.served = site.app if way == "direct" else _without_type(site.app)
        try:
            async with _client(site, way, middlewares, client) as site.http:
                yield site
        finally:
            site.app.close()
            await site.close(erase=not guest)


def _without_type(app: ASGIApp) -> ASGIApp:
    """Return an application that a server does not recognise as an `App`, so that it does not use the fast path."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, send)

    return call


@asynccontextmanager
async def _client(
    site: Site, way: str, middlewares: tuple[Middleware, ...], client: tuple[str, int]
) -> AsyncGenerator[httpx.AsyncClient]:
    if way == "asgi":
        transport = httpx.ASGITransport(wrap(site.app, middlewares), client=client)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            yield http
        return
    server = Server(wrap(site.app, middlewares), "127.0.0.1", 0)
    await server.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as http:
            yield http
    finally:
        await server.stop(0.1)
