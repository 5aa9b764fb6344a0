"""The proxy's own pages: routes, metrics, its health as probes see it, and those of submitted requests."""

from __future__ import annotations

from ...handles.calls.request_client import RequestClient
from .. import responses
from ..responses import HTTPResponse, RawHeaders
from ..routing import RESERVED, Routes
from .exposition import CONTENT_TYPE
from .metrics_page import MetricsPage
from .submitted import PAGES, SubmittedRequests

AWAITED = HTTPResponse(200, [])
"""Stands for the response of a page that needs the broker: ``/-/metrics``, and those of submitted requests."""

_PAGES = frozenset({"routes", "healthz", "livez", "readyz", "metrics"})
_ADMIN = frozenset({"routes", "metrics"})
"""The pages that ``admin_port`` moves to a port of their own. Probes need the others at the port of requests."""


class SystemPages:
    """The pages of one proxy.

    Args:
        caller: the client by which the proxy publishes.
        submitted: the pages of submitted requests.
        metrics_page: gathers the metrics.
        has_admin_port: whether some pages are served on another port alone.
        unready_after_s: the length of an outage of the broker from which on the proxy is not ready.
    """

    def __init__(
        self,
        caller: RequestClient,
        submitted: SubmittedRequests,
        metrics_page: MetricsPage,
        *,
        has_admin_port: bool,
        unready_after_s: float,
    ) -> None:
        self._caller, self._submitted, self.metrics_page = caller, submitted, metrics_page
        self._public = _PAGES - _ADMIN if has_admin_port else _PAGES
        self._unready_after_s = unready_after_s

    def page(self, method: str, path: str, routes: Routes, *, draining: bool, is_admin: bool = False) -> HTTPResponse:
        """Return the response to a request below ``/-/``; `AWAITED` if it is that of `awaited_page`.

        ``is_admin`` is true for a request to the admin port.
        """
        name = path.removeprefix(RESERVED)
        if name.startswith(PAGES) and not is_admin:
            return AWAITED
        if name not in (_PAGES if is_admin else self._public):
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
        return responses.of_text(await self.metrics_page.text(), content_type=CONTENT_TYPE)
