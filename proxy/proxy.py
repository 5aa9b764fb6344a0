"""One proxy: a request client, the ASGI application and the HTTP server, in one event loop.

The proxy reads its routes from the registry and reports there its URL and the version of the registry that it serves.
It needs no call from outside until it is drained, so it goes on serving while the controller or Ray is down.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp

from ..broker.errors import BrokerUnavailable, ConfigError
from ..broker.queue.leases import Lease
from ..broker.registry.records import Snapshot
from ..broker.registry.reports import ProxyReport
from ..broker.transport import outages
from ..broker.transport.url import shown_url
from ..broker.wire.keys import Keys
from ..handles.calls.request_client import RequestClient
from ..runtime.memory import Memory
from .app import App
from .http1.buffers import default_bytes
from .http1.connection_limit import MAX_CONNECTIONS, allowed_connections
from .middleware import wrap
from .server import PortInUse, Server, is_wildcard

log = logging.getLogger(__name__)

_RETRY_S = 0.5
"""Seconds between attempts to reach the broker."""

_SIBLINGS_S = 5.0
"""How long to wait, on a port in use, for other proxies of the node that are starting and may listen on that port."""


class Proxy:
    """Runs one proxy, from `ready` to `drain`. A plain asyncio class that needs no Ray.

    Args:
        redis_url: URL of the broker.
        instance: the instance whose endpoints are served.
        name: name of the proxy in the registry.
        options: fields of ``serve.HTTPOptions``. Missing ones have their defaults.
        node: id of the node, for the report in the registry.
        address: address of the node, for the URL of a proxy that listens on all addresses. Proxies of one node share
            a port, and so do proxies of nodes with the same address, such as a test cluster on one machine.
    """

    def __init__(
        self,
        redis_url: str,
        instance: str,
        name: str,
        options: Mapping[str, Any],
        *,
        node: str = "",
        address: str = "127.0.0.1",
    ) -> None:
        self._url, self._instance, self._name, self._options = redis_url, instance, name, options
        self._address = address
        self._report = ProxyReport(node=node, address=address, pid=os.getpid())
        self._lease = Lease(redis_url, Keys(instance).proxy_alive(name))
        self._caller: RequestClient | None = None
        self._app: App | None = None
        self._memory = Memory()
        self._server: Server | None = None
        self._starting: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None
        self._reporting: asyncio.Task[None] | None = None
        self._has_news = False

    async def ready(self) -> dict[str, Any]:
        """Start the proxy and return its ``url``, ``node`` and ``pid`` once it accepts requests.

        Further calls return the same.

        Raises:
            ConfigError: the port is in use, or another option cannot be applied on this machine.
        """
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start())
        await asyncio.shield(self._starting)
        return {"url": self._report.url, "node": self._report.node, "pid": self._report.pid}

    async def check(self) -> None:
        """Check the health of the proxy, and while it is idle return unused memory to the operating system.

        Raises:
            Exception: the start failed, or the HTTP server has ended.
        """
        if self._starting is not None and self._starting.done():
            await self._starting
        if self._server is not None and self._draining is None:
            await self._server.check()
        if self._app is not None and self._app.metrics.in_flight == 0:
            self._memory.give_back()

    async def drain(self, timeout_s: float) -> None:
        """Accept no more connections, finish the requests in progress within ``timeout_s`` seconds, and end."""
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain(timeout_s))
        await asyncio.shield(self._draining)

    # -- starting

    async def _start(self) -> None:
        self._caller = await self._connect()
        # The lease comes before the routes: a change of the registry waits for every proxy that has a lease.
        await self._take_lease()
        options = self._options
        max_body_bytes: int = options.get("max_body_bytes", 64 * 1024 * 1024)
        self._app = App(
            self._caller,
            max_body_bytes=max_body_bytes,
            max_buffered_bytes=default_bytes(max_body_bytes, options.get("proxies_per_node", 1))
            if options.get("max_buffered_bytes") is None
            else options["max_buffered_bytes"],
            request_timeout_s=options.get("request_timeout_s", 60.0),
            root_path=options.get("root_path", ""),
            debug=options.get("debug", False),
        )
        self._server = await self._listen(wrap(self._app, options.get("middlewares", ())))
        self._app.buffers.measure = self._server.unsent_bytes
        host = self._address if is_wildcard(self._server.host) else self._server.host
        url = f"http://[{host}]:{self._server.port}" if ":" in host else f"http://{host}:{self._server.port}"
        self._caller.watcher.add_listener(self._on_change)
        self._update_report(state="ready", url=url)
        self._on_change(self._caller.snapshot)
        log.info("proxy %s serves on %s", self._name, url)

    async def _connect(self) -> RequestClient:
        while True:
            caller = RequestClient(self._url, self._instance)
            try:
                await caller.open()
            except BrokerUnavailable as e:
                outages.report_began(shown_url(self._url), self, f"proxy {self._name} waits for the broker: {e}")
                await asyncio.sleep(_RETRY_S)
            else:
                outages.report_ended(shown_url(self._url), self)
                return caller

    async def _take_lease(self) -> None:
        while True:
            try:
                # It blocks, so it runs in a thread.
                await asyncio.to_thread(self._lease.start)
            except BrokerUnavailable as e:
                outages.report_began(shown_url(self._url), self, f"proxy {self._name} waits for the broker: {e}")
                await asyncio.sleep(_RETRY_S)
            else:
                outages.report_ended(shown_url(self._url), self)
                return

    async def _listen(self, app: ASGIApp) -> Server:
        host, port = self._options.get("host", "127.0.0.1"), self._options.get("port", 8000)
        limit = allowed_connections(self._options.get("max_connections", MAX_CONNECTIONS))
        ends_at = asyncio.get_running_loop().time() + _SIBLINGS_S
        while True:
            try:
                server = Server(app, host, port, max_connections=limit)
                await server.start()
                return server
            except PortInUse as e:
                siblings = await self._siblings()
                if any(urlsplit(sibling.url or "").port == port for sibling in siblings):
                    server = Server(app, host, port, shared=True, max_connections=limit)
                    await server.start()
                    return server
                is_starting = any(sibling.state == "starting" for sibling in siblings)
                if not is_starting or asyncio.get_running_loop().time() > ends_at:
                    raise ConfigError(str(e)) from None
            await asyncio.sleep(0.1)

    async def _siblings(self) -> list[ProxyReport]:
        """Return the reports of other proxies that may run on this machine."""
        assert self._caller is not None
        try:
            reports = await self._caller.registry.get_reports(ProxyReport)
        except BrokerUnavailable:
            return [ProxyReport(state="starting")]  # there may be one
        return [
            report for name, report in reports.items() if name != self._name and self._may_be_on_this_machine(report)
        ]

    def _may_be_on_this_machine(self, report: ProxyReport) -> bool:
        if report.node == self._report.node or report.address == self._report.address:
            return True
        # The first report of a starting proxy comes from the controller, which does not know the address.
        return report.state == "starting" and not report.address

    # -- following the registry

    def _on_change(self, snapshot: Snapshot) -> None:
        assert self._app is not None
        self._app.apply(snapshot)
        self._update_report(version=snapshot.version)

    def _update_report(self, **changes: Any) -> None:
        """Change fields of this proxy's report, and send it once the registry can be reached."""
        self._report = replace(self._report, **changes)
        self._has_news = True
        if self._reporting is None or self._reporting.done():
            self._reporting = asyncio.get_running_loop().create_task(self._send_reports())

    async def _send_reports(self) -> None:
        assert self._caller is not None
        while self._has_news:
            self._has_news = False
            try:
                await self._caller.registry.put_report(self._name, self._report)
            except BrokerUnavailable:
                self._has_news = True
                await asyncio.sleep(_RETRY_S)
            except Exception:
                log.exception("proxy %s cannot send its report to the registry", self._name)

    # -- draining

    async def _drain(self, timeout_s: float) -> None:
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait([self._starting])
        if self._app is not None:
            self._app.draining = True
        if self._server is not None:
            self._update_report(state="draining", url=None)
            await self._server.stop(timeout_s)
        if self._app is not None:
            self._app.close()
        await asyncio.to_thread(self._lease.stop)
        if self._reporting is not None:
            self._reporting.cancel()
        if self._caller is not None:
            await self._caller.close()
