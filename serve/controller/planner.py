"""The planner: the next actions, from the desired and the observed state. Pure functions.

`plan` brings an instance one pass closer to what its registry asks for. It keeps to this, whatever it is shown:

- it settles: once what is there is what should be, there are no steps;
- it never starts more replicas of a version than are wanted;
- it never stops the last ready replica of a backend before one of the wanted version is ready, unless the backend is
  to be gone or to have no replicas;
- while a version takes over from another, the ready replicas of both together do not become fewer than are wanted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from .placement import Amounts, Node, free, room, shortage

FIRST_RETRY_S = 0.5
LONGEST_RETRY_S = 30.0
LONGEST_PROVEN_RETRY_S = 2.0
"""What has worked before is not given up on: its callers wait, and what kills it may be a node, or a single request."""
STEADY_AFTER_S = 5.0
"""What was ready for so long did not fail by its start, and is replaced at once however often that happens. It is no
storm: each has to last for as long.
"""
FORGIVEN_AFTER_S = 60.0
"""What has not failed for so long begins anew, without failures."""


class ActorState(str, Enum):
    """How a replica or a proxy is doing, as it reports itself and as Ray tells of its process."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    """It takes nothing new, and ends when it has finished what it had begun."""
    FAILED = "failed"
    """Its process runs, but is of no use: the constructor raised, or it is not well."""
    GONE = "gone"
    """Its process has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredBackend:
    """What a backend should be."""

    tag: str
    version: str
    replicas: int
    config_version: int = 1
    grace_s: float = 20.0
    asks: Amounts = field(default_factory=dict[str, float])
    """What each replica takes from its node."""

    @property
    def key(self) -> Version:
        return self.tag, self.version


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredProxies:
    """Where proxies should be."""

    nodes: tuple[str, ...] = ()
    per_node: int = 1
    port: int = 8000
    """0: any will do. The first proxy finds one, and the others take the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredState:
    """What the registry asks for."""

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
    node: str = ""
    """Empty until it has told."""
    asks: Amounts = field(default_factory=dict[str, float])
    attended: bool = True
    """Somebody waits for it to drain, to end it then. Not so when the controller was restarted meanwhile."""
    takes: bool = False
    """It may still take requests: it is to drain, but has not said that it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedProxy:
    """A proxy as it is."""

    id: str
    node: str
    state: ActorState
    port: int = 0
    """0 until it has told."""
    attended: bool = True


@dataclass(frozen=True, slots=True)
class Failures:
    """How often a version of a backend, or a proxy, failed to start or died lately."""

    count: int = 0
    last_s: float = 0.0
    """When it did so last, by the clock that ``ObservedState.now_s`` is read from."""

    def and_one_more(self, now_s: float, *, ready_s: float = 0.0) -> Failures:
        """Count a failure of one that was ready for ``ready_s`` seconds."""
        if ready_s >= STEADY_AFTER_S:
            return self
        return Failures(1 if self.forgiven(now_s) else self.count + 1, now_s)

    def forgiven(self, now_s: float) -> bool:
        return self.count == 0 or now_s - self.last_s > FORGIVEN_AFTER_S

    def allow_start(self, now_s: float, *, proven: bool) -> bool:
        """Tell whether it is time to try again. What has worked before is restarted at once after its first failure."""
        retries = self.count - 1 if proven else self.count
        if retries <= 0 or self.forgiven(now_s):
            return True
        longest_s = LONGEST_PROVEN_RETRY_S if proven else LONGEST_RETRY_S
        return now_s >= self.last_s + min(FIRST_RETRY_S * 2.0 ** min(retries - 1, 10), longest_s)


NO_FAILURES = Failures()

