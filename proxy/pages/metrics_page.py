"""The page ``/-/metrics``: HTTP as the proxies of its port count it, and, at one proxy, the state of the instance."""

from __future__ import annotations

import asyncio
import logging
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import cast

import orjson

from ...broker.errors import BrokerRefused, BrokerUnavailable
from ...broker.registry.json_records import parse_objects
from ...handles.calls.request_client import RequestClient
from .backend_metrics import add_instance, add_ray_serve
from .exposition import Exposition
from .instance_state import owns_metrics, read_instance
from .metrics import HttpSnapshot, Metrics, add_http

logger = logging.getLogger("penstock.proxy")

SHARE_S = 2.0
"""Seconds between two reports of a proxy's metrics to the others that share its port."""

_STALE_MS = 5 * SHARE_S * 1000
"""A report that was not renewed for this long is that of a dead proxy."""

_SCRAPE_TIMEOUT_S = 2.0
"""How long the page waits for the broker. Without it the page has the metrics of this proxy alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyIdentity:
    """The name of a proxy, and the port that it shares."""

    name: str = ""
    group: str = ""
    """The same for all proxies that share a port; empty for a proxy that no other knows of."""
    shares_port: bool = False
    """Whether other proxies may share it: a scrape reaches any one of them, which answers for all."""


class MetricsPage:
    """Gathers the metrics of one proxy and its instance.

    Args:
        caller: the client by which the proxy publishes.
        metrics: the metrics of the proxy.
        buffered_bytes: returns the bytes of bodies that the proxy holds.
        identity: the proxy's place among the others.
        with_ray_serve: add metrics under the names of Ray Serve.
    """

    def __init__(
        self,
        caller: RequestClient,
        metrics: Metrics,
        buffered_bytes: Callable[[], int],
        identity: ProxyIdentity,
        *,
        with_ray_serve: bool,
    ) -> None:
        self._caller, self._metrics, self._buffered_bytes = caller, metrics, buffered_bytes
        self._identity, self._with_ray_serve = identity, with_ray_serve
        self._key = caller.keys.proxy_metrics

    async def text(self) -> str:
        """Return the page."""
        page = Exposition()
        version = {"version": metadata.version("penstock"), "python": platform.python_version()}
        page.add("gauge", "penstock_build_info", "The version of Penstock.", [(version, 1)])
        try:
            await asyncio.wait_for(self._add_all(page), _SCRAPE_TIMEOUT_S)
        except (BrokerUnavailable, BrokerRefused, asyncio.TimeoutError) as e:
            # The metrics of this proxy are most useful when the broker is in trouble.
            reason = str(e) or f"no response from the broker within {_SCRAPE_TIMEOUT_S:g} s"
            logger.warning("/-/metrics lacks the state of the instance: %s", reason)
            add_http(page, {self._label: self._snapshot()})
        return page.text()

    async def share_until_cancelled(self) -> None:
        """Report the metrics to the proxies that share the port, again and again."""
        while True:
            await asyncio.sleep(SHARE_S)
            try:
                await self._share()
            except (BrokerUnavailable, BrokerRefused) as e:
                logger.debug("cannot share the metrics of proxy %s: %s", self._identity.name, e)

    async def forget(self) -> None:
        """Delete the report of this proxy, which is about to end."""
        await self._caller.connection.send("HDEL", self._key, self._identity.name, repeat=True)

    @property
    def _label(self) -> str:
        return self._identity.name if self._identity.shares_port else ""

    async def _add_all(self, page: Exposition) -> None:
        identity = self._identity
        state = None
        if not identity.group or await owns_metrics(self._caller, identity.name, identity.group):
            state = await read_instance(self._caller)
        snapshots = {self._label: self._snapshot()}
        if identity.shares_port:
            snapshots = await self._siblings() | snapshots
        add_http(page, snapshots)
        if state is not None:
            add_instance(page, state)
            if self._with_ray_serve:
                add_ray_serve(page, state)

    def _snapshot(self) -> HttpSnapshot:
        caller = self._caller
        gauges = {
            "penstock_proxy_buffered_bytes": float(self._buffered_bytes()),
            "penstock_broker_connected": float(caller.connected),
            "penstock_broker_takes_writes": float(caller.takes_writes),
            "penstock_broker_reconnects_total": float(caller.connection.reconnects),
        }
        return self._metrics.snapshot(caller.shadows.stats, gauges)

    async def _share(self) -> None:
        report = {
            "group": self._identity.group,
            "at_ms": self._caller.connection.now_ms(),
            "metrics": asdict(self._snapshot()),
        }
        await self._caller.connection.send("HSET", self._key, self._identity.name, orjson.dumps(report), repeat=True)

    async def _siblings(self) -> dict[str, HttpSnapshot]:
        """Return the metrics of the living proxies that share the port; forget those of dead ones."""
        connection = self._caller.connection
        flat = cast("list[bytes]", await connection.send("HGETALL", self._key, repeat=True))
        found: dict[str, HttpSnapshot] = {}
        for name, report in parse_objects(flat).items():
            if connection.now_ms() - report["at_ms"] > _STALE_MS:
                await connection.send("HDEL", self._key, name, repeat=True)
            elif report["group"] == self._identity.group:
                found[name] = HttpSnapshot(**report["metrics"])
        return found
