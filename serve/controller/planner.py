"""The planner: the next steps of the controller, from the desired and the observed state. Pure functions.

`plan` returns the steps of one pass. For all states it guarantees:

- it converges: when the observed state is the desired state, there are no steps;
- it never starts more replicas of a version than are desired;
- it never stops the last ready replica of a backend before one of the desired version is ready, unless the backend was
  deleted or should have no replicas, or the replica's node leaves and its time is over;
- during a rollout, the ready replicas of both versions together never become fewer than are desired;
- it starts no more replicas than fit onto the nodes, except on a cluster that can grow: there they wait in Ray, where
  its autoscaler sees them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .backoff import NO_FAILURES
from .placement import Growth, Node, count_fits, describe_shortage, unused
from .state import ActorState, DesiredBackend, DesiredProxies, DesiredState, ObservedReplica, ObservedState

_DRAIN_MARGIN_S = 2.0
"""Seconds by which a replica ends before its node does, for the steps around its drain."""


@dataclass(frozen=True, slots=True)
class StartReplica:
    backend: str
    version: str


@dataclass(frozen=True, slots=True)
class DrainReplica:
    """Let the replica finish its requests, for at most ``grace_s`` seconds, then end it."""

    id: str
    grace_s: float


@dataclass(frozen=True, slots=True)
class KillReplica:
    id: str


@dataclass(frozen=True, slots=True)
class ForgetReplica:
    """Its process has ended: let others redeliver its entries, and delete its report."""

    id: str


@dataclass(frozen=True, slots=True)
class PurgeBackend:
    """Refuse the requests in the queue of a deleted backend, and delete its keys."""

    tag: str


@dataclass(frozen=True, slots=True)
class StartProxy:
    id: str
    node: str
    port: int


@dataclass(frozen=True, slots=True)
class DrainProxy:
    id: str
    within_s: float = math.inf
    """Seconds until its node must be empty."""


@dataclass(frozen=True, slots=True)
class KillProxy:
    id: str


@dataclass(frozen=True, slots=True)
class ForgetProxy:
    id: str


ReplicaStep = StartReplica | DrainReplica | KillReplica | ForgetReplica | PurgeBackend
ProxyStep = StartProxy | DrainProxy | KillProxy | ForgetProxy
Step = ReplicaStep | ProxyStep


def plan(desired: DesiredState, observed: ObservedState) -> list[Step]:
    """Return the steps that bring ``observed`` one pass closer to ``desired``; none if they agree."""
    by_backend = observed.replicas_by_backend()
    steps: list[Step] = []
    for tag in sorted(by_backend.keys() | desired.backends.keys() | observed.reported):
        replicas = by_backend.get(tag, [])
        backend = desired.backends.get(tag)
        if backend is not None:
            steps += _clean_up(replicas, backend.grace_s)
            steps += _start(backend, replicas, observed)
            steps += _stop(backend, replicas, observed)
        elif replicas:
            # The call that deleted the backend has waited for its queue, unless it was forced.
            steps += _clean_up(replicas, grace_s=0.0)
            steps += [
                _end(replica, grace_s=0.0)
                for replica in replicas
                if replica.state in (ActorState.STARTING, ActorState.READY)
            ]
        else:
            steps.append(PurgeBackend(tag))
    return steps + plan_proxies(desired.http, observed)


def lacking(backend: DesiredBackend, observed: ObservedState) -> str | None:
    """Return a message about the resources that are missing for all replicas of ``backend``; None if all fit.

    During a rollout the old version gives up its resources one replica at a time, so room for one is enough.
    """
    replicas = _staying(observed.replicas_by_backend().get(backend.tag, []), observed)
    placed = backend.current(replicas, ActorState.STARTING, ActorState.READY)
    count = backend.replicas
    if _is_replacing(backend, replicas):
        # Where the cluster can grow, the one that waits for room has been started.
        count = min(count, len(placed) + 1 if observed.growth is None else max(len(placed), 1))
    # A node that has just joined runs replicas before its resources are known here: they have what they need.
    known = {node.id for node in observed.nodes}
    count -= sum(replica.state is ActorState.READY and replica.node not in known for replica in placed)
    left = _unused(observed, without=placed)
    if count <= count_fits(backend.resources, left):
        return None
    return describe_shortage(count, backend.resources, observed.staying_nodes, left)


def proxy_name(node: str, index: int) -> str:
    """Return the name of one of the proxies of a node."""
    return f"{node[:12]}.{index}"


def plan_proxies(http: DesiredProxies, observed: ObservedState) -> list[ProxyStep]:
    """Return the steps of `plan` that concern proxies.

    A proxy that is not desired drains once a desired one is ready, so that HTTP moves to another node without a gap; or
    when its node leaves soon.
    """
    steps: list[ProxyStep] = []
    desired = {proxy_name(node, i): node for node in http.nodes for i in range(http.per_node)}
    running: set[str] = set()
    is_served = not desired or any(
        proxy.id in desired and proxy.state is ActorState.READY for proxy in observed.proxies
    )
    for proxy in observed.proxies:
        if proxy.state is ActorState.GONE:
            steps.append(ForgetProxy(proxy.id))
            continue
        running.add(proxy.id)
        is_surplus = proxy.id not in desired
        left_s = observed.time_left_s(proxy.node)
        left_s = math.inf if left_s is None else left_s
        if proxy.state is ActorState.FAILED or (is_surplus and proxy.state is ActorState.STARTING):
            steps.append(KillProxy(proxy.id))
        elif (is_surplus and proxy.state is ActorState.READY and (is_served or left_s < http.drain_s)) or (
            proxy.state is ActorState.DRAINING and not proxy.is_drain_awaited
        ):
            steps.append(DrainProxy(proxy.id, left_s))
    ports = [proxy.port for proxy in observed.proxies if proxy.state is ActorState.READY and proxy.port]
    port = http.port or (ports[0] if ports else 0)
    for slot, node in desired.items():
        failures = observed.proxy_failures.get(slot, NO_FAILURES)
        if slot in running or not failures.allows_start(observed.now_s, proven=True):
            continue
        if port == 0 and running:
            break  # The first proxy has not reported its port yet.
        running.add(slot)
        steps.append(StartProxy(slot, node, port))
    return steps


def _clean_up(replicas: Iterable[ObservedReplica], grace_s: float) -> list[ReplicaStep]:
    steps: list[ReplicaStep] = []
    for replica in replicas:
        if replica.state is ActorState.GONE:
            steps.append(ForgetReplica(replica.id))
        elif replica.state is ActorState.FAILED:
            steps.append(KillReplica(replica.id))
        elif replica.state is ActorState.DRAINING and not replica.is_drain_awaited:
            steps.append(DrainReplica(replica.id, grace_s))
    return steps


def _start(backend: DesiredBackend, replicas: Iterable[ObservedReplica], observed: ObservedState) -> list[ReplicaStep]:
    staying = _staying(replicas, observed)
    missing = backend.replicas - len(backend.current(staying, ActorState.STARTING, ActorState.READY))
    failures = observed.failures.get(backend.key, NO_FAILURES)
    if missing <= 0 or not failures.allows_start(observed.now_s, proven=backend.key in observed.proven):
        return []
    fitting = count_fits(backend.resources, _unused(observed))
    if observed.growth is not None:
        fitting = max(fitting, _waiting(backend, staying, observed.growth))
    # A rollout that does not fit as a whole is refused. One that was complete and lost a node gets what there is.
    elif backend.rollout not in observed.rolled_out and lacking(backend, observed) is not None:
        return []
    return [StartReplica(backend.tag, backend.version)] * int(min(missing, fitting))


def _waiting(backend: DesiredBackend, replicas: Sequence[ObservedReplica], growth: Growth) -> int:
    """Return how many more replicas may be started without room for them.

    In a rollout it is one at a time, as the old version gives up its resources; the cluster would grow to twice its
    size otherwise. Where the autoscaler adds no node now, one goes on asking.
    """
    most = backend.replicas
    if _is_replacing(backend, replicas) or not growth.may_bring(backend.resources):
        most = 1
    return most - len(backend.current(replicas, ActorState.STARTING))


def _is_replacing(backend: DesiredBackend, replicas: Iterable[ObservedReplica]) -> bool:
    """Return whether replicas of another version hold resources that they are about to give up."""
    return bool(backend.outdated(replicas, ActorState.READY, ActorState.DRAINING))


def _stop(backend: DesiredBackend, replicas: Sequence[ObservedReplica], observed: ObservedState) -> list[ReplicaStep]:
    staying = _staying(replicas, observed)
    ready = backend.current(staying, ActorState.READY)
    starting = backend.current(staying, ActorState.STARTING)
    # Replicas that are not ready go first, then the youngest.
    surplus = max(0, len(starting) + len(ready) - backend.replicas)
    unneeded = (starting[::-1] + ready[::-1])[:surplus]
    # Of another version, starting replicas end at once, and one ready replica for each new one that is ready.
    unneeded += backend.outdated(staying, ActorState.STARTING)
    # Those on nodes that leave end in the same way, and the first.
    leaving = [replica for replica in replicas if replica not in staying]
    unneeded += [replica for replica in leaving if replica.state is ActorState.STARTING]
    replaced = backend.outdated(staying, ActorState.READY)
    replaced += [replica for replica in leaving if replica.state is ActorState.READY]
    kept = max(0, backend.replicas - len(ready))
    unneeded += replaced[kept:]
    unneeded += [replica for replica in replaced[:kept] if replica in leaving and _must_go(replica, backend, observed)]
    return [_end(replica, _grace_s(replica, backend, observed)) for replica in unneeded]


def _staying(replicas: Iterable[ObservedReplica], observed: ObservedState) -> list[ObservedReplica]:
    """Return the replicas on nodes that do not leave, or on no known node."""
    leaving = {node.id for node in observed.nodes if not node.stays}
    return [replica for replica in replicas if replica.node not in leaving]


def _must_go(replica: ObservedReplica, backend: DesiredBackend, observed: ObservedState) -> bool:
    """Return whether a replica on a node that leaves drains although no other one is ready in its place."""
    left_s = observed.time_left_s(replica.node)
    if left_s is not None and left_s < backend.grace_s + _DRAIN_MARGIN_S:
        return True
    if observed.growth is not None or count_fits(backend.resources, observed.staying_nodes) > 0:
        return False  # another one may become ready
    # The cluster is about to end. The requests that leaving proxies have accepted can still be answered.
    return not any(
        proxy.state in (ActorState.READY, ActorState.DRAINING) and observed.time_left_s(proxy.node) is not None
        for proxy in observed.proxies
    )


def _grace_s(replica: ObservedReplica, backend: DesiredBackend, observed: ObservedState) -> float:
    left_s = observed.time_left_s(replica.node)
    return backend.grace_s if left_s is None else min(backend.grace_s, max(left_s - _DRAIN_MARGIN_S, 0.0))


def _end(replica: ObservedReplica, grace_s: float) -> ReplicaStep:
    return KillReplica(replica.id) if replica.state is ActorState.STARTING else DrainReplica(replica.id, grace_s)


def _unused(observed: ObservedState, without: Sequence[ObservedReplica] = ()) -> list[Node]:
    """Return the resources of the nodes that the replicas do not use.

    A draining replica counts as gone: Ray lets the actors that need its resources wait for it. Nodes that leave are not
    counted.
    """
    staying = (
        replica
        for replica in _staying(observed.replicas, observed)
        if replica.state in (ActorState.STARTING, ActorState.READY) and replica not in without
    )
    return unused(observed.staying_nodes, [(replica.node, replica.resources) for replica in staying])
