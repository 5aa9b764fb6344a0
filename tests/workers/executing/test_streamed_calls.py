"""Replies that are produced after the call returned, for callers that do not accept streams."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.background import BackgroundTask
from starlette.responses import FileResponse, PlainTextResponse, StreamingResponse

from penstock.handles.errors import RequestCancelled
from penstock.workers.executing.request import Request
from tests.support.waiting import wait_until_async
from tests.workers.requests import backend_error_of, error_of, from_handle
from tests.workers.running import Start, fail, hooks


def respond(request: Request) -> Any:
    match request.data:
        case "stream":
            return StreamingResponse(iter(["a", "b", "c"]), 201, {"x-mine": "1"}, "text/plain")
        case "broken stream":
            return StreamingResponse(f"{1 / (1 - n)}" for n in range(2))
        case "generator":
            return (n for n in range(3))
        case ["file", path]:
            return FileResponse(path)
        case "background":
            return PlainTextResponse("first", background=BackgroundTask(hooks["background"], request))
        case _:
            return PlainTextResponse("plain", 202)


async def respond_async(request: Request) -> Any:
    return respond(request)


@pytest.mark.parametrize("function", [respond, respond_async])
async def test_responses_are_sent_whole_to_callers_that_do_not_stream(
    start: Start, function: object, tmp_path: Path
) -> None:
    replica = await start(function)
    reply = await replica.call(from_handle("plain"))
    assert (reply.status, reply.codec, reply.body) == (202, "response", b"plain")

    reply = await replica.call(from_handle("stream"))
    assert (reply.status, reply.codec, reply.body) == (201, "response", b"abc")
    assert ("x-mine", "1") in reply.headers

    (tmp_path / "a.txt").write_bytes(b"x" * 200_000)
    reply = await replica.call(from_handle(["file", str(tmp_path / "a.txt")]))
    assert (reply.status, len(reply.body)) == (200, 200_000)
    assert ("content-length", "200000") in reply.headers

    reply = await replica.call(from_handle(["file", str(tmp_path / "missing.txt")]))
    assert "missing.txt" in backend_error_of(reply).message

    assert backend_error_of(await replica.call(from_handle("broken stream"))).type_name == "ZeroDivisionError"
    reply = await replica.call(from_handle("generator"))
    assert backend_error_of(reply).type_name == "TypeError"
    assert "generator" in backend_error_of(reply).message


@pytest.mark.parametrize("function", [respond, respond_async])
async def test_a_background_task_runs_after_the_reply(
    start: Start, function: object, caplog: pytest.LogCaptureFixture
) -> None:
    replica = await start(function)
    entry = from_handle("background")
    answered: list[bool] = []
    hooks["background"] = lambda request: answered.append(entry.id in replica.replies)
    assert (await replica.call(entry)).body == b"first"
    await wait_until_async(lambda: answered)
    assert answered == [True]

    hooks["background"] = lambda request: fail(request)
    assert (await replica.call(from_handle("background"))).body == b"first"
    with caplog.at_level(logging.ERROR):
        await wait_until_async(lambda: "background task" in caplog.text)


async def test_a_stream_can_be_cancelled(start: Start) -> None:
    async def endless(request: Request) -> StreamingResponse:
        async def chunks() -> AsyncIterator[str]:
            while True:
                yield "."
                await asyncio.sleep(0.001)

        return StreamingResponse(chunks())

    replica = await start(endless)
    for pause_s in (0, 0.02):
        entry = from_handle()
        running = replica.run(entry)
        await asyncio.sleep(pause_s)
        running.cancel(entry)
        assert isinstance(error_of(await replica.reply_to(entry)), RequestCancelled)
