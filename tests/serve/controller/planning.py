"""Desired and observed states for tests of the planner, and a cluster that carries out its steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

from penstock.serve.controller.placement import Node
from penstock.serve.controller.planner import (
    DrainProxy,
    DrainReplica,
    ForgetProxy,
    ForgetReplica,
    KillProxy,
    KillReplica,
    PurgeBackend,
    StartProxy,
    StartReplica,
    Step,
)
from penstock.serve.controller.state import (
    ActorState,
    DesiredBackend,
    DesiredProxies,
    DesiredState,
    ObservedProxy,
    ObservedReplica,
    ObservedState,
)

ROOMY = (Node("node-a", {"CPU": 100.0}),)

_numbers = itertools.count()


def backend(tag: str = "f", version: str = "v1", replicas: int = 1, *, cpus: float = 1.0) -> DesiredBackend:
    return DesiredBackend(tag=tag, version=version, replicas=replicas, resources={"CPU": cpus} if cpus else {})


def replica(
    state: ActorState, version: str = "v1", tag: str = "f", node: str = "node-a", *, cpus: float = 1.0
) -> ObservedReplica:
    resources = {"CPU": cpus}
    return ObservedReplica(
        id=f"{tag}#{next(_numbers)}", backend=tag, version=version, state=state, node=node, resources=resources
    )


def want(*backends: DesiredBackend, http: DesiredProxies | None = None) -> DesiredState:
    return DesiredState(backends={backend.tag: backend for backend in backends}, http=http or DesiredProxies())


def see(*replicas: ObservedReplica, nodes: Sequence[Node] = ROOMY, **others: object) -> ObservedState:
    return replace(ObservedState(replicas=replicas, nodes=nodes), **others)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def apply(steps: Iterable[Step], seen: ObservedState, desired: DesiredState) -> ObservedState:
    """Return the state after ``steps``. Draining actors go on draining."""
    resources = {tag: wanted.resources for tag, wanted in desired.backends.items()}
    replicas = {replica.id: replica for replica in seen.replicas}
    proxies = {proxy.id: proxy for proxy in seen.proxies}
    reported = set(seen.reported)
    for step in steps:
        match step:
            case StartReplica(tag, version):
                new = ObservedReplica(
                    id=f"new{next(_numbers)}",
                    backend=tag,
                    version=version,
                    state=ActorState.STARTING,
                    resources=resources.get(tag, {}),
                )
                replicas[new.id] = new
                reported.add(tag)
            case DrainReplica(id):
                replicas[id] = replace(replicas[id], state=ActorState.DRAINING, is_drain_awaited=True)
            case KillReplica(id):
                replicas[id] = replace(replicas[id], state=ActorState.GONE)
            case ForgetReplica(id):
                del replicas[id]
            case PurgeBackend(tag):
                reported.remove(tag)
            case StartProxy(id, node, port):
                assert id not in proxies, "a slot holds one proxy"
                proxies[id] = ObservedProxy(id=id, node=node, state=ActorState.STARTING, port=port)
            case DrainProxy(id):
                proxies[id] = replace(proxies[id], state=ActorState.DRAINING, is_drain_awaited=True)
            case KillProxy(id):
                proxies[id] = replace(proxies[id], state=ActorState.GONE)
            case ForgetProxy(id):
                del proxies[id]
    return replace(seen, replicas=list(replicas.values()), proxies=list(proxies.values()), reported=frozenset(reported))
