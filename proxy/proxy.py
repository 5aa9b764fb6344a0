"""One proxy: a request client, the ASGI application and the HTTP server, in one event loop.

The proxy reads its routes from the registry and reports there its URL and the version of the registry that it serves.
It needs no call from outside until it is drained, so it goes on serving while the controller or Ray is down.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp

from ..broker.errors import BrokerRefused, BrokerUnavailable, ConfigError
from ..broker.queue.leases import Lease
from ..broker.registry.records import Snapshot
from ..broker.registry.reports import ProxyReport
from ..broker.registry.store import Registry
from ..broker.transport import outages
from ..broker.transport.url import shown_url
from ..broker.wire.keys import Keys
from ..handles.calls import tracing
from ..handles.calls.request_client import RequestClient
from ..runtime.memory import Memory
from .app import App
from .http1.connection_limit import allowed_connections
from .http1.listening import PortInUse, is_wildcard
from .middleware import wrap
from .options import ProxyOptions
from .pages.admin import AdminApp, AdminPort
from .pages.dashboard import Dashboard
from .pages.dead_letters import DeadLetterPages
from .pages.metrics_page import ProxyIdentity
from .server import Server

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
        tracing.configure("penstock-proxy")
        self._url, self._instance, self._name = redis_url, instance, name
        self._options = ProxyOptions.from_fields(options)
        self._report = ProxyReport(node=node, address=address, pid=os.getpid(), niceness=os.nice(0))
        self._lease = Lease(redis_url, Keys(instance).proxy_alive(name))
        self._memory = Memory()
        self._cleanup = AsyncExitStack()
        self._starting: asyncio.Task[_Running] | None = None
        self._draining: asyncio.Task[None] | None = None
        self._stop_listening = asyncio.Event()
        """Ends the delay of a drain."""

    async def ready(self) -> dict[str, Any]:
        """Start the proxy and return its ``url``, ``admin_url``, ``node`` and ``pid`` once it accepts requests.

        Further calls return the same.

        Raises:
            ConfigError: the port is in use, or another option cannot be applied on this machine.
        """
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start())
        report = (await asyncio.shield(self._starting)).reporter.report
        return {"url": report.url, "admin_url": report.admin_url, "node": report.node, "pid": report.pid}

    async def check(self) -> None:
        """Check the health of the proxy, and while it is idle return unused memory to the operating system.

        Raises:
            Exception: the start failed, or the HTTP server has ended.
        """
        if self._starting is None or not self._starting.done():
            return
        running = await self._starting
        if self._draining is None:
            await running.server.check()
        if running.app.metrics.in_flight == 0:
            self._memory.give_back()

    async def drain(self, timeout_s: float, delay_s: float = 0.0) -> None:
        """Accept no more connections, finish the requests in progress within ``timeout_s`` seconds, and end.

        A second call waits for the end of the first drain, and without a delay ends that of the first one.

        Args:
            timeout_s: seconds after the delay.
            delay_s: seconds for which connections are still accepted, while ``/-/readyz`` is 503.
        """
        if delay_s <= 0:
            self._stop_listening.set()
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain(timeout_s, delay_s))
        await asyncio.shield(self._draining)

    # -- starting

    async def _start(self) -> _Running:
        client = await self._connect()
        self._cleanup.push_async_callback(client.close)
        reporter = _Reporter(client.registry, self._name, self._report)
        self._cleanup.callback(reporter.stop)
        # The lease comes before the routes: a change of the registry waits for every proxy that has a lease.
        self._cleanup.push_async_callback(asyncio.to_thread, self._lease.stop)
        await self._take_lease()
        options = self._options
        app = App(
            client,
            max_body_bytes=options.max_body_bytes,
            max_buffered_bytes=options.buffered_bytes,
            request_timeout_s=options.request_timeout_s,
            root_path=options.root_path,
            debug=options.debug,
            unready_after_s=options.unready_after_s,
            access_log=options.access_log,
            identity=self._identity,
            has_admin_port=options.admin_port is not None,
            ray_serve_metrics=options.ray_serve_metrics,
        )
        self._cleanup.callback(app.close)
        server = await self._listen(wrap(app, options.middlewares), client.registry)
        app.buffers.measure = server.unsent_bytes
        host = self._report.address if is_wildcard(server.host) else server.host
        url = f"http://[{host}]:{server.port}" if ":" in host else f"http://{host}:{server.port}"

        def follow(snapshot: Snapshot) -> None:
            app.apply(snapshot)
            reporter.update(version=snapshot.version)

        client.watcher.add_listener(follow)
        if self._identity.shares_port:
            sharing = asyncio.get_running_loop().create_task(app.metrics_page.share_until_cancelled(), name="metrics")
            self._cleanup.push_async_callback(self._end_sharing, sharing, app)
        if options.admin_port is not None:
            dashboard = Dashboard(client, DeadLetterPages(client, options.admin_token))
            admin = AdminPort(
                AdminApp(app.admin_page, dashboard),
                options.admin_host,
                options.admin_port,
                lambda url: reporter.update(admin_url=url),
            )
            self._cleanup.push_async_callback(admin.stop)
            self._cleanup.callback(dashboard.close)  # before that
            await admin.start()
        reporter.update(state="ready", url=url)
        follow(client.snapshot)
        log.info("proxy %s serves on %s", self._name, url)
        return _Running(app, server, reporter)

    @property
    def _identity(self) -> ProxyIdentity:
        options = self._options
        port = options.port if options.admin_port is None else options.admin_port
        group = f"{self._report.node or self._report.address}:{port or self._name}"
        return ProxyIdentity(name=self._name, group=group, shares_port=options.proxies_per_node > 1)

    @staticmethod
    async def _end_sharing(sharing: asyncio.Task[None], app: App) -> None:
        sharing.cancel()
        await asyncio.wait([sharing])
        with suppress(BrokerUnavailable, BrokerRefused):
            await app.metrics_page.forget()

    async def _connect(self) -> RequestClient:
        while True:
            client = RequestClient(self._url, self._instance)
            try:
                await client.open()
            except BrokerUnavailable as e:
                outages.report_began(shown_url(self._url), self, f"proxy {self._name} waits for the broker: {e}")
                await asyncio.sleep(_RETRY_S)
            else:
                outages.report_ended(shown_url(self._url), self)
                return client

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

    async def _listen(self, app: ASGIApp, registry: Registry) -> Server:
        host, port = self._options.host, self._options.port
        limit = allowed_connections(self._options.max_connections)
        ends_at = asyncio.get_running_loop().time() + _SIBLINGS_S
        while True:
            try:
                server = Server(app, host, port, max_connections=limit)
                await server.start()
                return server
            except PortInUse as e:
                siblings = await self._siblings(registry)
                if any(urlsplit(sibling.url or "").port == port for sibling in siblings):
                    server = Server(app, host, port, shared=True, max_connections=limit)
                    await server.start()
                    return server
                is_starting = any(sibling.state == "starting" for sibling in siblings)
                if not is_starting or asyncio.get_running_loop().time() > ends_at:
                    raise ConfigError(str(e)) from None
            await asyncio.sleep(0.1)

    async def _siblings(self, registry: Registry) -> list[ProxyReport]:
        """Return the reports of other proxies that may run on this machine."""
        try:
            reports = await registry.get_reports(ProxyReport)
        except BrokerUnavailable:
            return [ProxyReport(state="starting")]  # there may be one
        return [
            report for name, report in reports.items() if name != self._name and self._may_be_on_this_machine(report)
        ]

    def _may_be_on_this_machine(self, report: ProxyReport) -> bool:
        if report.node == self._report.node or report.address == self._report.address:
            return True
        # The first report of a starting proxy comes from the process that starts it, which does not know the address.
        return report.state == "starting" and not report.address

    # -- draining

    async def _drain(self, timeout_s: float, delay_s: float) -> None:
        running: _Running | None = None
        if self._starting is not None:
            if not self._starting.done():
                self._starting.cancel()
                await asyncio.wait([self._starting])
            if not self._starting.cancelled() and self._starting.exception() is None:
                running = self._starting.result()
        if running is not None:
            running.app.draining = True
            running.reporter.update(state="draining", url=None)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stop_listening.wait(), delay_s)
            await running.server.stop(timeout_s)
        await self._cleanup.aclose()


class _Reporter:
    """Keeps the report of a proxy in the registry up to date.

    Args:
        registry: the registry of the instance.
        name: name of the proxy.
        report: its report, of which nothing is sent before the first `update`.
    """

    def __init__(self, registry: Registry, name: str, report: ProxyReport) -> None:
        self.report = report
        self._registry, self._name = registry, name
        self._has_news = False
        self._sending: asyncio.Task[None] | None = None

    def update(self, **changes: Any) -> None:
        """Change fields of the report, and send it once the registry can be reached."""
        self.report = replace(self.report, **changes)
        self._has_news = True
        if self._sending is None or self._sending.done():
            self._sending = asyncio.get_running_loop().create_task(self._send())

    def stop(self) -> None:
        """Stop sending."""
        if self._sending is not None:
            self._sending.cancel()

    async def _send(self) -> None:
        while self._has_news:
            self._has_news = False
            try:
                await self._registry.put_report(self._name, self.report)
            except BrokerUnavailable:
                self._has_news = True
                await asyncio.sleep(_RETRY_S)
            except Exception:
                log.exception("proxy %s cannot send its report to the registry", self._name)


@dataclass(frozen=True, slots=True)
class _Running:
    """The parts of a proxy that has started."""

    app: App
    server: Server
    reporter: _Reporter
