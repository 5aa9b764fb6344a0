"""Proxies with their own loop, over backends with real replicas, for tests that are clients of both."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import uvloop

from penstock.broker.registry.records import Change, EndpointRecord
from penstock.proxy.proxy import Proxy
from tests.handles.site import INSTANCE, Site

T = TypeVar("T")


class Proxies:
    """The proxies of an instance, in a thread of their own."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies", daemon=True)
        self._thread.start()
        self._proxies: list[Proxy] = []

    def start(self, **options: Any) -> str:
        """Start another proxy and return its URL."""
        proxy = self._run(self._made(f"p{len(self._proxies)}", {"port": 0, **options}))
        self._proxies.append(proxy)
        return str(self._run(proxy.ready())["url"])

    def close(self) -> None:
        for proxy in self._proxies:
            self._run(proxy.drain(1.0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _made(self, name: str, options: dict[str, Any]) -> Proxy:
        return Proxy(self._url, INSTANCE, name, options)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)


@contextmanager
def proxies(url: str) -> Generator[Proxies]:
    running = Proxies(url)
    try:
        yield running
    finally:
        running.close()


def route(site: Site, path: str, name: str = "ask", tag: str = "model") -> None:
    """Give an endpoint a route, with all usual methods."""
    methods = ("GET", "POST", "PUT", "DELETE")
    endpoint = EndpointRecord(name=name, route=path, methods=methods, traffic={tag: 1.0})
    site.change(Change(endpoints={name: endpoint}))
