"""The dashboard of the admin port: its page, its events, and what a browser shows of them."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from penstock.broker.registry.records import Change, EndpointRecord
from penstock.broker.registry.reports import BackendStatus, JobReport, ReplicaReport
from penstock.handles.errors import BackendError, to_wire
from penstock.proxy.pages.admin_token import digest_of
from penstock.serve.status.reader import StatusReader
from tests.proxy.pages.test_dead_letters import TOKEN, bury
from tests.proxy.pages.test_metrics import fill, proxy
from tests.proxy.site import Site, running
from tests.support.waiting import wait_until_async


@pytest_asyncio.fixture
async def site(redis_url: str) -> AsyncIterator[Site]:
    async with running(redis_url) as site:
        yield site


async def first_event(url: str) -> tuple[str, Any]:
    """Return the kind and the data of the first event of a dashboard."""
    async with httpx.AsyncClient(timeout=30) as http, http.stream("GET", f"{url}/-/dashboard/events") as events:
        assert events.headers["content-type"] == "text/event-stream"
        kind = ""
        async for line in events.aiter_lines():
            name, _, value = line.partition(": ")
            if name == "event":
                kind = value
            elif name == "data":
                return kind, json.loads(value)
    raise AssertionError("the events ended")


async def test_the_events_have_what_the_metrics_have(site: Site, redis_url: str) -> None:
    await fill(site)
    async with proxy(redis_url, "p1", admin_port=0) as where:
        kind, state = await first_event(where["admin_url"])
        async with httpx.AsyncClient() as http:
            lines = (await http.get(f"{where['admin_url']}/-/metrics")).text.splitlines()
    assert kind == "state"
    alpha = state["backends"]["alpha"]
    assert f'penstock_backend_served_total{{backend="alpha"}} {alpha["served"]}' in lines
    assert (alpha["served"], alpha["failed"], alpha["ready"], alpha["wanted"]) == (3, 1, 1, 2)
    assert sum(alpha["ran"]) == 1
    assert {one["name"]: one["state"] for one in state["replicas"]} == {"alpha#1": "ready", "alpha#2": "starting"}
    assert [(one["name"], one["traffic"]) for one in state["endpoints"]] == [
        ("alpha", "alpha 100%"),
        ("beta", "beta 100%"),
    ]
    assert [(one["name"], one["state"]) for one in state["proxies"]] == [("p1", "ready")]
    assert state["controller"] == "away"


async def test_what_a_caller_may_write_does_not_hide_the_rest(site: Site, redis_url: str) -> None:
    await fill(site)
    await site.redis.hset(site.keys.reports("jobs"), mapping={"job:a": "no JSON", b"\xff": "{}"})
    await site.redis.hset(site.keys.submitted("alpha"), mapping={b"\xff": 1, "nonsense:alpha": 2, "queued": 3})
    await site.redis.hset(site.keys.calls("alpha"), mapping={b"\xff": 1})
    async with proxy(redis_url, "p1", admin_port=0) as where:
        kind, state = await first_event(where["admin_url"])
    assert (kind, state["jobs"], state["backends"]["alpha"]["served"]) == ("state", [], 3)
    assert {"endpoint": "alpha", "queued": 0, "running": 0, "succeeded": 6, "failed": 1, "cancelled": 0} in state[
        "submitted"
    ]


async def test_the_dashboard_is_on_the_admin_port_alone(site: Site, redis_url: str) -> None:
    async with proxy(redis_url, "p1", admin_port=0) as where, httpx.AsyncClient() as http:
        page = await http.get(f"{where['admin_url']}/-/dashboard")
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert (await http.post(f"{where['admin_url']}/-/dashboard")).status_code == 405
        for page_name in ("/-/dashboard", "/-/dashboard/events"):
            assert (await http.get(f"{where['url']}{page_name}")).status_code == 404
    async with proxy(redis_url, "p2") as where, httpx.AsyncClient() as http:
        assert (await http.get(f"{where['url']}/-/dashboard")).status_code == 404


async def test_a_proxy_that_ends_ends_its_dashboards(site: Site, redis_url: str) -> None:
    async with httpx.AsyncClient(timeout=30) as http:
        async with proxy(redis_url, "p1", admin_port=0) as where:
            stream = http.stream("GET", f"{where['admin_url']}/-/dashboard/events")
            events = await stream.__aenter__()
            lines = events.aiter_lines()
            assert await anext(lines) == "event: state"
        # The connection ends: properly, or in the middle of the endless response.
        with suppress(httpx.TransportError):
            async for _ in lines:
                pass


def chromium() -> str:
    if (path := shutil.which("chromium")) is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no chromium on PATH")
    return path


class Browser:
    """Headless Chromium, spoken to by its DevTools protocol over pipes."""

    def __init__(self, directory: Path, width: int) -> None:
        to_read, self._commands = os.pipe()
        self._answers, to_write = os.pipe()
        profile = f"--user-data-dir={directory / 'profile'}"
        quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
        command = [chromium(), *quiet, profile, "--remote-debugging-pipe", "about:blank"]
        # The protocol's descriptors are 3 and 4.
        redirected = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", redirected, "bash", *command], pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._width = width

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def open(self, url: str) -> None:
        target = self._ask("Target.createTarget", url=url)["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        # A window is at least 500 pixels wide.
        size = {"width": self._width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self._ask("Emulation.setDeviceMetricsOverride", self._session, **size)

    def evaluate(self, expression: str) -> Any:
        return self._ask("Runtime.evaluate", self._session, expression=expression, returnByValue=True)["result"].get(
            "value"
        )

    def screenshot(self) -> bytes:
        return base64.b64decode(self._ask("Page.captureScreenshot", self._session, captureBeyondViewport=True)["data"])

    def _ask(self, method: str, session: str | None = None, **params: Any) -> Any:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                read = os.read(self._answers, 65536)
                assert read, "the browser has ended"
                self._buffer += read
            answer, _, self._buffer = self._buffer.partition(b"\0")
            if (one := json.loads(answer)).get("id") == number:
                assert "error" not in one, one
                return one["result"]


async def furnish(site: Site) -> None:
    """Give an instance something for each part of the page, with names and texts that try its layout."""
    await fill(site)
    registry, connection, keys = site.caller.registry, site.caller.connection, site.keys
    long_name = "summarise-" + "-".join(["very", "long", "names", "are", "allowed"] * 3)
    endpoints = {
        "gamma": EndpointRecord(name="gamma", route="/gamma/{n:int}", traffic={"alpha": 0.25, "beta": 0.75}),
        long_name: EndpointRecord(
            name=long_name, route=f"/{long_name}/{{path:path}}", traffic={"beta": 1.0}, shadows={"alpha": 0.005}
        ),
        "hostile": EndpointRecord(name="hostile", route="/<img src=x onerror=alert(1)>", traffic={"alpha": 1.0}),
    }
    await site.change(Change({}, endpoints))
    failing = to_wire(BackendError("OSError", "no such file: '/models/beta/weights.safetensors'"))
    status = BackendStatus(version="1", config_version=1, wanted=1, starting=1, failing=failing)
    await registry.put_report("beta", status)
    for n in range(3, 6):
        replica = ReplicaReport(backend="alpha", state="ready", node=f"{n}f9ae0c1d2b3{n}4e5f6", pid=4000 + n)
        await registry.put_report(f"alpha#{n}f03b1", replica)
    now_ms = connection.now_ms()
    recent_ms = now_ms + 600_000  # a report that is not taken for one of a dead producer however long the test takes
    jobs: dict[str, dict[str, Any]] = {
        "nightly": {"done": 41_250, "total": 120_000, "errors": 3, "in_flight": 1000},
        "embed-the-archive": {"done": 1_200, "share": 0.31, "in_flight": 64, "waits_for": "queue"},
        "yesterday": {"state": "finished", "done": 900, "total": 900, "started_ms": now_ms - 86_400_000},
        "broken": {"state": "failed", "done": 10, "total": 50, "errors": 10, "started_ms": now_ms - 90_000_000},
    }
    for name, fields in jobs.items():
        known: dict[str, Any] = {"endpoint": "alpha", "started_ms": now_ms, "at_ms": recent_ms, "ttl_s": 3600.0}
        report = JobReport(**{**known, **fields}, job=name)
        await registry.put_report(f"job:{name}", report)
    silent = JobReport(job="silent", endpoint="beta", done=7, at_ms=now_ms - 60_000, started_ms=now_ms, ttl_s=3600.0)
    await registry.put_report("job:silent", silent)
    expired = JobReport(job="expired", endpoint="beta", at_ms=now_ms - 60_000, ttl_s=1.0)
    await registry.put_report("job:expired", expired)
    await connection.send("HSET", keys.submitted("beta"), "succeeded:beta", 12_345, "cancelled:beta", 2)


async def test_the_figures_are_those_of_the_status(site: Site, redis_url: str) -> None:
    await furnish(site)
    await bury(site)
    await site.redis.set(site.keys.settings, "{}")
    async with proxy(redis_url, "p1", admin_port=0) as where:
        asking = [asyncio.create_task(site.http.get("/b"))]
        await wait_until_async(partial(has_depth, site, "beta", 1))
        _, state = await first_event(where["admin_url"])
        status = await StatusReader(site.caller.connection, site.keys).read()
        for task in asking:
            task.cancel()
    for tag, backend in status["backends"].items():
        shown = state["backends"][tag]
        same = ("queued", "in_progress", "served", "failed", "dead_letters", "ready", "wanted", "lacking")
        assert {name: shown[name] for name in same} == {name: backend[name] for name in same}, tag
    assert status["backends"]["beta"]["queued"] == 1
    assert status["backends"]["alpha"]["dead_letters"] == 1
    assert "no such file" in status["backends"]["beta"]["failing"]
    assert "no such file" in state["backends"]["beta"]["failing"]
    assert state["controller"] == status["controller"] == "away"
    assert {one["name"]: (one["url"], one["state"], one["node"]) for one in state["proxies"]} == {
        name: (one["url"], one["state"], one["node"]) for name, one in status["proxies"].items()
    }
    assert {one["name"]: one["route"] for one in state["endpoints"]} == {
        name: one["route"] for name, one in status["endpoints"].items()
    }
    jobs = {one["job"]: one for one in state["jobs"]}
    assert (
        set(jobs)
        == {job["job"] for job in status["jobs"].values()}
        == {*("nightly", "embed-the-archive", "yesterday", "broken", "silent")}
    )
    assert jobs["silent"]["state"] == status["jobs"]["job:silent"]["state"] == "stopped"
    assert jobs["nightly"]["done"] == status["jobs"]["job:nightly"]["done"] == 41_250
    submitted = {one["endpoint"]: one for one in state["submitted"]}
    assert submitted["beta"]["succeeded"] == status["submitted"]["beta"]["succeeded"] == 12_345
    assert submitted["alpha"]["failed"] == status["submitted"]["alpha"]["failed"] == 1


async def has_depth(site: Site, backend: str, depth: int) -> bool:
    return await site.queued(backend) == depth


@contextmanager
def browsing(directory: Path, width: int) -> Generator[Browser]:
    browser = Browser(directory, width)
    try:
        yield browser
    finally:
        browser.close()


class Page:
    """The dashboard in a browser."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser

    async def evaluate(self, expression: str) -> Any:
        return await asyncio.to_thread(self._browser.evaluate, expression)

    async def open(self, url: str) -> None:
        await asyncio.to_thread(self._browser.open, f"{url}/-/dashboard")
        await self.until("document.getElementById('link')?.textContent === 'live'")

    async def until(self, condition: str) -> None:
        async def holds() -> bool:
            return bool(await self.evaluate(condition))

        await wait_until_async(holds)

    async def cells(self, table: str) -> list[list[str]]:
        """Return the texts of a table, row by row."""
        rows = f"[...document.querySelectorAll('#{table} tbody tr')]"
        found = await self.evaluate(f"JSON.stringify({rows}.map(row => [...row.cells].map(one => one.textContent)))")
        cells: list[list[str]] = json.loads(found)
        return cells

    async def screenshot(self, name: str) -> None:
        if (folder := os.environ.get("PENSTOCK_TEST_SCREENSHOTS")) is not None:
            (Path(folder) / name).write_bytes(await asyncio.to_thread(self._browser.screenshot))


