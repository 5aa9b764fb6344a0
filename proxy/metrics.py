"""Metrics of a proxy in the text format of Prometheus.

https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate, chain

from ..broker.queue.stats import BackendStats
from ..handles.calls.shadowing import ShadowCopies

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the latency histogram's buckets."""


class Series:
    """The figures of one endpoint."""

    __slots__ = ("by_status", "in_buckets", "sum_s")

    def __init__(self) -> None:
        self.by_status: dict[int, int] = {}
        self.in_buckets = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0

    def count(self, status: int, took_s: float) -> None:
        self.by_status[status] = self.by_status.get(status, 0) + 1
        self.in_buckets[bisect_left(BOUNDS_S, took_s)] += 1
        self.sum_s += took_s


class Metrics:
    """The figures of one proxy since it started."""

    def __init__(self) -> None:
        self.in_flight = 0
        self._series: dict[str, Series] = {}

    def of(self, endpoint: str) -> Series:
        """Return the series of an endpoint; the empty name has what no endpoint answered."""
        if (series := self._series.get(endpoint)) is None:
            series = self._series[endpoint] = Series()
        return series

    def render(
        self, copies: Mapping[str, ShadowCopies] | None = None, backend_stats: Mapping[str, BackendStats] | None = None
    ) -> str:
        """Return them all, with those of each backend: the copies sent to shadows, and its ``backend_stats``."""
        lines = chain(self._lines(), _lines_of_copies(copies or {}), _lines_of_backends(backend_stats or {}))
        return "".join(f"{line}\n" for line in lines)

    def _lines(self) -> Iterator[str]:
        series = [(f'endpoint="{escape(name)}"', backend_stats) for name, backend_stats in sorted(self._series.items())]

        yield "# HELP penstock_http_requests_total HTTP requests answered; 499: the client hung up first."
        yield "# TYPE penstock_http_requests_total counter"
        for label, backend_stats in series:
            for status, count in sorted(backend_stats.by_status.items()):
                yield f'penstock_http_requests_total{{{label},status="{status}"}} {count}'

        yield "# HELP penstock_http_request_duration_seconds From the request's head to the end of its answer."
        yield "# TYPE penstock_http_request_duration_seconds histogram"
        for label, backend_stats in series:
            counts = list(accumulate(backend_stats.in_buckets))
            for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), counts, strict=True):
                yield f'penstock_http_request_duration_seconds_bucket{{{label},le="{bound}"}} {count}'
            yield f"penstock_http_request_duration_seconds_sum{{{label}}} {backend_stats.sum_s:.6f}"
            yield f"penstock_http_request_duration_seconds_count{{{label}}} {counts[-1]}"

        yield "# HELP penstock_http_requests_in_flight HTTP requests being answered."
        yield "# TYPE penstock_http_requests_in_flight gauge"
        yield f"penstock_http_requests_in_flight {self.in_flight}"


def _lines_of_copies(copies: Mapping[str, ShadowCopies]) -> Iterator[str]:
    yield "# HELP penstock_shadow_copies_total Copies of requests for shadow backends; refused: their queue was full."
    yield "# TYPE penstock_shadow_copies_total counter"
    for backend, counted in sorted(copies.items()):
        label = f'backend="{escape(backend)}"'
        yield f'penstock_shadow_copies_total{{{label},outcome="queued"}} {counted.queued}'
        yield f'penstock_shadow_copies_total{{{label},outcome="refused"}} {counted.refused}'


_OF_BACKENDS: tuple[tuple[str, str, str, Callable[[BackendStats], float]], ...] = (
    ("requests_queued", "gauge", "Requests that wait.", lambda of: of.queued),
    ("requests_in_progress", "gauge", "Requests that replicas hold.", lambda of: of.in_progress),
    ("queued_bytes", "gauge", "Bytes of both, as max_queued_bytes counts them.", lambda of: of.queued_bytes),
    ("dead_letters", "gauge", "Requests that nobody could serve.", lambda of: of.dead_letters),
    (
        "dead_letters_dropped_total",
        "counter",
        "Dead letters dropped: too many or too old.",
        lambda of: of.dead_letters_dropped,
    ),
    ("served_total", "counter", "Requests answered without an error, copies for shadows too.", lambda of: of.served),
    ("failed_total", "counter", "Requests answered with an error.", lambda of: of.failed),
    ("run_seconds_total", "counter", "How long requests ran; each of a batch counts all of it.", lambda of: of.run_s),
)


def _lines_of_backends(backend_stats: Mapping[str, BackendStats]) -> Iterator[str]:
    """Every proxy tells the same of them: they are the broker's."""
    if not backend_stats:
        return
    labelled = [(f'backend="{escape(name)}"', of) for name, of in sorted(backend_stats.items())]
    for name, kind, about, value in _OF_BACKENDS:
        yield f"# HELP penstock_backend_{name} {about} The same at every proxy."
        yield f"# TYPE penstock_backend_{name} {kind}"
        for label, of in labelled:
            yield f"penstock_backend_{name}{{{label}}} {value(of):.16g}"
    yield "# HELP penstock_backend_batch_size Requests in a batch. The same at every proxy."
    yield "# TYPE penstock_backend_batch_size histogram"
    for label, of in labelled:
        if of.batches:
            bounds = sorted(of.batches)
            counts = list(accumulate(of.batches[bound] for bound in bounds))
            for bound, count in zip((*bounds, "+Inf"), (*counts, counts[-1]), strict=True):
                yield f'penstock_backend_batch_size_bucket{{{label},le="{bound}"}} {count}'
            yield f"penstock_backend_batch_size_sum{{{label}}} {of.batched}"
            yield f"penstock_backend_batch_size_count{{{label}}} {counts[-1]}"


def escape(value: str) -> str:
    """Return ``value`` as it may stand between the quotes of a label."""
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
