"""The warnings of a status, and what a notebook shows of it, from reports alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from penstock.broker.registry.reports import ProxyReport, ReplicaReport
from penstock.serve.settings import Settings
from penstock.serve.status.status import Status
from penstock.serve.status.warnings import warnings
from tests.support.notebooks import shown_in_notebook


def settings(location: str = "HeadOnly", **others: Any) -> dict[str, Any]:
    return asdict(Settings(owner="o", node="a" * 56, address="10.0.0.2", http={"location": location}, **others))


def proxy(node: str, address: str, state: Any = "ready") -> ProxyReport:
    return ProxyReport(node=node, address=address, state=state, url=f"http://{address}:8000")


def test_a_proxy_on_the_node_of_start_or_at_its_address_is_no_reason_to_warn() -> None:
    for one in (proxy("a" * 56, "10.0.0.2"), proxy("b" * 56, "10.0.0.2")):
        assert warnings(settings(), [one], []) == []


def test_a_proxy_that_has_moved_is_named_with_the_reason() -> None:
    moved = [proxy("b" * 56, "10.0.0.3")]
    start = "node aaaaaaaaaaaa (10.0.0.2), which started the instance,"
    assert warnings(settings(), moved, []) == [f"HTTP is served at http://10.0.0.3:8000, because {start} is gone"]
    assert warnings(settings(), [], []) == [f"HTTP is not served: {start} has no proxy"]
    assert warnings(settings(), [proxy("b" * 56, "10.0.0.3", "starting")], []) == []
    assert warnings(settings("EveryNode"), moved, []) == []
    assert warnings(settings("NoServer"), [], []) == []
    assert warnings(settings(stopped=True), [], []) == []


def test_a_raised_niceness_is_named_once_for_each_node() -> None:
    replicas = [ReplicaReport(backend="f", node=node, niceness=15) for node in ("n1", "n1", "n2")]
    (warning,) = warnings(settings("EveryNode"), [], [*replicas, ReplicaReport(backend="f", node="n3")])
    assert warning.startswith("replicas or proxies run at a raised niceness on nodes n1 (15), n2 (15): ")
    assert "RAY_worker_niceness=0" in warning
    shown = str(Status(backends={}, endpoints={}, proxies={}, controller="alive", warnings=[warning]))
    assert shown == f"warning: {warning}"


def test_a_notebook_shows_tables_and_no_markup_of_values() -> None:
    endpoint = {"route": "/<b>", "methods": ["GET"], "traffic": {"f": 1.0}, "shadows": {}}
    status = Status(backends={}, endpoints={"e": endpoint}, proxies={}, controller="away", warnings=["<script>"])
    assert shown_in_notebook(status) == [
        ["endpoint", "route", "methods", "traffic"],
        ["e", "/<b>", "GET", "f 1"],
        ["the controller is away: running replicas serve, and changes wait"],
        ["warning: <script>"],
    ]
