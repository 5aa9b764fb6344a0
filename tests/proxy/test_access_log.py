"""The access log of a proxy, on both paths through it."""

import json
from collections.abc import Generator

import pytest

from penstock.broker.wire.replies import Reply
from penstock.broker.wire.requests import Entry
from penstock.runtime.logs import JsonFormatter
from tests.proxy.site import WAYS, running, text
from tests.support.log_lines import Lines, logged_lines
from tests.support.waiting import wait_until_async


@pytest.fixture
def lines() -> Generator[Lines]:
    with logged_lines("penstock.access") as lines:
        yield lines


@pytest.mark.parametrize("way", WAYS)
async def test_each_request_is_a_line_with_its_outcome(redis_url: str, lines: Lines, way: str) -> None:
    async with running(redis_url, way=way, access_log=True) as site:
        await site.endpoint("/hello/{name}", text("hi"))
        await site.http.get("/hello/ada?token=secret", headers={"x-request-id": "r1"})
        await site.http.get("/nowhere", headers={"x-request-id": "r2"})
        await wait_until_async(lambda: len(lines.records) == 2)
    assert lines.ids == ["r1", "r2"]
    first, second = (record.getMessage() for record in lines.records)
    assert first.startswith("GET /hello/ada 200 ")
    assert first.endswith(" ms e")
    assert second.startswith("GET /nowhere 404 ")
    found = json.loads(JsonFormatter({}).format(lines.records[0]))
    assert found.pop("ms") > 0
    assert {name: found[name] for name in ("method", "path", "route", "status", "endpoint", "backend", "level")} == {
        "method": "GET",
        "path": "/hello/ada",
        "route": "/hello/{name}",
        "status": 200,
        "endpoint": "e",
        "backend": "e",
        "level": "INFO",
    }
    assert "secret" not in json.dumps(found)


async def test_the_line_of_a_submitted_request_has_its_backend(redis_url: str, lines: Lines) -> None:
    async with running(redis_url, access_log=True) as site:
        await site.endpoint("/later", None, max_queued_requests=1)
        for expected in (202, 503):  # the second one is refused, so no backend has it
            assert (await site.http.post("/later", headers={"prefer": "respond-async"})).status_code == expected
        await wait_until_async(lambda: len(lines.records) == 2)
    accepted, refused = (record.getMessage() for record in lines.records)
    assert accepted.startswith("POST /later 202 ")
    assert accepted.endswith(" ms e")
    assert refused.endswith(" ms -")


@pytest.mark.parametrize("way", WAYS)
async def test_errors_are_lines_with_their_status(redis_url: str, lines: Lines, way: str) -> None:
    def failing(entry: Entry) -> Reply:
        return Reply(entry.id, 500, error={"kind": "BackendError", "args": ["ValueError", "bad"]})

    async with running(redis_url, way=way, access_log=True) as site:
        await site.endpoint("/", failing)
        await site.http.post("/", content=b"x")
        await wait_until_async(lambda: lines.records)
    assert lines.records[0].getMessage().startswith("POST / 500 ")


async def test_a_path_cannot_begin_a_line_of_its_own(redis_url: str, lines: Lines) -> None:
    async with running(redis_url, way="direct", access_log=True) as site:
        await site.http.get("/a%0A2026-01-01 ERROR forged")
        await wait_until_async(lambda: lines.records)
    assert "\n" not in lines.records[0].getMessage()
    assert "/a\\n2026-01-01 ERROR forged 404" in lines.records[0].getMessage()


@pytest.mark.parametrize("way", WAYS)
async def test_pages_of_the_proxy_are_not_lines(redis_url: str, lines: Lines, way: str) -> None:
    async with running(redis_url, way=way, access_log=True) as site:
        assert (await site.http.get("/-/healthz")).status_code == 200
        await site.http.get("/nowhere")
        await wait_until_async(lambda: lines.records)
    assert len(lines.records) == 1


@pytest.mark.parametrize("way", WAYS)
async def test_there_is_no_access_log_unless_it_is_asked_for(redis_url: str, lines: Lines, way: str) -> None:
    async with running(redis_url, way=way) as site:
        await site.endpoint("/", text("hi"))
        assert (await site.http.get("/")).status_code == 200
    assert lines.records == []
