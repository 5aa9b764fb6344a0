"""Metrics of HTTP: the counts of one proxy, and the sums over the proxies that share its port."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...handles.calls.shadowing import ShadowStats
from .exposition import Buckets, Exposition, Labels

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the latency histogram's buckets."""


class Series:
    """The metrics of one endpoint."""

    __slots__ = ("by_status", "in_buckets", "sum_s")

    def __init__(self) -> None:
        self.by_status: dict[int, int] = {}
        self.in_buckets = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0

    def count(self, status: int, took_s: float) -> None:
        """Count a request that ended with ``status`` after ``took_s`` seconds."""
        self.by_status[status] = self.by_status.get(status, 0) + 1
        self.in_buckets[bisect_left(BOUNDS_S, took_s)] += 1
        self.sum_s += took_s


class Metrics:
    """The metrics of one proxy since it started."""

    def __init__(self) -> None:
        self.in_flight = 0
        self._series: dict[str, Series] = {}

    def of(self, endpoint: str) -> Series:
        """Return the series of an endpoint. The empty name stands for requests without an endpoint."""
        if (series := self._series.get(endpoint)) is None:
            series = self._series[endpoint] = Series()
        return series

    def render(self) -> str:
        """Return them as text, without those that other objects keep."""
        page = Exposition()
        add_http(page, {"": self.snapshot({}, {})})
        return page.text()

    def snapshot(self, copies: Mapping[str, ShadowStats], gauges: dict[str, float]) -> HttpSnapshot:
        """Return the present values, with the shadow ``copies`` of each backend and other ``gauges`` of the process."""
        return HttpSnapshot(
            in_flight=self.in_flight,
            endpoints={
                name: [{str(status): count for status, count in one.by_status.items()}, list(one.in_buckets), one.sum_s]
                for name, one in sorted(self._series.items())
            },
            copies={tag: [counted.queued, counted.refused] for tag, counted in sorted(copies.items())},
            gauges=gauges,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSnapshot:
    """The metrics of one proxy at one moment, in JSON's types."""

    in_flight: int = 0
    endpoints: dict[str, list[Any]] = field(default_factory=dict[str, "list[Any]"])
    """Endpoint → requests by status, numbers of requests by bucket, seconds in all."""
    copies: dict[str, list[int]] = field(default_factory=dict[str, "list[int]"])
    """Backend → shadow copies that were queued, and that were refused."""
    gauges: dict[str, float] = field(default_factory=dict[str, float])
    """Other values of the process, by the name of their metric."""


_PROCESS = {
    "penstock_proxy_buffered_bytes": ("gauge", "Bytes of request and response bodies that the proxy holds."),
    "penstock_broker_connected": ("gauge", "Whether the proxy is connected to the broker."),
    "penstock_broker_takes_writes": ("gauge", "Whether the broker accepts writes of the proxy."),
    "penstock_broker_reconnects_total": ("counter", "How often the proxy has connected to the broker again."),
}


def add_http(page: Exposition, snapshots: Mapping[str, HttpSnapshot]) -> None:
    """Add the metrics of proxies by their names, or of one proxy under the empty name: then there is no such label."""
    rows: list[tuple[Labels, HttpSnapshot]] = [
        ({"proxy": name} if name else {}, snapshot) for name, snapshot in sorted(snapshots.items())
    ]
    series = [
        ({"endpoint": endpoint, **labels}, values)
        for labels, snapshot in rows
        for endpoint, values in snapshot.endpoints.items()
    ]
    page.add(
        "counter",
        "penstock_http_requests_total",
        "HTTP requests that ended; 499: the client disconnected first.",
        (
            ({**labels, "status": status}, count)
            for labels, (by_status, *_) in series
            for status, count in sorted(by_status.items())
        ),
    )
    page.add_histogram(
        "penstock_http_request_duration_seconds",
        "From the request's head to the end of the response.",
        BOUNDS_S,
        ((labels, Buckets(counts, total)) for labels, (_, counts, total) in series),
    )
    page.add(
        "gauge",
        "penstock_http_requests_in_flight",
        "HTTP requests in progress.",
        ((labels, snapshot.in_flight) for labels, snapshot in rows),
    )
    page.add(
        "counter",
        "penstock_shadow_copies_total",
        "Copies of requests for shadow backends; refused: their queue was full.",
        (
            ({"backend": tag, "outcome": outcome, **labels}, count)
            for labels, snapshot in rows
            for tag, counts in snapshot.copies.items()
            for outcome, count in zip(("queued", "refused"), counts, strict=True)
        ),
    )
    for name, (kind, help_text) in _PROCESS.items():
        page.add(
            "counter" if kind == "counter" else "gauge",
            name,
            help_text,
            ((labels, snapshot.gauges[name]) for labels, snapshot in rows if name in snapshot.gauges),
        )
