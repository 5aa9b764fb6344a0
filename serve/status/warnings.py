"""Warnings of a status: what serves, but not as it should. Pure functions over the reports of an instance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...broker.registry.reports import ProxyReport, ReplicaReport


def warnings(
    settings: Mapping[str, Any] | None, proxies: Iterable[ProxyReport], replicas: Iterable[ReplicaReport]
) -> list[str]:
    """Return the warnings, each as a sentence.

    Args:
        settings: the fields of the instance's `Settings`, as the registry has them.
        proxies: the reports of all proxies.
        replicas: the reports of all replicas.
    """
    proxies = list(proxies)
    return [*_moved(settings, proxies), *_niceness([*proxies, *replicas])]


def _moved(settings: Mapping[str, Any] | None, proxies: list[ProxyReport]) -> list[str]:
    """Return where HTTP is served instead of the node that started the instance."""
    if settings is None or settings.get("http", {}).get("location") != "HeadOnly" or settings.get("stopped"):
        return []
    node, address = settings["node"], settings.get("address", "")
    start = f"node {node[:12]}" + (f" ({address})" if address else "")
    serving = [proxy for proxy in proxies if proxy.state == "ready"]
    if not serving:
        return [] if proxies else [f"HTTP is not served: {start}, which started the instance, has no proxy"]
    for proxy in serving:
        if proxy.node == node or (address and proxy.address == address):
            return []
    return [f"HTTP is served at {serving[0].url}, because {start}, which started the instance, is gone"]


def _niceness(reports: list[ProxyReport | ReplicaReport]) -> list[str]:
    nice = sorted({(report.node[:12], report.niceness) for report in reports if report.niceness > 0})
    if not nice:
        return []
    where = ", ".join(f"{node} ({niceness})" for node, niceness in nice)
    return [
        f"replicas or proxies run at a raised niceness on nodes {where}: other programs slow them down; start Ray with "
        "RAY_worker_niceness=0, as `penstock node` does"
    ]
