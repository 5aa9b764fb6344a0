"""Metrics of an instance that its broker keeps: backends, replicas, controller, and the broker itself.

One proxy of the instance exposes them, so that sums over all scraped proxies are right; see `owns_metrics`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from ...broker.queue.stats import TIME_BOUNDS_S, BackendStats
from ...broker.wire.kept import FINAL
from .exposition import Buckets, Exposition, Labels
from .instance_state import InstanceState

_GAUGES: tuple[tuple[str, str, Callable[[BackendStats], float]], ...] = (
    ("requests_queued", "Requests that no replica has claimed.", lambda stats: stats.queued),
    ("requests_in_progress", "Requests that replicas have claimed and not settled.", lambda stats: stats.in_progress),
    ("queued_bytes", "Bytes of both, as max_queued_bytes counts them.", lambda stats: stats.queued_bytes),
    ("oldest_request_age_seconds", "Age of the oldest unsettled request.", lambda stats: stats.oldest_s),
    ("oldest_queued_age_seconds", "Age of the oldest unclaimed request.", lambda stats: stats.oldest_queued_s),
    ("dead_letters", "Dead letters.", lambda stats: stats.dead_letters),
)
_COUNTERS: tuple[tuple[str, str, Callable[[BackendStats], float]], ...] = (
    (
        "dead_letters_dropped_total",
        "Dead letters dropped: too many or too old.",
        lambda stats: stats.dead_letters_dropped,
    ),
    ("served_total", "Requests that ended without an error, shadow copies included.", lambda stats: stats.served),
    ("failed_total", "Requests that ended with an error.", lambda stats: stats.failed),
    ("retried_total", "Attempts that failed and were followed by another one.", lambda stats: stats.retried),
    ("refused_total", "Requests that admission refused.", lambda stats: stats.refused),
    ("expired_total", "Requests without a reply at their deadline.", lambda stats: stats.expired),
    ("skipped_total", "Requests not started, for a missed deadline or a withdrawal.", lambda stats: stats.skipped),
    ("cancelled_total", "Requests that their callers cancelled.", lambda stats: stats.cancelled),
    ("redelivered_total", "Deliveries of requests whose replica had died.", lambda stats: stats.redelivered),
    ("lease_losses_total", "Leases of living replicas that expired.", lambda stats: stats.lease_losses),
    (
        "run_seconds_total",
        "Total run time of requests; each request of a batch counts the whole run.",
        lambda stats: stats.run_s,
    ),
)


def add_instance(page: Exposition, state: InstanceState) -> None:
    """Add the metrics of an instance."""
    labelled: list[tuple[Labels, BackendStats]] = [
        ({"backend": tag}, stats) for tag, stats in sorted(state.stats.items())
    ]
    for name, help_text, value in _GAUGES:
        samples = ((labels, value(stats)) for labels, stats in labelled)
        page.add("gauge", f"penstock_backend_{name}", help_text, samples)
    for name, help_text, value in _COUNTERS:
        samples = ((labels, value(stats)) for labels, stats in labelled)
        page.add("counter", f"penstock_backend_{name}", help_text, samples)
    page.add(
        "counter",
        "penstock_backend_dead_lettered_total",
        "Requests that became dead letters. poison: their replicas died; unreadable: they could not be decoded.",
        (
            ({**labels, "reason": reason}, count)
            for labels, stats in labelled
            for reason, count in sorted(stats.dead_lettered.items())
        ),
    )
    page.add_histogram(
        "penstock_backend_run_duration_seconds",
        "Run time of a request; each request of a batch counts the whole run.",
        TIME_BOUNDS_S,
        ((labels, Buckets(stats.ran, stats.run_s)) for labels, stats in labelled),
    )
    page.add_histogram(
        "penstock_backend_queue_duration_seconds",
        "Time between publishing and running a request.",
        TIME_BOUNDS_S,
        ((labels, Buckets(stats.waited, stats.queue_s)) for labels, stats in labelled),
    )
    _add_batches(page, labelled)
    _add_kept(page, state)
    _add_replicas(page, state)
    _add_processes(page, state)


def _add_batches(page: Exposition, labelled: Sequence[tuple[Labels, BackendStats]]) -> None:
    bounds = sorted({bound for _, stats in labelled for bound in stats.batches})
    page.add_histogram(
        "penstock_backend_batch_size",
        "Requests in a batch.",
        bounds,
        (
            (labels, Buckets([*(stats.batches.get(bound, 0) for bound in bounds), 0], stats.batched))
            for labels, stats in labelled
            if stats.batches
        ),
    )


def _add_kept(page: Exposition, state: InstanceState) -> None:
    kept = [
        ({"backend": tag, "endpoint": endpoint, "status": status}, status, count)
        for tag, endpoints in sorted(state.kept.items())
        for endpoint, counts in sorted(endpoints.items())
        for status, count in counts.items()
    ]
    page.add(
        "gauge",
        "penstock_kept_requests",
        "Submitted requests, and those with an idempotency key, that are queued or running.",
        ((labels, count) for labels, status, count in kept if status not in FINAL),
    )
    page.add(
        "counter",
        "penstock_kept_requests_total",
        "Submitted requests, and those with an idempotency key, that have ended.",
        ((labels, count) for labels, status, count in kept if status in FINAL),
    )


def _add_replicas(page: Exposition, state: InstanceState) -> None:
    statuses = sorted(state.statuses.items())
    page.add(
        "gauge",
        "penstock_backend_replicas_wanted",
        "Replicas that the configuration asks for.",
        (({"backend": tag}, status.wanted) for tag, status in statuses),
    )
    counts = Counter[tuple[str, str]]((report.backend, report.state) for report in state.replicas.values())
    states = ("starting", "ready", "draining", "failed")
    page.add(
        "gauge",
        "penstock_backend_replicas",
        "Replicas by their state.",
        (({"backend": tag, "state": name}, counts[tag, name]) for tag in sorted(state.stats) for name in states),
    )
    page.add(
        "gauge",
        "penstock_backend_failing",
        "Whether a replica could not start, or resources are missing.",
        (({"backend": tag}, bool(status.failing or status.lacking)) for tag, status in statuses),
    )
    page.add(
        "counter",
        "penstock_backend_restarts_total",
        "Replicas that failed and were replaced.",
        (({"backend": tag}, status.restarts) for tag, status in statuses),
    )
    by_node = Counter((report.backend, report.node) for report in state.replicas.values() if report.state == "ready")
    page.add(
        "gauge",
        "penstock_node_replicas",
        "Ready replicas by node.",
        (({"backend": tag, "node": node}, count) for (tag, node), count in sorted(by_node.items())),
    )
    page.add(
        "gauge",
        "penstock_replica_ready",
        "Whether a replica is ready.",
        (
            ({"backend": report.backend, "replica": name, "node": report.node}, report.state == "ready")
            for name, report in sorted(state.replicas.items())
        ),
    )


def _add_processes(page: Exposition, state: InstanceState) -> None:
    page.add("gauge", "penstock_controller_up", "Whether the controller lives.", [({}, state.controller != "away")])
    page.add(
        "gauge",
        "penstock_head_up",
        "Whether Ray's head answers the controller.",
        [({}, state.controller == "alive")],
    )
    by_state = Counter(report.state for report in state.proxies.values())
    page.add(
        "gauge", "penstock_proxies", "Proxies by their state.", (({"state": s}, n) for s, n in sorted(by_state.items()))
    )
    for name, help_text, value in (
        ("penstock_broker_memory_bytes", "Memory that the broker uses.", state.memory_bytes),
        ("penstock_broker_memory_limit_bytes", "The broker's maxmemory; 0 for none.", state.memory_limit_bytes),
    ):
        page.add("gauge", name, help_text, [] if value is None else [({}, value)])


def add_ray_serve(page: Exposition, state: InstanceState) -> None:
    """Add metrics under the names of Ray Serve, for boards and alerts that were made for it."""
    labelled: list[tuple[Labels, str, BackendStats]] = [
        ({"deployment": tag, "application": "default"}, tag, stats) for tag, stats in sorted(state.stats.items())
    ]
    counters: Mapping[str, Callable[[BackendStats], float]] = {
        "ray_serve_deployment_request_counter_total": lambda stats: stats.served + stats.failed,
        "ray_serve_deployment_error_counter_total": lambda stats: stats.failed,
    }
    for name, value in counters.items():
        page.add("counter", name, "As in Ray Serve.", ((labels, value(stats)) for labels, _, stats in labelled))
    gauges: Mapping[str, Callable[[BackendStats], float]] = {
        "ray_serve_deployment_queued_queries": lambda stats: stats.queued,
        "ray_serve_replica_processing_queries": lambda stats: stats.in_progress,
    }
    for name, value in gauges.items():
        page.add("gauge", name, "As in Ray Serve.", ((labels, value(stats)) for labels, _, stats in labelled))
    page.add_histogram(
        "ray_serve_deployment_processing_latency_ms",
        "As in Ray Serve.",
        [bound * 1000 for bound in TIME_BOUNDS_S],
        ((labels, Buckets(stats.ran, stats.run_s * 1000)) for labels, _, stats in labelled),
    )
    page.add(
        "gauge",
        "ray_serve_deployment_replica_healthy",
        "As in Ray Serve, for each replica.",
        (
            ({"deployment": report.backend, "replica": name, "application": "default"}, report.state == "ready")
            for name, report in sorted(state.replicas.items())
        ),
    )
