"""The traces that errors of user code leave in the log of their replica."""

import asyncio
import json
from collections.abc import Generator
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from penstock import serve
from penstock.handles.errors import BackendError
from penstock.runtime.logs import JsonFormatter
from penstock.workers.error_log import ErrorLog
from penstock.workers.executing.request import Request
from tests.support.log_lines import Lines, logged_lines
from tests.support.waiting import wait_until_async
from tests.workers.requests import from_handle, from_http
from tests.workers.running import Start, fail, fail_async


@pytest.fixture
def lines() -> Generator[Lines]:
    with logged_lines("penstock.backend") as lines:
        yield lines


@pytest.mark.parametrize("function", [fail, fail_async])
async def test_an_exception_is_one_error_line_with_request_backend_replica_and_traceback(
    start: Start, lines: Lines, function: Any
) -> None:
    replica = await start(function)
    await replica.call(from_http(b'"value"', content_type="application/json", request_id="r7"))
    assert lines.ids == ["r7"]
    (record,) = lines.records
    assert record.levelname == "ERROR"
    first, *traceback = record.getMessage().splitlines()
    assert first == "backend 'b' raised ValueError: bad input (replica b#1)"
    assert traceback[0] == "Traceback (most recent call last):"
    assert traceback[-1] == "ValueError: bad input"
    assert not [line for line in traceback if "/executing/" in line]


async def test_the_line_is_one_json_object(start: Start, lines: Lines) -> None:
    await (await start(fail)).call(from_handle("value"))
    line = JsonFormatter({"replica": "b#1"}).format(lines.records[0])
    found = json.loads(line)
    assert "\n" not in line
    assert found["message"] == "backend 'b' raised ValueError: bad input (replica b#1)"
    assert found["error"] == "ValueError: bad input"
    assert found["traceback"].endswith("ValueError: bad input")


async def test_an_error_of_a_batch_is_one_line_with_all_its_requests(start: Start, lines: Lines) -> None:
    @serve.accept_batch
    def broken(requests: list[Request]) -> list[int]:
        raise RuntimeError("no model")

    replica = await start(broken)
    entries = [from_http(request_id=f"r{n}") for n in range(3)]
    replica.run(*entries)
    for entry in entries:
        await replica.reply_to(entry)
    assert lines.ids == ["r0,r1,r2"]


async def test_an_element_that_is_an_exception_is_a_line_of_its_request_alone(start: Start, lines: Lines) -> None:
    @serve.accept_batch
    def halves(requests: list[Request]) -> list[Any]:
        return ["fine", ValueError("not this one")]

    replica = await start(halves)
    entries = [from_http(request_id="good"), from_http(request_id="bad")]
    replica.run(*entries)
    for entry in entries:
        await replica.reply_to(entry)
    assert lines.ids == ["bad"]
    assert lines.records[0].getMessage() == "backend 'b' raised ValueError: not this one (replica b#1)"


async def test_a_response_that_breaks_off_is_logged(start: Start, lines: Lines) -> None:
    def numbers(request: Request) -> StreamingResponse:
        return StreamingResponse(f"{1 / (1 - n)}" for n in range(2))

    await (await start(numbers)).call(from_http(request_id="r1"))
    assert lines.ids == ["r1"]
    assert lines.records[0].__dict__["error"] == "ZeroDivisionError: division by zero"


async def test_answers_below_500_and_results_are_not_logged(start: Start, lines: Lines) -> None:
    def pick(request: Request) -> Any:
        if request.data == "missing":
            raise HTTPException(404)
        return request.json() if request.data == "read" else "fine"

    replica = await start(pick)
    await replica.call(from_handle("missing"))
    await replica.call(from_handle("fine"))
    await replica.call(from_http(b"{", content_type="application/json"))
    assert lines.records == []


async def test_a_message_of_many_lines_is_one_line_before_its_traceback(start: Start, lines: Lines) -> None:
    def verbose(request: Request) -> None:
        raise ValueError("first\nsecond\r\n2026-01-01 ERROR forged " + "x" * 5000)

    await (await start(verbose)).call(from_handle())
    first = lines.records[0].getMessage().splitlines()[0]
    assert first.startswith("backend 'b' raised ValueError: first second 2026-01-01 ERROR forged xxx")
    assert len(first) < 1200


async def test_ten_lines_a_second_are_logged_and_the_rest_is_counted(lines: Lines) -> None:
    log = ErrorLog("b", "b#1", asyncio.get_running_loop())
    for _ in range(250):
        log.record([from_http()], BackendError("ValueError", "again"))
    assert len(lines.records) == 10
    await wait_until_async(lambda: len(lines.records) == 11)
    assert "raised 240 more errors within a second, which are not logged" in lines.records[-1].getMessage()
    log.record([from_http()], BackendError("ValueError", "later"))
    assert "later" in lines.records[-1].getMessage()


async def test_a_replica_that_ends_logs_the_number_of_errors_that_it_did_not_log(start: Start, lines: Lines) -> None:
    replica = await start(fail)
    entries = [from_handle("value") for _ in range(30)]
    replica.run(*entries)
    for entry in entries:
        await replica.reply_to(entry)
    await replica.runner.stop()
    assert "more errors" in lines.records[-1].getMessage()
    counted = sum(record.__dict__.get("unlogged", 1) for record in lines.records)
    assert counted == 30