Version = tuple[str, str]
"""A backend's tag and one of its versions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedState:
    """What there is."""

    now_s: float = 0.0
    replicas: Sequence[ObservedReplica] = ()
    """The oldest first."""
    proxies: Sequence[ObservedProxy] = ()
    nodes: Sequence[Node] = ()
    failures: Mapping[Version, Failures] = field(default_factory=dict[Version, Failures])
    proxy_failures: Mapping[str, Failures] = field(default_factory=dict[str, Failures])
    proven: frozenset[Version] = frozenset()
    """Versions of which a replica was ready at some time."""
    came_about: frozenset[tuple[str, str, int]] = frozenset()
    """Backends, with their version and that of their configuration, that were all they should be at some time."""
    reported: frozenset[str] = frozenset()
    """Backends that a status was reported of. Where such a one was deleted, its queue may still hold requests."""


@dataclass(frozen=True, slots=True)
class StartReplica:
    backend: str
    version: str


@dataclass(frozen=True, slots=True)
class DrainReplica:
    """Let it finish what it has begun, for at most ``grace_s`` seconds, then end it."""

    id: str
    grace_s: float


@dataclass(frozen=True, slots=True)
class KillReplica:
    id: str


@dataclass(frozen=True, slots=True)
class ForgetReplica:
    """Its process has ended: others may take over its requests, and its report is void."""

    id: str


@dataclass(frozen=True, slots=True)
class RetireBackend:
    """Nobody will answer what still lies in its queue: refuse that, and delete its keys."""

    tag: str


@dataclass(frozen=True, slots=True)
class StartProxy:
    id: str
    node: str
    port: int


@dataclass(frozen=True, slots=True)
class DrainProxy:
    id: str


@dataclass(frozen=True, slots=True)
class KillProxy:
    id: str


@dataclass(frozen=True, slots=True)
class ForgetProxy:
    id: str


ReplicaStep = StartReplica | DrainReplica | KillReplica | ForgetReplica | RetireBackend
ProxyStep = StartProxy | DrainProxy | KillProxy | ForgetProxy
Step = ReplicaStep | ProxyStep


def plan(desired: DesiredState, seen: ObservedState) -> list[Step]:
    """Return the steps that bring ``seen`` one pass closer to ``desired``; none if it is there."""
    by_backend = _by_backend(seen)
    steps: list[Step] = []
    for tag in sorted(by_backend.keys() | desired.backends.keys() | seen.reported):
        replicas = by_backend.get(tag, [])
        backend = desired.backends.get(tag)
        if backend is not None:
            steps += _tidy(replicas, backend.grace_s)
            steps += _start(backend, replicas, seen)
            steps += _stop(backend, replicas)
        elif replicas:
            # Whoever deleted it has waited for its queue to be answered, or did not want to wait.
            steps += _tidy(replicas, grace_s=0.0)
            steps += [
                _end(replica, grace_s=0.0)
                for replica in replicas
                if replica.state in (ActorState.STARTING, ActorState.READY)
            ]
        else:
            steps.append(RetireBackend(tag))
    return steps + plan_proxies(desired.http, seen)


def lacking(backend: DesiredBackend, seen: ObservedState) -> str | None:
    """Say which resources are missing for ``backend`` to have all its replicas; ``None`` if there are enough.

    Where an older version serves, it gives up its places one by one, so that a single free one is enough to begin.
    """
    replicas = _by_backend(seen).get(backend.tag, [])
    placed = _current(backend, replicas, ActorState.STARTING, ActorState.READY)
    number = backend.replicas
    if _old(backend, replicas, ActorState.READY, ActorState.DRAINING):
        number = min(number, len(placed) + 1)
    left = _left(seen, without=placed)
    return None if number <= room(backend.asks, left) else shortage(number, backend.asks, seen.nodes, left)


def plan_proxies(http: DesiredProxies, seen: ObservedState) -> list[ProxyStep]:
    """Return the steps towards ``http``: the part of `plan` that is about proxies."""
    steps: list[ProxyStep] = []
    wanted = {f"{node[:12]}.{i}": node for node in http.nodes for i in range(http.per_node)}
    running: set[str] = set()
    for proxy in seen.proxies:
        if proxy.state is ActorState.GONE:
            steps.append(ForgetProxy(proxy.id))
            continue
        running.add(proxy.id)
        unneeded = proxy.id not in wanted
        if proxy.state is ActorState.FAILED or (unneeded and proxy.state is ActorState.STARTING):
            steps.append(KillProxy(proxy.id))
        elif (unneeded and proxy.state is ActorState.READY) or (
            proxy.state is ActorState.DRAINING and not proxy.attended
        ):
            steps.append(DrainProxy(proxy.id))
    ports = [proxy.port for proxy in seen.proxies if proxy.state is ActorState.READY and proxy.port]
    port = http.port or (ports[0] if ports else 0)
    for slot, node in wanted.items():
        failures = seen.proxy_failures.get(slot, NO_FAILURES)
        if slot in running or not failures.allow_start(seen.now_s, proven=True):
            continue
        if port == 0 and running:
            break  # the first one is still looking for a port
        running.add(slot)
        steps.append(StartProxy(slot, node, port))
    return steps


def _tidy(replicas: Iterable[ObservedReplica], grace_s: float) -> list[ReplicaStep]:
    steps: list[ReplicaStep] = []
    for replica in replicas:
        if replica.state is ActorState.GONE:
            steps.append(ForgetReplica(replica.id))
        elif replica.state is ActorState.FAILED:
            steps.append(KillReplica(replica.id))
        elif replica.state is ActorState.DRAINING and not replica.attended:
            steps.append(DrainReplica(replica.id, grace_s))
    return steps


def _start(backend: DesiredBackend, replicas: Iterable[ObservedReplica], seen: ObservedState) -> list[ReplicaStep]:
    missing = backend.replicas - len(_current(backend, replicas, ActorState.STARTING, ActorState.READY))
    failures = seen.failures.get(backend.key, NO_FAILURES)
    if missing <= 0 or not failures.allow_start(seen.now_s, proven=backend.key in seen.proven):
        return []
    # What never had room is refused as a whole. What had it, and lost a node, gets what there is.
    if not _came_about(backend, seen) and lacking(backend, seen) is not None:
        return []
    placeable = min(missing, room(backend.asks, _left(seen)))
    return [StartReplica(backend.tag, backend.version)] * int(placeable)


def _stop(backend: DesiredBackend, replicas: Sequence[ObservedReplica]) -> list[ReplicaStep]:
    ready = _current(backend, replicas, ActorState.READY)
    starting = _current(backend, replicas, ActorState.STARTING)
    # Those that do not serve yet go first, then the youngest.
    surplus = max(0, len(starting) + len(ready) - backend.replicas)
    unneeded = (starting[::-1] + ready[::-1])[:surplus]
    # Of an older version, those that do not serve yet never need to; of those that do, one goes for each new one.
    unneeded += _old(backend, replicas, ActorState.STARTING)
    unneeded += _old(backend, replicas, ActorState.READY)[max(0, backend.replicas - len(ready)) :]
    return [_end(replica, backend.grace_s) for replica in unneeded]


def _end(replica: ObservedReplica, grace_s: float) -> ReplicaStep:
    return KillReplica(replica.id) if replica.state is ActorState.STARTING else DrainReplica(replica.id, grace_s)


def _came_about(backend: DesiredBackend, seen: ObservedState) -> bool:
    return (backend.tag, backend.version, backend.config_version) in seen.came_about


def _by_backend(seen: ObservedState) -> dict[str, list[ObservedReplica]]:
    by_backend: defaultdict[str, list[ObservedReplica]] = defaultdict(list)
    for replica in seen.replicas:
        by_backend[replica.backend].append(replica)
    return by_backend


def _current(
    backend: DesiredBackend, replicas: Iterable[ObservedReplica], *states: ActorState
) -> list[ObservedReplica]:
    return [r for r in replicas if r.version == backend.version and r.state in states]


def _old(backend: DesiredBackend, replicas: Iterable[ObservedReplica], *states: ActorState) -> list[ObservedReplica]:
    return [r for r in replicas if r.version != backend.version and r.state in states]


def _left(seen: ObservedState, without: Sequence[ObservedReplica] = ()) -> list[Node]:
    """Return what is left of the nodes. A replica that is about to go counts as gone: Ray lets others wait for it."""
    staying = (r for r in seen.replicas if r.state in (ActorState.STARTING, ActorState.READY) and r not in without)
    return free(seen.nodes, [(replica.node, replica.asks) for replica in staying])


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendStatus:
    """What is reported of a backend; the calls that create and update it wait for it."""

    version: str
    config_version: int
    wanted: int
    ready: int
    starting: int
    came_about: bool
    """At some time every wanted replica was ready and had taken over the configuration, and none of another version
    took requests any more."""
    failing: dict[str, Any] | None
    """Why it cannot come about: the error of the last replica that could not start, as ``to_wire`` writes it."""
    lacking: str | None
    """The resources that are missing for it."""
    refused: RefusedChange | None = None
    """The last change that could not come about and was taken back, until a later one has come about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedChange:
    """A change that could not come about, and was taken back."""

    version: str
    failing: dict[str, Any] | None
    lacking: str | None
    undone_by: int
    """The version of the configuration that took its place."""


