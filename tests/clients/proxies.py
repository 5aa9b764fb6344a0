"""Code behind real proxies on a real broker, without Ray: what other programs connect to."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from penstock.broker.registry.records import Change, EndpointRecord
from penstock.proxy.proxy import Proxy
from tests.handles.site import INSTANCE, Site

DOCS = Path(__file__).parents[2] / "docs"


def program(name: str, package: str) -> str:
    """Return where a program is. Without it the test is skipped; in CI that is a failure."""
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"there is no {name}; {package} brings it")
    return path


def quick_start() -> Any:
    """Return the class of the quick start's backend."""
    page = (DOCS / "quickstart.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {"__name__": "app"}
    exec(found[1], names)
    return names["Sentiment"]


@asynccontextmanager
async def behind_proxies(
    redis_url: str, code: Callable[..., Any], *, name: str, count: int = 1, **options: Any
) -> AsyncGenerator[list[tuple[Proxy, str]]]:
    """Serve ``code`` at the route ``/name``; yield the proxies and their addresses (host and port)."""
    site = Site(redis_url)
    async with AsyncExitStack() as ending:
        ending.callback(site.close)
        site.serve(code, name)
        route = EndpointRecord(name=name, route=f"/{name}", methods=("GET", "POST"), traffic={"model": 1.0})
        site.change(Change(endpoints={name: route}))
        started: list[tuple[Proxy, str]] = []
        for number in range(count):
            proxy = Proxy(redis_url, INSTANCE, f"p{number}", {"port": 0, **options}, node=f"n{number}")
            ending.push_async_callback(proxy.drain, 5.0)
            report = await proxy.ready()
            started.append((proxy, report["url"].removeprefix("http://")))
        yield started