@pytest.mark.parametrize("width", [1280, 390])
async def test_a_browser_shows_the_instance(site: Site, redis_url: str, tmp_path: Path, width: int) -> None:
    await furnish(site)
    ids = [await bury(site) for _ in range(2)]
    options: dict[str, Any] = {"admin_port": 0, "admin_token": digest_of(TOKEN)}
    with browsing(tmp_path, width) as browser:
        page = Page(browser)
        async with proxy(redis_url, "p1", **options) as where:
            await page.open(where["admin_url"])
            await page.until("document.querySelectorAll('#dead button').length === 4")
            tables = ("backends", "replicas", "endpoints", "submitted", "jobs", "dead", "proxies")
            shown = {name: await page.cells(name) for name in tables}
            document = await page.evaluate("document.body.outerHTML")
            overflow = await page.evaluate("document.documentElement.scrollWidth - innerWidth")
            cut = await page.evaluate(
                "JSON.stringify([...document.querySelectorAll('td')].filter(one => one.offsetWidth && "
                "one.scrollWidth > one.clientWidth + 1).map(one => one.textContent))"
            )
            await page.screenshot(f"dashboard-{width}.png")
    alpha, beta, why = shown["backends"]
    assert (alpha[0], alpha[-1], beta[-1]) == ("alpha", "1 of 2", "0 of 1")
    assert "no such file" in why[0]
    assert shown["replicas"][0] == ["alpha#2", "alpha", "starting", "", ""]
    assert ["gamma", "/gamma/{n:int}", "alpha 25%, beta 75%", ""] in shown["endpoints"]
    assert ["beta", "0", "0", "12,345", "0", "2"] in shown["submitted"]
    jobs = {row[0]: row[1:5] for row in shown["jobs"]}
    assert jobs["nightly"] == ["alpha", "running", "41,250 of 120,000", "3"]
    assert jobs["embed-the-archive"] == ["alpha", "waits for room in the queue", "1,200 (31% read)", "0"]
    assert jobs["silent"][1] == "stopped"
    assert "expired" not in jobs
    assert [row[0] for row in shown["dead"]] == ["alpha", "alpha"]
    assert shown["dead"][0][2:] == ["alpha", "r-1", "alpha#1", "every replica died", "replaydrop"]
    assert shown["proxies"][0][0] == "p1"
    assert "controller away" in document
    assert "<img" not in document
    assert (overflow <= 0, json.loads(cut)) == (True, [])
    assert await site.redis.xlen(site.keys.dead("alpha")) == len(ids)


