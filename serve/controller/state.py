"""The desired state and the observed state of an instance, which the planner compares."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from .backoff import Failures
from .placement import Amounts, Growth, Node

Version = tuple[str, str]
"""A backend's tag and a version of its code."""

Rollout = tuple[str, str, int]
"""A backend's tag, a version of its code and a version of its configuration."""


class ActorState(str, Enum):
    """The state of a replica or a proxy, from its own report and from what Ray knows of its process."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    """It accepts nothing new, finishes its requests, then ends."""
    FAILED = "failed"
    """Its process runs but cannot serve: the constructor raised, or a health check failed."""
    GONE = "gone"
    """Its process has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredBackend:
    """A backend as it should run."""

    tag: str
    version: str
    replicas: int
    config_version: int = 1
    grace_s: float = 20.0
    """Seconds that a replica may drain."""
    resources: Amounts = field(default_factory=dict[str, float])
    """Resources that each replica reserves on its node."""

    @property
    def key(self) -> Version:
        return self.tag, self.version

    @property
    def rollout(self) -> Rollout:
        return self.tag, self.version, self.config_version

    def current(self, replicas: Iterable[ObservedReplica], *states: ActorState) -> list[ObservedReplica]:
        """Return those of its ``replicas`` that have its version and one of ``states``."""
        return [r for r in replicas if r.version == self.version and r.state in states]

    def outdated(self, replicas: Iterable[ObservedReplica], *states: ActorState) -> list[ObservedReplica]:
        """Return those of its ``replicas`` that have another version and one of ``states``."""
        return [r for r in replicas if r.version != self.version and r.state in states]


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredProxies:
    """The nodes on which proxies should run."""

    nodes: tuple[str, ...] = ()
    per_node: int = 1
    port: int = 8000
    """The port of all proxies. With 0 the first proxy picks a free one and the others use the same."""
    drain_s: float = 0.0
    """Seconds that a proxy may take to drain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredState:
    """The instance as the registry describes it."""

    backends: Mapping[str, DesiredBackend] = field(default_factory=dict[str, DesiredBackend])
    http: DesiredProxies = field(default_factory=DesiredProxies)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedReplica:
    """A replica as it is."""

    id: str
    backend: str
    version: str
    state: ActorState
    config_version: int = 1
    """The version of the configuration that it applies."""
    node: str = ""
    """Empty until the replica has reported its node."""
    resources: Amounts = field(default_factory=dict[str, float])
    is_drain_awaited: bool = True
    """Whether this controller waits for the end of its drain. False for a drain that an earlier controller began."""
    may_claim: bool = False
    """Whether it may still claim requests: its drain was requested, but it has not reported that it drains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedProxy:
    """A proxy as it is."""

    id: str
    node: str
    state: ActorState
    port: int = 0
    """0 until the proxy has reported its port."""
    is_drain_awaited: bool = True
    """See `ObservedReplica`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedState:
    """The instance as it is."""

    now_s: float = 0.0
    replicas: Sequence[ObservedReplica] = ()
    """The oldest first."""
    proxies: Sequence[ObservedProxy] = ()
    nodes: Sequence[Node] = ()
    failures: Mapping[Version, Failures] = field(default_factory=dict[Version, Failures])
    proxy_failures: Mapping[str, Failures] = field(default_factory=dict[str, Failures])
    proven: frozenset[Version] = frozenset()
    """Versions of which a replica was ready at some time."""
    rolled_out: frozenset[Rollout] = frozenset()
    """Rollouts that were complete at some time."""
    growth: Growth | None = None
    """The nodes that Ray's autoscaler may add; None if the cluster has no autoscaler."""
    knows_growth: bool = True
    """False as long as Ray has not told, in the first seconds of a cluster."""
    reported: frozenset[str] = frozenset()
    """Backends with a status in the registry. The queue of one that was deleted may still hold requests."""

    @property
    def staying_nodes(self) -> list[Node]:
        """The nodes on which new processes may run."""
        return [node for node in self.nodes if node.stays]

    def time_left_s(self, node_id: str) -> float | None:
        """Return the seconds until a node that leaves must be empty; None if it stays."""
        for node in self.nodes:
            if node.id == node_id and node.drained_by_s is not None:
                return node.drained_by_s - self.now_s
        return None

    def replicas_by_backend(self) -> dict[str, list[ObservedReplica]]:
        by_backend: defaultdict[str, list[ObservedReplica]] = defaultdict(list)
        for replica in self.replicas:
            by_backend[replica.backend].append(replica)
        return by_backend
