"""The observed state: reports of replicas and proxies, and what Ray knows of their processes.

The observer also remembers failures, and what was ready at some time. None of that is stored except in the reported
statuses: it improves the planner's decisions, which are correct without it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from ...broker.errors import PenstockError
from ...broker.registry.records import Snapshot
from ...broker.registry.reports import BackendStatus, ProxyReport, ReplicaReport
from ...broker.registry.store import Registry
from ...handles.errors import to_wire
from ...proxy.options import ProxyOptions
from ..ray_nodes import alive_nodes, growth
from ..settings import Settings
from .actors import ActorPool, ManagedActor
from .backend_status import describe, refused_change
from .backoff import NO_FAILURES, Failures
from .placement import Amounts, Growth, Node, NodeUse, head_only_node, resources_of
from .state import (
    ActorState,
    DesiredBackend,
    DesiredProxies,
    DesiredState,
    ObservedProxy,
    ObservedReplica,
    ObservedState,
    Rollout,
    Version,
)

log = logging.getLogger(__name__)

_NODES_EVERY_S = 1.0
_DRAIN_S = 60.0
"""Seconds that a node takes to drain which Ray drains without a deadline."""
_LEAST_DRAIN_S = 10.0
"""Seconds that a proxy has for its requests, after its delay, on a node that leaves before another proxy is ready."""
_AUTOSCALER_START_S = 10.0
"""Ray has no autoscaler if there was none for this long; it starts some seconds after the cluster."""
_HEAD_TIMEOUT_S = 1.0
"""Ray's head counts as away when it has not answered within this time."""


