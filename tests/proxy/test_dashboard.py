"""The dashboard of the admin port: its page, its events, and what a browser shows of them."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from penstock.broker.registry.records import Change, EndpointRecord
from tests.proxy.site import Site, running
from tests.proxy.test_metrics import fill, proxy
from tests.waiting import wait_until_async


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
        return self._ask("Runtime.evaluate", self._session, expression=expression, returnByValue=True)["result"][
            "value"
        ]

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


@pytest.mark.parametrize("width", [1280, 390])
async def test_a_browser_shows_the_instance(site: Site, redis_url: str, tmp_path: Path, width: int) -> None:
    await fill(site)
    hostile = EndpointRecord(name="gamma", route="/<img src=x onerror=alert(1)>", traffic={"alpha": 0.25, "beta": 0.75})
    await site.change(Change({}, {"gamma": hostile}))
    browser = Browser(tmp_path, width)
    try:
        async with proxy(redis_url, "p1", admin_port=0) as where:
            await asyncio.to_thread(browser.open, f"{where['admin_url']}/-/dashboard")

            async def is_live() -> bool:
                text = await asyncio.to_thread(browser.evaluate, "document.getElementById('link')?.textContent ?? ''")
                return bool(text == "live")

            await wait_until_async(is_live)
            document: str = await asyncio.to_thread(browser.evaluate, "document.body.outerHTML")
            overflow = await asyncio.to_thread(browser.evaluate, "document.body.scrollWidth - innerWidth")
            if (folder := os.environ.get("PENSTOCK_TEST_SCREENSHOTS")) is not None:
                (Path(folder) / f"dashboard-{width}.png").write_bytes(await asyncio.to_thread(browser.screenshot))
    finally:
        browser.close()
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", document)
    assert {"alpha", "1 of 2", "alpha#2", "starting", "alpha 25%, beta 75%", "p1"} <= set(cells)
    assert "controller away" in document
    assert "<img" not in document
    assert overflow <= 0
