"""Placement: how many replicas fit onto the nodes of a cluster. Pure functions over Ray's resource amounts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

Amounts = Mapping[str, float]
"""Amounts of resources, by Ray's names for them."""

DEFAULT_CPUS = 1
"""CPUs that a replica reserves unless its ``ray_actor_options`` give another number."""

_RAY_UNIT = 1e-4
"""The least amount of a resource that Ray knows."""

_ROUNDING = 1e-9  # Three replicas of 0.1 CPU leave room for seven more.


@dataclass(frozen=True)
class Node:
    """A node of the Ray cluster that is alive."""

    id: str
    resources: Amounts
    """All resources of the node, in use or not."""
    address: str = ""
    is_head: bool = False
    drained_by_s: float | None = None
    """When a node that leaves must be empty, on the clock of ``ObservedState.now_s``; None if it stays."""

    @property
    def stays(self) -> bool:
        return self.drained_by_s is None


@dataclass(frozen=True)
class Growth:
    """The nodes that Ray's autoscaler may add to the cluster."""

    refused: Sequence[Amounts] = ()
    """Resources that are waited for, and for which it adds no node: no type of node has them, or a limit is reached."""
    adds_nodes: bool = False
    """Whether it adds nodes now, or is known to do so."""

    def may_bring(self, needed: Amounts) -> bool:
        """Return whether it may add a node for a replica that waits for ``needed``."""
        return not any(_is_same(needed, amounts) for amounts in self.refused)


def _is_same(one: Amounts, other: Amounts) -> bool:
    return one.keys() == other.keys() and all(abs(one[name] - other[name]) < _RAY_UNIT for name in one)


HEAD_ONLY_GRACE_S = 10.0
"""How long the proxy of ``"HeadOnly"`` waits for its node to return, before it moves to another one."""


def head_only_node(nodes: Iterable[Node], node_id: str, address: str, gone_s: float) -> str | None:
    """Return the node of the proxy of ``"HeadOnly"``; None while the node of ``start`` may still return.

    It is the node that called ``start``, else one at the same address, such as that node after a restart of Ray. If
    there is neither, it is Ray's head, or any node if the head leaves.

    Args:
        nodes: the nodes that are alive.
        node_id: the id of the node that called ``start``.
        address: its address.
        gone_s: seconds since it was last seen.
    """
    nodes = sorted(nodes, key=lambda node: (node.id != node_id, not node.is_head, node.id))
    staying = [node for node in nodes if node.stays]
    for node in staying:
        if node.id == node_id or (address and node.address == address):
            return node.id
    leaves = any(node.id == node_id for node in nodes)
    if staying and (leaves or gone_s >= HEAD_ONLY_GRACE_S):
        return staying[0].id
    return None


IDLE_NODE_S = 30.0
"""How long a node that Ray's autoscaler may remove keeps its proxies after its last replica (``"EveryNode"``)."""


class NodeUse:
    """When each node last had a replica. The caller passes the clock.

    Ray's autoscaler removes no node on which an actor runs, so a proxy alone would hold its node forever.
    """

    def __init__(self) -> None:
        self._used_at_s: dict[str, float] = {}

    def idle(self, nodes: Iterable[Node], used: Set[str], now_s: float) -> set[str]:
        """Return those of ``nodes`` that have been without a replica for `IDLE_NODE_S`; never Ray's head.

        Args:
            nodes: the nodes that are alive. A new one counts as used when it is first seen.
            used: the ids of those that have replicas now.
            now_s: the time.
        """
        nodes = list(nodes)
        self._used_at_s = {node.id: now_s if node.id in used else self._used_at_s.get(node.id, now_s) for node in nodes}
        return {node.id for node in nodes if not node.is_head and now_s - self._used_at_s[node.id] >= IDLE_NODE_S}


def resources_of(actor_options: Mapping[str, Any]) -> dict[str, float]:
    """Return the resources that one replica reserves on its node, under Ray's names.

    >>> resources_of({"num_gpus": 0.5, "resources": {"disk": 2}})
    {'CPU': 1, 'GPU': 0.5, 'disk': 2}
    """
    amounts: dict[str, float] = {
        "CPU": actor_options.get("num_cpus", DEFAULT_CPUS),
        "GPU": actor_options.get("num_gpus", 0),
        "memory": actor_options.get("memory", 0),
        **actor_options.get("resources", {}),
    }
    if kind := actor_options.get("accelerator_type"):
        amounts[f"accelerator_type:{kind}"] = 0.001  # Ray reserves the same amount.
    return {name: amount for name, amount in amounts.items() if amount}


def unused(nodes: Iterable[Node], reserved: Iterable[tuple[str, Amounts]]) -> list[Node]:
    """Return ``nodes`` with what ``reserved`` leaves of their resources.

    Each reservation names its node. One without a node is counted on the first node that has room for it, as Ray will
    find one.
    """
    nodes = list(nodes)
    left = {node.id: dict(node.resources) for node in nodes}
    for node_id, amounts in reserved:
        chosen = node_id or next((name for name, amount in left.items() if _fits_on(amounts, amount) >= 1), "")
        if chosen in left:
            for name, amount in amounts.items():
                left[chosen][name] = left[chosen].get(name, 0) - amount
    return [replace(node, resources=left[node.id]) for node in nodes]


def count_fits(needed: Amounts, nodes: Iterable[Node]) -> float:
    """Return how many replicas that need ``needed`` each fit onto ``nodes``; infinity if they need nothing."""
    return sum(_fits_on(needed, node.resources) for node in nodes)


def describe_shortage(count: int, needed: Amounts, nodes: Iterable[Node], left: Iterable[Node]) -> str:
    """Return a message about ``count`` replicas that do not fit into the resources ``left`` on ``nodes``."""
    left = list(left)
    remaining = {node.id: node.resources for node in left}
    there = [
        f"node {node.id[:8]} has {', '.join(_describe(name, node.resources, remaining[node.id]) for name in needed)}"
        for node in nodes
    ]
    each = ", ".join(f"{name} {amount:g}" for name, amount in needed.items())
    return (
        f"{count} replica{'s' * (count > 1)} with {each} each requested, room for {count_fits(needed, left):g}: "
        f"{'; '.join(there) or 'the cluster has no node'}"
    )


def _describe(name: str, total: Amounts, left: Amounts) -> str:
    has, remains = total.get(name, 0), max(0, left.get(name, 0))
    return f"{name} {has:g}" + (f" ({remains:g} unused)" if remains != has else "")


def _fits_on(needed: Amounts, available: Amounts) -> float:
    counts = [math.floor(available.get(name, 0) / amount + _ROUNDING) for name, amount in needed.items()]
    return max(0, min(counts)) if counts else math.inf
