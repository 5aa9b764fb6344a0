"""The proxy's own pages: routes, metrics, its health as probes see it, and those of submitted requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from ...broker.errors import BrokerRefused, BrokerUnavailable
from ...broker.queue.stats import BackendStats
from ...handles.calls.request_client import RequestClient
from .. import responses
from ..responses import HTTPResponse, RawHeaders
from ..routing import RESERVED, Routes
from . import metrics
from .submitted import PAGES, SubmittedRequests

logger = logging.getLogger("penstock.proxy")

AWAITED = HTTPResponse(200, [])
"""Stands for the response of a page that needs the broker: ``/-/metrics``, and those of submitted requests."""

_SCRAPE_TIMEOUT_S = 2.0
"""How long ``/-/metrics`` waits for the backends' stats from the broker. Without them it shows this proxy's alone."""


class SystemPages:
    """The pages of one proxy.

    Args:
        caller: the client by which the proxy publishes.
        submitted: the pages of submitted requests.
        its_metrics: the metrics of the proxy.
        unready_after_s: the length of an outage of the broker from which on the proxy is not ready.
    """

    def __init__(
        self,
        caller: RequestClient,
        submitted: SubmittedRequests,
        its_metrics: metrics.Metrics,
        *,
        unready_after_s: float,
    ) -> None:
        self._caller, self._submitted, self._metrics = caller, submitted, its_metrics
        self._unready_after_s = unready_after_s

    def page(self, method: str, path: str, routes: Routes, *, draining: bool) -> HTTPResponse:
        """Return the response to a request below ``/-/``; `AWAITED` if it is that of `awaited_page`."""
        name = path[len(RESERVED) :]
        if name.startswith(PAGES):
            return AWAITED
        if name not in ("routes", "healthz", "livez", "readyz", "metrics"):
            return responses.of_status(404, f"no system page {path!r}")
        if method not in ("GET", "HEAD"):
            return responses.not_allowed(method, path, ("GET", "HEAD"))
        if name == "routes":
            return responses.of_json(routes.listing())
        if name == "metrics":
            return AWAITED
        if name == "livez":
            return responses.of_text("ok")
        if draining:
            return responses.of_text("draining", 503)
        if name == "readyz" and self._caller.outage_s <= self._unready_after_s:
            # A short outage of the broker is the same for all proxies: a balancer that dropped them would have none.
            return responses.of_text("ok")
        if not self._caller.connected:
            return responses.of_text("no broker", 503)
        if not self._caller.takes_writes:
            return responses.of_text("the broker refuses writes", 503)
        return responses.of_text("ok")

    async def awaited_page(self, method: str, path: str, headers: RawHeaders) -> HTTPResponse:
        """Return the response of a page that needs the broker."""
        name = path[len(RESERVED) :]
        if name.startswith(PAGES):
            return await self._submitted.page(method, name[len(PAGES) :], headers)
        return await self._metrics_page()

    async def _metrics_page(self) -> HTTPResponse:
        backend_stats: Mapping[str, BackendStats] | None = None
        try:
            backend_stats = await asyncio.wait_for(self._caller.backend_stats(), _SCRAPE_TIMEOUT_S)
        except (BrokerUnavailable, BrokerRefused, asyncio.TimeoutError) as e:
            # The metrics of this proxy are most useful when the broker is in trouble.
            reason = str(e) or f"no response from the broker within {_SCRAPE_TIMEOUT_S:g} s"
            logger.warning("/-/metrics lacks the stats of backends: %s", reason)
        page = self._metrics.render(self._caller.shadows.stats, backend_stats)
        return responses.of_text(page, content_type=metrics.CONTENT_TYPE)