class StateObserver:
    """Observes one instance.

    Args:
        registry: holds the reports and the statuses.
        replicas: the actors of all replicas. Unknown ones that have a report are adopted.
        proxies: the actors of all proxies, likewise.
    """

    def __init__(self, registry: Registry, replicas: ActorPool, proxies: ActorPool) -> None:
        self._registry = registry
        self._replicas, self._proxies = replicas, proxies
        self.statuses: dict[str, BackendStatus] = {}
        """The status that was reported last of each backend."""
        self.nodes: list[Node] = []
        self.proxy_error: PenstockError | None = None
        """The error of the last proxy that failed."""
        self.head_answers = True
        """Whether Ray's head answers. Without it no actor can be started, found or ended, and calls to it block."""
        self._proven: set[Version] = set()
        self._nodes_at_s = -_NODES_EVERY_S
        self._nodes_query: asyncio.Future[tuple[list[Node], Growth | None, bool]] | None = None
        self._growth: Growth | None = None
        """The nodes that Ray's autoscaler may add."""
        self._knows_growth, self._began_s = False, time.monotonic()
        self._has_grown = False
        """Whether Ray's autoscaler has been seen to add nodes, so that it also removes idle ones."""
        self._node_use = NodeUse()
        self._drained_by_s: dict[str, float] = {}
        """When each node that leaves must be empty."""
        self._start_node_seen_s = time.monotonic()
        """When the node that called ``start`` was seen last, or when this observer began to look."""
        self._replica_reports: dict[str, ReplicaReport] = {}
        self._proxy_reports: dict[str, ProxyReport] = {}
        self._resources: dict[Version, Amounts] = {}
        self._rolled_out: dict[str, Rollout] = {}
        self._start_errors: dict[Version, tuple[int, dict[str, Any]]] = {}
        """The last error of a start, with the version of the configuration that the replica started with."""
        self._failures: dict[Version, Failures] = {}
        self._restarts: dict[str, int] = {}
        """Backend → how many replicas have failed after they were ready."""
        self._proxy_failures: dict[str, Failures] = {}
        self._ready_since_s: dict[ManagedActor, float] = {}
        self._counted: set[ManagedActor] = set()

    async def restore(self) -> None:
        """Read the statuses that an earlier controller reported. Raises `BrokerUnavailable`."""
        self.statuses = await self._registry.get_reports(BackendStatus)
        for tag, status in self.statuses.items():
            self._restarts[tag] = status.restarts
            if status.failing:
                self._start_errors[tag, status.version] = status.config_version, status.failing
            if status.rolled_out:
                self._rolled_out[tag] = (tag, status.version, status.config_version)
                self._proven.add((tag, status.version))

    async def observe(self) -> None:
        """Read the reports, adopt unknown actors, and record which actors became ready or failed.

        While Ray's head does not answer, only `head_answers` is updated.

        Raises:
            BrokerUnavailable: the reports cannot be read.
        """
        await self._observe_nodes()
        if not self.head_answers:
            return
        self._replica_reports.update(await self._registry.get_reports(ReplicaReport))
        self._proxy_reports.update(await self._registry.get_reports(ProxyReport))
        # Actors that an earlier controller started, and reports that outlived their process.
        for name in self._replica_reports.keys() - self._replicas.members.keys():
            self._replicas.adopt(name)
        for name in self._proxy_reports.keys() - self._proxies.members.keys():
            self._proxies.adopt(name)
        self._record_outcomes(time.monotonic())

    async def _observe_nodes(self) -> None:
        if self._nodes_query is None:
            if time.monotonic() - self._nodes_at_s < _NODES_EVERY_S:
                return
            # On a thread and with a timeout, because the call blocks for long while Ray's head is away.
            self._nodes_query = asyncio.ensure_future(asyncio.to_thread(_query_nodes, self._growth))
        await asyncio.wait([self._nodes_query], timeout=_HEAD_TIMEOUT_S)
        answers = False
        if self._nodes_query.done():
            query, self._nodes_query = self._nodes_query, None
            if answers := query.exception() is None:
                nodes, self._growth, is_told = query.result()
                self._knows_growth = (
                    self._knows_growth or is_told or time.monotonic() - self._began_s > _AUTOSCALER_START_S
                )
                self._has_grown = self._has_grown or (self._growth is not None and self._growth.adds_nodes)
                self.nodes, self._nodes_at_s = self._with_drain_times(nodes), time.monotonic()
        if answers != self.head_answers:
            self.head_answers = answers
            if answers:
                log.warning("Ray's head answers again")
            else:
                log.warning("Ray's head does not answer: running replicas and proxies continue unchanged")

    def _with_drain_times(self, nodes: list[Node]) -> list[Node]:
        """Return ``nodes``; one that drains without a deadline has as much time since this was first known."""
        now_s = time.monotonic()
        leaving = {node.id: node.drained_by_s for node in nodes if node.drained_by_s is not None}
        for node_id in leaving.keys() - self._drained_by_s.keys():
            log.info("node %s drains: its replicas and proxies move to other nodes", node_id)
        for node_id, by_s in leaving.items():
            if by_s == math.inf:
                leaving[node_id] = self._drained_by_s.get(node_id, now_s + _DRAIN_S)
        self._drained_by_s = leaving
        return [replace(node, drained_by_s=leaving.get(node.id)) for node in nodes]

    def desired(self, snapshot: Snapshot, settings: Settings) -> DesiredState:
        """Return the desired state: the records of the registry, on the nodes that are alive and stay."""
        backends: dict[str, DesiredBackend] = {}
        for tag, record in snapshot.backends.items():
            config = record.config
            backends[tag] = DesiredBackend(
                tag=tag,
                version=record.version,
                replicas=config.initial_replicas,
                config_version=record.config_version,
                grace_s=config.graceful_shutdown_timeout_s,
                resources=self._resources.setdefault((tag, record.version), resources_of(record.actor_options)),
            )
        self._forget_versions({backend.key for backend in backends.values()})
        return DesiredState(backends=backends, http=self._desired_proxies(settings))

    def _desired_proxies(self, settings: Settings) -> DesiredProxies:
        options, now_s = settings.http, time.monotonic()
        if any(node.id == settings.node for node in self.nodes):
            self._start_node_seen_s = now_s
        nodes: list[str] = []
        if options["location"] == "EveryNode":
            idle = self._node_use.idle(self.nodes, self._nodes_of_replicas(), now_s) - {settings.node}
            nodes = [node.id for node in self.nodes if node.stays and not (self._has_grown and node.id in idle)]
        elif options["location"] == "HeadOnly":
            gone_s = now_s - self._start_node_seen_s
            chosen = head_only_node(self.nodes, settings.node, settings.address, gone_s)
            nodes = [] if chosen is None else [chosen]
        # Settings of an older version lack the options that are newer.
        limits = ProxyOptions.from_fields(options)
        return DesiredProxies(
            nodes=tuple(nodes),
            per_node=options["proxies_per_node"],
            port=options["port"],
            drain_s=limits.drain_delay_s + min(limits.request_timeout_s, _LEAST_DRAIN_S),
        )

    def _nodes_of_replicas(self) -> set[str]:
        return {self._report_of(name).node for name, member in self._replicas.members.items() if not member.gone}

    def can_leave(self, node_id: str) -> bool:
        """Return whether a node leaves, has neither replicas nor proxies of the instance, and another node stays."""
        by_id = {node.id: node for node in self.nodes}
        if node_id not in by_id or by_id[node_id].stays or not any(node.stays for node in self.nodes):
            return False
        seen = self.observed()
        occupied = {replica.node for replica in seen.replicas} | {proxy.node for proxy in seen.proxies}
        return node_id not in occupied

    @property
    def rolled_out(self) -> frozenset[Rollout]:
        """The rollouts that were complete at some time."""
        return frozenset(self._rolled_out.values())

    def replica_reports(self) -> dict[str, ReplicaReport]:
        """Return the reports of the known replicas."""
        return {name: self._report_of(name) for name in self._replicas.members}

    def observed(self) -> ObservedState:
        """Return the observed state."""
        return ObservedState(
            now_s=time.monotonic(),
            replicas=[self._replica(name, member) for name, member in self._replicas.members.items()],
            proxies=[self._proxy(name, member) for name, member in self._proxies.members.items()],
            nodes=self.nodes,
            failures=self._failures,
            proxy_failures=self._proxy_failures,
            proven=frozenset(self._proven),
            rolled_out=self.rolled_out,
            growth=self._growth,
            knows_growth=self._knows_growth,
            reported=frozenset(self.statuses),
        )

    async def report_statuses(self, desired: DesiredState) -> None:
        """Write the statuses that changed to the registry. Raises `BrokerUnavailable`."""
        observed = self.observed()
        for tag, backend in desired.backends.items():
            status = describe(backend, observed, self._start_error(backend) or self._reconfigure_error(backend))
            if status.rolled_out:
                self._rolled_out[tag] = backend.rollout
            refused = refused_change(self.statuses.get(tag), status)
            status = replace(status, refused=refused, restarts=self._restarts.get(tag, 0))
            if status != self.statuses.get(tag):
                await self._registry.put_report(tag, status)
                self.statuses[tag] = status

    async def forget_backend(self, tag: str) -> None:
        """Delete the status of a backend that was deleted. Raises `BrokerUnavailable`."""
        await self._registry.delete_report(BackendStatus, tag)
        self.statuses.pop(tag, None)
        self._restarts.pop(tag, None)

    def backend_of(self, replica: str) -> str:
        return self._report_of(replica).backend

    def note_replica(self, name: str, report: ReplicaReport) -> None:
        """Use ``report`` for the new replica ``name`` until it writes its own."""
        self._replica_reports[name] = report

    def note_proxy(self, name: str, report: ProxyReport) -> None:
        """Use ``report`` for the new proxy ``name`` until it writes its own."""
        self._proxy_reports[name] = report

    def forget_replica(self, name: str) -> None:
        """Forget a replica that is gone."""
        self._ready_since_s.pop(self._replicas.members[name], None)
        self._counted.discard(self._replicas.members[name])
        self._replica_reports.pop(name, None)
        self._replicas.forget(name)

    def forget_proxy(self, name: str) -> None:
        """Forget a proxy that is gone."""
        self._counted.discard(self._proxies.members[name])
        self._proxy_reports.pop(name, None)
        self._proxies.forget(name)

    def _replica(self, name: str, member: ManagedActor) -> ObservedReplica:
        report = self._report_of(name)
        return ObservedReplica(
            id=name,
            backend=report.backend,
            version=report.version,
            state=_state(member, report),
            config_version=report.config_version,
            node=report.node,
            resources=self._resources.get((report.backend, report.version), {}),
            is_drain_awaited=member.ending,
            may_claim=report.state == "ready",
        )

    def _proxy(self, name: str, member: ManagedActor) -> ObservedProxy:
        report = self._proxy_reports.get(name, ProxyReport())
        return ObservedProxy(
            id=name,
            node=report.node,
            state=_state(member, report),
            port=urlsplit(report.url or "").port or 0,
            is_drain_awaited=member.ending,
        )

    def _report_of(self, replica: str) -> ReplicaReport:
        """Return the report of a replica. Without one, its name shows its backend."""
        known = self._replica_reports.get(replica)
        return ReplicaReport(backend=replica.rpartition("#")[0]) if known is None else known

    def _version_of(self, replica: str) -> Version:
        report = self._report_of(replica)
        return report.backend, report.version

    def _forget_versions(self, desired: set[Version]) -> None:
        """Drop the records of versions that are neither desired nor running."""
        kept = desired | {self._version_of(name) for name in self._replicas.members}
        tables: tuple[dict[Version, Any], ...] = (self._resources, self._start_errors, self._failures)
        for table in tables:
            for version in table.keys() - kept:
                del table[version]
        self._proven &= kept

    def _record_outcomes(self, now_s: float) -> None:
        for name, member in self._replicas.members.items():
            version = self._version_of(name)
            if member.ready and member not in self._ready_since_s:
                self._ready_since_s[member] = now_s
                self._proven.add(version)
                self._start_errors.pop(version, None)
            elif (error := self._uncounted_error(member)) is not None:
                ready_s = now_s - self._ready_since_s.get(member, now_s)
                failures = self._failures.get(version, NO_FAILURES)
                self._failures[version] = failures.plus_one(now_s, ready_s=ready_s)
                log.error("replica %s failed: %s", name, _first_line(error))
                if member.was_ready:
                    self._restarts[version[0]] = self._restarts.get(version[0], 0) + 1
                else:
                    # The initial version that is known here may be older than the one that the replica read, never
                    # newer, so the error is not charged to a configuration that no replica has tried.
                    self._start_errors[version] = self._report_of(name).initial_config_version, to_wire(error)
        for name, member in self._proxies.members.items():
            if (error := self._uncounted_error(member)) is not None:
                self._proxy_failures[name] = self._proxy_failures.get(name, NO_FAILURES).plus_one(now_s)
                log.error("proxy %s failed: %s", name, _first_line(error))
                self.proxy_error = error

    def _uncounted_error(self, member: ManagedActor) -> PenstockError | None:
        if member.error is None or member.ending or member in self._counted:
            return None
        self._counted.add(member)
        return member.error

    def _start_error(self, backend: DesiredBackend) -> dict[str, Any] | None:
        """Return why a replica could not start with the desired code and configuration."""
        config_version, error = self._start_errors.get(backend.key, (0, None))
        return error if config_version == backend.config_version else None

    def _reconfigure_error(self, backend: DesiredBackend) -> dict[str, Any] | None:
        """Return why a running replica did not apply the configuration: the class's ``reconfigure`` raised."""
        for name in self._replicas.members:
            report = self._report_of(name)
            if self._version_of(name) == backend.key and report.refused == backend.config_version:
                return report.error
        return None


def _query_nodes(known: Growth | None) -> tuple[list[Node], Growth | None, bool]:
    """Return the nodes that are alive, what Ray's autoscaler may add to them, and whether Ray tells; else ``known``."""
    nodes = alive_nodes()
    try:
        return nodes, growth(), True
    except LookupError:
        return nodes, known, False


def _state(member: ManagedActor, report: ReplicaReport | ProxyReport) -> ActorState:
    if member.gone:
        return ActorState.GONE
    if member.ending or report.state == "draining":
        return ActorState.DRAINING
    if member.error is not None:
        return ActorState.FAILED
    return ActorState.READY if member.ready else ActorState.STARTING


def _first_line(error: PenstockError) -> str:
    """Return the first line of an error. The process that failed has logged the rest."""
    return str(error).partition("\n")[0]