def refusal(before: Mapping[str, Any] | None, now: BackendStatus) -> RefusedChange | None:
    """Return which change of a backend was refused, given what was reported ``before``."""
    if before is None:
        return None
    if (before["version"], before["config_version"]) != (now.version, now.config_version):
        trouble = before["failing"] or before["lacking"]
        if trouble and not before["came_about"]:
            return RefusedChange(
                version=before["version"],
                failing=before["failing"],
                lacking=before["lacking"],
                undone_by=now.config_version,
            )
    if (known := before.get("refused")) is None:
        return None
    overcome = now.came_about and now.config_version > known["undone_by"]
    return None if overcome else RefusedChange(**known)


def status(backend: DesiredBackend, seen: ObservedState, failing: dict[str, Any] | None) -> BackendStatus:
    """Describe a backend. ``failing`` is the error of the last replica of its version that could not start."""
    replicas = _by_backend(seen).get(backend.tag, [])
    ready = _current(backend, replicas, ActorState.READY)
    starting = _current(backend, replicas, ActorState.STARTING)
    up_to_date = [replica for replica in ready if replica.config_version >= backend.config_version]
    settled = (
        len(up_to_date) == backend.replicas == len(ready)
        and not starting
        and not _old(backend, replicas, ActorState.STARTING, ActorState.READY)
        and not any(replica.takes for replica in _old(backend, replicas, ActorState.DRAINING))
    )
    return BackendStatus(
        version=backend.version,
        config_version=backend.config_version,
        wanted=backend.replicas,
        ready=len(ready),
        starting=len(starting),
        came_about=settled or _came_about(backend, seen),
        failing=failing,
        lacking=lacking(backend, seen),
    )
