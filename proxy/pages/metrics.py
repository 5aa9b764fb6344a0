"""Metrics of a proxy, in the text format of Prometheus.

https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate, chain

from ...broker.queue.stats import BackendStats
from ...handles.calls.shadowing import ShadowStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

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

    def render(
        self, copies: Mapping[str, ShadowStats] | None = None, backend_stats: Mapping[str, BackendStats] | None = None
    ) -> str:
        """Return all metrics as text, with the shadow ``copies`` of each backend and its ``backend_stats``."""
        lines = chain(self._lines(), _lines_of_copies(copies or {}), _lines_of_backends(backend_stats or {}))
        return "".join(f"{line}\n" for line in lines)

    def _lines(self) -> Iterator[str]:
        series = [(f'endpoint="{escape(name)}"', one) for name, one in sorted(self._series.items())]

        yield "# HELP penstock_http_requests_total HTTP requests that ended; 499: the client disconnected first."
        yield "# TYPE penstock_http_requests_total counter"
        for label, one in series:
            for status, count in sorted(one.by_status.items()):
                yield f'penstock_http_requests_total{{{label},status="{status}"}} {count}'

        yield "# HELP penstock_http_request_duration_seconds From the request's head to the end of the response."
        yield "# TYPE penstock_http_request_duration_seconds histogram"
        for label, one in series:
            counts = list(accumulate(one.in_buckets))
            for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), counts, strict=True):
                yield f'penstock_http_request_duration_seconds_bucket{{{label},le="{bound}"}} {count}'
            yield f"penstock_http_request_duration_seconds_sum{{{label}}} {one.sum_s:.6f}"
            yield f"penstock_http_request_duration_seconds_count{{{label}}} {counts[-1]}"

        yield "# HELP penstock_http_requests_in_flight HTTP requests in progress."
        yield "# TYPE penstock_http_requests_in_flight gauge"
        yield f"penstock_http_requests_in_flight {self.in_flight}"


def _lines_of_copies(copies: Mapping[str, ShadowStats]) -> Iterator[str]:
    yield "# HELP penstock_shadow_copies_total Copies of requests for shadow backends; refused: their queue was full."
    yield "# TYPE penstock_shadow_copies_total counter"
    for backend, counted in sorted(copies.items()):
        label = f'backend="{escape(backend)}"'
        yield f'penstock_shadow_copies_total{{{label},outcome="queued"}} {counted.queued}'
        yield f'penstock_shadow_copies_total{{{label},outcome="refused"}} {counted.refused}'


_BACKEND_METRICS: tuple[tuple[str, str, str, Callable[[BackendStats], float]], ...] = (
    ("requests_queued", "gauge", "Requests that no replica has claimed.", lambda stats: stats.queued),
    (
        "requests_in_progress",
        "gauge",
        "Requests that replicas have claimed and not settled.",
        lambda stats: stats.in_progress,
    ),
    ("queued_bytes", "gauge", "Bytes of both, as max_queued_bytes counts them.", lambda stats: stats.queued_bytes),
    ("dead_letters", "gauge", "Dead letters.", lambda stats: stats.dead_letters),
    (
        "dead_letters_dropped_total",
        "counter",
        "Dead letters dropped: too many or too old.",
        lambda stats: stats.dead_letters_dropped,
    ),
    (
        "served_total",
        "counter",
        "Requests that ended without an error, shadow copies included.",
        lambda stats: stats.served,
    ),
    ("failed_total", "counter", "Requests that ended with an error.", lambda stats: stats.failed),
    (
        "retried_total",
        "counter",
        "Attempts that failed and were followed by another one.",
        lambda stats: stats.retried,
    ),
    (
        "run_seconds_total",
        "counter",
        "Total run time of requests; each request of a batch counts the whole run.",
        lambda stats: stats.run_s,
    ),
)


def _lines_of_backends(backend_stats: Mapping[str, BackendStats]) -> Iterator[str]:
    """Yield the metrics of backends. The broker keeps them, so every proxy reports the same values."""
    if not backend_stats:
        return
    labelled = [(f'backend="{escape(name)}"', stats) for name, stats in sorted(backend_stats.items())]
    for name, kind, help_text, value in _BACKEND_METRICS:
        yield f"# HELP penstock_backend_{name} {help_text} The same at every proxy."
        yield f"# TYPE penstock_backend_{name} {kind}"
        for label, stats in labelled:
            yield f"penstock_backend_{name}{{{label}}} {value(stats):.16g}"
    yield "# HELP penstock_backend_batch_size Requests in a batch. The same at every proxy."
    yield "# TYPE penstock_backend_batch_size histogram"
    for label, stats in labelled:
        if stats.batches:
            bounds = sorted(stats.batches)
            counts = list(accumulate(stats.batches[bound] for bound in bounds))
            for bound, count in zip((*bounds, "+Inf"), (*counts, counts[-1]), strict=True):
                yield f'penstock_backend_batch_size_bucket{{{label},le="{bound}"}} {count}'
            yield f"penstock_backend_batch_size_sum{{{label}}} {stats.batched}"
            yield f"penstock_backend_batch_size_count{{{label}}} {counts[-1]}"


def escape(value: str) -> str:
    """Return ``value`` escaped for the quotes of a label."""
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