async def test_a_browser_replays_and_drops_with_the_token(site: Site, redis_url: str, tmp_path: Path) -> None:
    await fill(site)
    for _ in range(2):
        await bury(site)
    options: dict[str, Any] = {"admin_port": 0, "admin_token": digest_of(TOKEN)}
    note = "document.getElementById('note').textContent"
    with browsing(tmp_path, 1280) as browser:
        page = Page(browser)
        async with proxy(redis_url, "p1", **options) as where:
            await page.open(where["admin_url"])
            await page.until("document.querySelectorAll('#dead button').length === 4")
            replay, drop = (f"document.querySelectorAll('#dead button')[{at}]" for at in (0, 1))
            await page.evaluate(f"{replay}.click()")
            await page.until(f"{note} === 'enter the admin token first'")
            await page.evaluate("document.getElementById('token').value = 'not-the-token-at-all'")
            await page.evaluate(f"{replay}.click()")
            await page.until(f"{note} === 'the admin token is wrong'")
            assert await site.redis.xlen(site.keys.dead("alpha")) == 2
            await page.evaluate(f"document.getElementById('token').value = '{TOKEN}'")
            await page.evaluate(f"{replay}.click()")
            await page.until(
                f"{note}.endsWith('was replayed') && document.querySelectorAll('#dead button').length === 2"
            )
            assert await site.redis.xlen(site.keys.batch("alpha")) == 1
            await page.evaluate(f"{drop}.click()")
            assert await page.evaluate(f"{drop}.textContent") == "drop for good"
            assert await site.redis.xlen(site.keys.dead("alpha")) == 1
            await page.evaluate(f"{drop}.click()")
            await page.until(
                f"{note}.endsWith('was dropped') && document.querySelectorAll('#dead button').length === 0"
            )
            assert await page.cells("dead") == [["no dead letters"]]
            left = await page.evaluate(
                "document.cookie + location.href + JSON.stringify({...localStorage, ...sessionStorage})"
            )
    assert TOKEN not in left
    assert await site.redis.xlen(site.keys.dead("alpha")) == 0


async def test_a_browser_shows_no_buttons_without_a_token_and_says_what_is_empty(
    site: Site, redis_url: str, tmp_path: Path
) -> None:
    with browsing(tmp_path, 390) as browser:
        page = Page(browser)
        async with proxy(redis_url, "p1", admin_port=0) as where:
            await page.open(where["admin_url"])
            await page.until("document.querySelector('#dead td')?.textContent === 'no dead letters'")
            empty = {name: (await page.cells(name))[0][0] for name in ("backends", "endpoints", "jobs", "submitted")}
            await page.screenshot("dashboard-empty.png")
            await site.endpoint("/a", None, name="alpha")
            await bury(site)
            await page.until(
                "document.querySelectorAll('#dead tbody tr').length === 1 && "
                "document.querySelector('#dead td').textContent === 'alpha'"
            )
            assert await page.evaluate("document.querySelectorAll('button').length") == 0
            assert await page.evaluate("document.getElementById('token').offsetParent === null")
    assert empty == {
        "backends": "no backends",
        "endpoints": "no endpoints",
        "jobs": "no batch job has run lately",
        "submitted": "no request was submitted, and none had an idempotency key",
    }
