"""The lifespan of an application in a replica."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from penstock import serve
from penstock.handles.errors import BackendError
from tests.workers.asgi.apps import body, deployed, head
from tests.workers.requests import from_http
from tests.workers.running import Start


def starlette(lifespan: Callable[[Starlette], Any]) -> Starlette:
    async def show(request: Request) -> PlainTextResponse:
        request.state.note = "of one request"
        return PlainTextResponse(f"{request.state.model} {serve.get_current_replica_tag()}")

    return Starlette(routes=[Route("/", show)], lifespan=lifespan)


async def test_startup_precedes_and_shutdown_follows_all_requests(start: Start) -> None:
    events: list[str] = []

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[dict[str, Any]]:
        events.append(f"up in {serve.get_current_replica_tag()}")
        yield {"model": "loaded"}
        events.append("down")

    replica = await start(deployed(starlette(lifespan)))
    assert events == ["up in b#1"]
    for _ in range(2):
        assert (await replica.call(from_http(method="GET"))).body == b"loaded b#1"
    assert events == ["up in b#1"]
    assert await replica.runner.stop(1.0)
    assert events == ["up in b#1", "down"]


async def test_each_request_gets_a_copy_of_the_state(start: Start) -> None:
    states: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            scope["state"]["shared"] = [1]
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        states.append(scope["state"])
        scope["state"]["own"] = len(states)
        await send(head())
        await send(body())

    replica = await start(deployed(app))
    for _ in range(2):
        await replica.call(from_http())
    assert states == [{"shared": [1], "own": 1}, {"shared": [1], "own": 2}]
    assert states[0]["shared"] is states[1]["shared"]


async def test_a_failing_startup_fails_the_replica_with_its_traceback(start: Start) -> None:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        if app.debug is False:
            raise FileNotFoundError("no weights")
        yield

    with pytest.raises(BackendError) as raised:
        await start(deployed(starlette(lifespan)))
    assert (raised.value.type_name, raised.value.message) == ("FileNotFoundError", "no weights")
    assert 'raise FileNotFoundError("no weights")' in raised.value.traceback
    assert "workers/asgi/lifespan.py" not in raised.value.traceback


def failing(message: str) -> Callable[..., Any]:
    """Return an application that reports a failed startup and returns, as some frameworks do."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "lifespan"
        await receive()
        await send({"type": "lifespan.startup.failed", "message": message})

    return app


@pytest.mark.parametrize(
    ("message", "type_name", "text"),
    [
        ("no weights", "StartupFailed", "no weights"),
        ("", "StartupFailed", "the application gave no reason"),
        ("Traceback (most recent call last):\n  File ...\nOSError: no weights\n", "OSError", "no weights"),
    ],
)
async def test_a_startup_that_is_reported_as_failed_fails_the_replica(
    start: Start, message: str, type_name: str, text: str
) -> None:
    with pytest.raises(BackendError) as raised:
        await start(deployed(failing(message)))
    assert (raised.value.type_name, raised.value.message) == (type_name, text)


async def test_an_exception_after_the_startup_message_is_a_failed_startup(start: Start) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            sys.exit("no weights")

    with pytest.raises(BackendError) as raised:
        await start(deployed(app))
    assert (raised.value.type_name, raised.value.message) == ("SystemExit", "no weights")


async def raises_at_once(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        raise ValueError(f"only HTTP is served, not {scope['type']}")
    await send(head())
    await send(body(b"served"))


async def returns_at_once(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await send(head())
        await send(body(b"served"))


async def takes_all_for_http(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send(head())
    await send(body(b"served"))


@pytest.mark.parametrize("app", [raises_at_once, returns_at_once, takes_all_for_http])
async def test_an_application_without_a_lifespan_is_served(start: Start, app: Any) -> None:
    replica = await start(deployed(app))
    assert (await replica.call(from_http())).body == b"served"
    assert await replica.runner.stop(1.0)


def ending(*messages: dict[str, Any], error: BaseException | None = None, hangs: bool = False) -> Callable[..., Any]:
    """Return an application that sends ``messages`` at its shutdown, and then raises or hangs."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "lifespan"
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        for message in messages:
            await send(message)
        if error is not None:
            raise error
        if hangs:
            await asyncio.Event().wait()

    return app


@pytest.mark.parametrize(
    ("app", "logged"),
    [
        (ending({"type": "lifespan.shutdown.failed", "message": "cannot flush"}), "failed: cannot flush"),
        (ending(error=RuntimeError("cannot flush")), "RuntimeError: cannot flush"),
        (ending(hangs=True), "did not shut down within 1 s"),
        (ending({"type": "http.response.start"}), "cannot send 'http.response.start' now"),
    ],
)
async def test_a_failing_shutdown_is_logged_and_the_replica_ends(
    start: Start, caplog: pytest.LogCaptureFixture, app: Any, logged: str
) -> None:
    replica = await start(deployed(app))
    assert await replica.runner.stop(0.0)
    assert logged in caplog.text


async def test_a_replica_that_is_stopped_while_it_starts_cancels_the_startup(start: Start) -> None:
    entered, left = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    starting = asyncio.ensure_future(start(deployed(app)))
    await entered.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert left.is_set()
