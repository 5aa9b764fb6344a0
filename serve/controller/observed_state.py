"""The observed state: reports of replicas and proxies, and what Ray knows of their processes.

It keeps some of what it saw. None of that is written anywhere: it betters what `plan` decides, which is sound without.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, cast
from urllib.parse import urlsplit

from ...broker.errors import PenstockError
from ...broker.registry.records import Snapshot
from ...broker.registry.store import Registry
from ...handles.errors import to_wire
from ..settings import Settings
from .actors import ActorPool, ManagedActor, alive_nodes
from .placement import Amounts, Node, asked
from .planner import (
    NO_FAILURES,
    ActorState,
    DesiredBackend,
    DesiredProxies,
    DesiredState,
    Failures,
    ObservedProxy,
    ObservedReplica,
    ObservedState,
    Version,
    refusal,
    status,
)

log = logging.getLogger(__name__)

_NODES_S = 1.0
_HEAD_S = 1.0
"""Ray's head, when it is there, answers in less."""

Report = Mapping[str, Any]


class StateObserver:
    """Sees the instance that ``replicas`` and ``proxies`` are of."""

    def __init__(self, replicas: ActorPool, proxies: ActorPool) -> None:
        self._replicas, self._proxies = replicas, proxies
        self.statuses: dict[str, Report] = {}
        """What was reported of each backend last."""
        self.nodes: list[Node] = []
        self.proxy_error: PenstockError | None = None
        """Why a proxy failed last."""
        self._proven: set[Version] = set()
        """Versions of which a replica was ready at some time."""
        self.head_answers = True
        """Whether Ray's head is there. Without it, no actor is started, found or ended, and asking for that blocks."""
        self._nodes_at_s = -_NODES_S
        self._looking: asyncio.Future[list[Node]] | None = None
        self._reports: dict[str, Report] = {}
        self._asks: dict[Version, Amounts] = {}
        self._came_about: dict[str, tuple[str, str, int]] = {}
        self._failing: dict[Version, tuple[int, dict[str, Any]]] = {}
        """The last error of a start, with the version of the configuration that the replica started with."""
        self._failures: dict[Version, Failures] = {}
        self._proxy_failures: dict[str, Failures] = {}
        self._ready_since_s: dict[ManagedActor, float] = {}
        self._counted: set[ManagedActor] = set()

    async def begin(self, registry: Registry) -> None:
        """Learn what an earlier controller has said."""
        self.statuses = dict(await registry.reports("backends"))
        for tag, report in self.statuses.items():
            if report.get("failing"):
                self._failing[tag, report["version"]] = report["config_version"], report["failing"]
            if report.get("came_about"):
                self._came_about[tag] = (tag, report["version"], report["config_version"])
                self._proven.add((tag, report["version"]))

    async def look(self, registry: Registry) -> None:
        """Read the reports, take charge of whoever made one and is unknown, and take note of successes and failures.

        None of that while Ray's head does not answer.
        """
        await self._look_at_nodes()
        if not self.head_answers:
            return
        for fleet, reports in (
            (self._replicas, await registry.reports("replicas")),
            (self._proxies, await registry.reports("proxies")),
        ):
            self._reports.update(reports)
            # Those that an earlier controller has left, and reports that outlived their process.
            for name in reports.keys() - fleet.members.keys():
                fleet.adopt(name)
        self._take_note(time.monotonic())

    async def _look_at_nodes(self) -> None:
        if self._looking is None:
            if time.monotonic() - self._nodes_at_s < _NODES_S:
                return
            # In a thread, and not waited for long, as it blocks for long when Ray's head is away.
            self._looking = asyncio.ensure_future(asyncio.to_thread(alive_nodes))
        await asyncio.wait([self._looking], timeout=_HEAD_S)
        answers = False
        if self._looking.done():
            looked, self._looking = self._looking, None
            if answers := looked.exception() is None:
                self.nodes, self._nodes_at_s = looked.result(), time.monotonic()
        if answers != self.head_answers:
            self.head_answers = answers
            log.warning("Ray's head %s", "answers again" if answers else "does not answer: what runs is left alone")

    def desired(self, snapshot: Snapshot, settings: Settings) -> DesiredState:
        """Return what there should be."""
        backends: dict[str, DesiredBackend] = {}
        for tag, record in snapshot.backends.items():
            config = record.config
            backends[tag] = DesiredBackend(
                tag=tag,
                version=record.version,
                replicas=config.initial_replicas,
                config_version=record.config_version,
                grace_s=config.graceful_shutdown_timeout_s,
                asks=self._asks.setdefault((tag, record.version), asked(record.actor_options)),
            )
        self._forget_versions({backend.key for backend in backends.values()})
        alive = [node.id for node in self.nodes]
        where = {"HeadOnly": [node for node in alive if node == settings.node], "EveryNode": alive, "NoServer": []}
        options = settings.http
        nodes = tuple(where[options["location"]])
        http = DesiredProxies(nodes=nodes, per_node=options["proxies_per_node"], port=options["port"])
        return DesiredState(backends=backends, http=http)

    @property
    def came_about(self) -> frozenset[tuple[str, str, int]]:
        """Backends, with their version and that of their configuration, that were all they should be at some time."""
        return frozenset(self._came_about.values())

    def said(self) -> dict[str, Report]:
        """Return what replicas say of themselves."""
        return {name: self._reports[name] for name in self._replicas.members if name in self._reports}

    def seen(self) -> ObservedState:
        """Return what there is."""
        return ObservedState(
            now_s=time.monotonic(),
            replicas=[self._replica(name, member) for name, member in self._replicas.members.items()],
            proxies=[self._proxy(name, member) for name, member in self._proxies.members.items()],
            nodes=self.nodes,
            failures=self._failures,
            proxy_failures=self._proxy_failures,
            proven=frozenset(self._proven),
            came_about=self.came_about,
            reported=frozenset(self.statuses),
        )

    def status(self, backend: DesiredBackend, seen: ObservedState) -> dict[str, Any]:
        """Describe a backend as it is to be reported."""
        described = status(backend, seen, self._start_error(backend) or self._refusal(backend))
        if described.came_about:
            self._came_about[backend.tag] = (backend.tag, backend.version, backend.config_version)
        return asdict(replace(described, refused=refusal(self.statuses.get(backend.tag), described)))

    def backend_of(self, replica: str) -> str:
        return str(self._reports.get(replica, {}).get("backend", replica.rpartition("#")[0]))

    def note_start(self, name: str, report: Report) -> None:
        """Take ``report`` for true until the actor itself reports."""
        self._reports[name] = report

    def forget(self, fleet: ActorPool, name: str) -> None:
        self._ready_since_s.pop(fleet.members[name], None)
        self._counted.discard(fleet.members[name])
        self._reports.pop(name, None)
        fleet.forget(name)

    def _replica(self, name: str, member: ManagedActor) -> ObservedReplica:
        report, version = self._reports.get(name, {}), self._version_of(name)
        return ObservedReplica(
            id=name,
            backend=version[0],
            version=version[1],
            state=_state(member, report),
            config_version=report.get("config_version", 0),
            node=report.get("node", ""),
            asks=self._asks.get(version, {}),
            attended=member.ending,
            takes=report.get("state") == ActorState.READY.value,
        )

    def _proxy(self, name: str, member: ManagedActor) -> ObservedProxy:
        report = self._reports.get(name, {})
        return ObservedProxy(
            id=name,
            node=report.get("node", ""),
            state=_state(member, report),
            port=urlsplit(str(report.get("url", ""))).port or 0,
            attended=member.ending,
        )

    def _version_of(self, replica: str) -> Version:
        return self.backend_of(replica), str(self._reports.get(replica, {}).get("version", ""))

    def _forget_versions(self, desired: set[Version]) -> None:
        """Keep what is known of versions that are wanted or still there."""
        kept = desired | {self._version_of(name) for name in self._replicas.members}
        tables: tuple[dict[Version, Any], ...] = (self._asks, self._failing, self._failures)
        for table in tables:
            for version in table.keys() - kept:
                del table[version]
        self._proven &= kept

    def _take_note(self, now_s: float) -> None:
        for name, member in self._replicas.members.items():
            version = self._version_of(name)
            if member.ready and member not in self._ready_since_s:
                self._ready_since_s[member] = now_s
                self._proven.add(version)
                self._failing.pop(version, None)
            elif (error := self._new_failure(member)) is not None:
                ready_s = now_s - self._ready_since_s.get(member, now_s)
                failures = self._failures.get(version, NO_FAILURES)
                self._failures[version] = failures.and_one_more(now_s, ready_s=ready_s)
                log.error("replica %s failed: %s", name, _summary(error))
                if not member.was_ready:
                    # The initial version that is known here may be older than the one that the replica read, never
                    # newer, so the error is not charged to a configuration that no replica has tried.
                    initial = int(self._reports.get(name, {}).get("initial_config_version", 0))
                    self._failing[version] = initial, to_wire(error)
        for name, member in self._proxies.members.items():
            if (error := self._new_failure(member)) is not None:
                self._proxy_failures[name] = self._proxy_failures.get(name, NO_FAILURES).and_one_more(now_s)
                log.error("proxy %s failed: %s", name, _summary(error))
                self.proxy_error = error

    def _new_failure(self, member: ManagedActor) -> PenstockError | None:
        if member.error is None or member.ending or member in self._counted:
            return None
        self._counted.add(member)
        return member.error

    def _start_error(self, backend: DesiredBackend) -> dict[str, Any] | None:
        """Return why a replica could not start with the desired code and configuration."""
        config_version, error = self._failing.get(backend.key, (0, None))
        return error if config_version == backend.config_version else None

    def _refusal(self, backend: DesiredBackend) -> dict[str, Any] | None:
        """Return why a replica does not take the configuration over: the class's ``reconfigure`` raised."""
        for name in self._replicas.members:
            report = self._reports.get(name, {})
            if self._version_of(name) == backend.key and report.get("refused") == backend.config_version:
                return cast("dict[str, Any]", report["error"])
        return None


def _state(member: ManagedActor, report: Report) -> ActorState:
    if member.gone:
        return ActorState.GONE
    if member.ending or report.get("state") == ActorState.DRAINING.value:
        return ActorState.DRAINING
    if member.error is not None:
        return ActorState.FAILED
    return ActorState.READY if member.ready else ActorState.STARTING


def _summary(error: PenstockError) -> str:
    """Return its first line: who failed has logged the rest."""
    return str(error).partition("\n")[0]
