"""One proxy: a caller, the application and the HTTP server around it, in one loop.

It reads from the registry what to route, and says there where it listens and which version of the registry it serves.
Nobody has to tell it anything but when to end, so it goes on serving whatever becomes of the controller and of Ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp

from ..broker.errors import BrokerUnavailable, ConfigError
from ..broker.queue.leases import Lease
from ..broker.registry.records import Snapshot
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
_SIBLINGS_S = 5.0
"""How long to wait for other proxies of the node that are starting too, and may be who has our port."""


class Proxy:
    """The life of one proxy, from `ready` to `drain`: a plain asyncio class, which needs no Ray.

    Args:
        redis_url: of the broker.
        instance: whose endpoints are served.
        name: of the proxy, in the registry.
        options: the fields of ``serve.HTTPOptions``; what is not named has its default.
        node: of the cluster, as the registry shall have it.
        address: where the node is reached, for the URL of a proxy that listens on all addresses. Proxies of one node
            share its port, and so do those of nodes with one address, as in a test cluster on one machine.
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
        self._said: dict[str, Any] = {"node": node, "address": address, "pid": os.getpid(), "state": "starting"}
        self._lease = Lease(redis_url, Keys(instance).proxy_alive(name))
        self._caller: RequestClient | None = None
        self._app: App | None = None
        self._memory = Memory()
        self._server: Server | None = None
        self._starting: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None
        self._unsaid = False

    async def ready(self) -> dict[str, Any]:
        """Return where it is reached (``url``, ``node``, ``pid``) once it takes requests.

        Called again, it tells the same.

        Raises:
            ConfigError: the port is in use, or another of the options cannot be.
        """
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start())
        await asyncio.shield(self._starting)
        return {name: self._said[name] for name in ("url", "node", "pid") if name in self._said}

    async def check(self) -> None:
        """Return if it is well, and give back memory that it does not need. Raises why it is not well."""
        if self._starting is not None and self._starting.done():
            await self._starting
        if self._server is not None and self._ending is None:
            await self._server.check()
        if self._app is not None and self._app.metrics.in_flight == 0:
            self._memory.give_back()

    async def drain(self, timeout_s: float) -> None:
        """Take no more connections, finish what is in flight within ``timeout_s`` seconds, and stop for good."""
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end(timeout_s))
        await asyncio.shield(self._ending)

    # -- starting

    async def _start(self) -> None:
        self._caller = await self._connect()
        # Held before it routes anything: whoever changes a route waits for those that hold one.
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
        self._say(state="ready", url=url)
        self._on_change(self._caller.snapshot)
        log.info("proxy %s serves on %s", self._name, url)

    async def _connect(self) -> RequestClient:
        while True:
            caller = RequestClient(self._url, self._instance)
            try:
                await caller.open()
            except BrokerUnavailable as e:
                outages.report_began(shown_url(self._url), self, f"proxy {self._name} waits for its broker: {e}")
                await asyncio.sleep(_RETRY_S)
            else:
                outages.report_ended(shown_url(self._url), self)
                return caller

    async def _take_lease(self) -> None:
        while True:
            try:
                # In a thread, as it blocks.
                await asyncio.to_thread(self._lease.start)
            except BrokerUnavailable as e:
                outages.report_began(shown_url(self._url), self, f"proxy {self._name} waits for its broker: {e}")
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
                if any(urlsplit(sibling.get("url") or "").port == port for sibling in siblings):
                    server = Server(app, host, port, shared=True, max_connections=limit)
                    await server.start()
                    return server
                is_starting = any(sibling.get("state") == "starting" for sibling in siblings)
                if not is_starting or asyncio.get_running_loop().time() > ends_at:
                    raise ConfigError(str(e)) from None
            await asyncio.sleep(0.1)

    async def _siblings(self) -> list[dict[str, Any]]:
        """Return the reports of other proxies that may listen on this machine."""
        assert self._caller is not None
        try:
            reports = await self._caller.registry.reports("proxies")
        except BrokerUnavailable:
            return [{"state": "starting"}]  # for all we know
        return [report for name, report in reports.items() if name != self._name and self._may_be_here(report)]

    def _may_be_here(self, report: Mapping[str, Any]) -> bool:
        if report.get("node") == self._said["node"] or report.get("address") == self._said["address"]:
            return True
        # One that is starting is reported by the controller first, which does not know its address.
        return report.get("state") == "starting" and "address" not in report

    # -- following the registry

    def _on_change(self, snapshot: Snapshot) -> None:
        assert self._app is not None
        self._app.apply(snapshot)
        self._say(version=snapshot.version)

    def _say(self, **news: Any) -> None:
        """Change what the registry holds of us, as soon as that can be reached."""
        self._said = {name: value for name, value in {**self._said, **news}.items() if value is not None}
        self._unsaid = True
        if self._telling is None or self._telling.done():
            self._telling = asyncio.get_running_loop().create_task(self._tell())

    async def _tell(self) -> None:
        assert self._caller is not None
        while self._unsaid:
            self._unsaid = False
            try:
                await self._caller.registry.report("proxies", self._name, self._said)
            except BrokerUnavailable:
                self._unsaid = True
                await asyncio.sleep(_RETRY_S)
            except Exception:
                log.exception("proxy %s cannot report itself", self._name)

    # -- ending

    async def _end(self, timeout_s: float) -> None:
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait([self._starting])
        if self._app is not None:
            self._app.draining = True
        if self._server is not None:
            self._say(state="draining", url=None)
            await self._server.stop(timeout_s)
        if self._app is not None:
            self._app.close()
        await asyncio.to_thread(self._lease.stop)
        if self._telling is not None:
            self._telling.cancel()
        if self._caller is not None:
            await self._caller.close()
