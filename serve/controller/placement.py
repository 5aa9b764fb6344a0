"""Placement: the resources that replicas ask for against those that nodes have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Amounts = Mapping[str, float]

DEFAULT_CPUS = 1

_ROUNDING = 1e-9  # three replicas of 0.1 CPU leave room for seven more


@dataclass(frozen=True)
class Node:
    """A living Ray node."""

    id: str
    resources: Amounts
    """All that it has, in use or not."""


def asked(actor_options: Mapping[str, Any]) -> dict[str, float]:
    """Return what one replica takes from its node, under Ray's names.

    >>> asked({"num_gpus": 0.5, "resources": {"disk": 2}})
    {'CPU': 1, 'GPU': 0.5, 'disk': 2}
    """
    amounts: dict[str, float] = {
        "CPU": actor_options.get("num_cpus", DEFAULT_CPUS),
        "GPU": actor_options.get("num_gpus", 0),
        "memory": actor_options.get("memory", 0),
        **actor_options.get("resources", {}),
    }
    if kind := actor_options.get("accelerator_type"):
        amounts[f"accelerator_type:{kind}"] = 0.001  # so does Ray
    return {name: amount for name, amount in amounts.items() if amount}


def free(nodes: Iterable[Node], taken: Iterable[tuple[str, Amounts]]) -> list[Node]:
    """Return what ``nodes`` have left, when each of ``taken`` lies on the node that it names.

    What names no node yet is put on the first that has room for it, as Ray will find one.
    """
    left = {node.id: dict(node.resources) for node in nodes}
    for at, amounts in taken:
        place = at or next((name for name, there in left.items() if _fitting(amounts, there) >= 1), "")
        if place in left:
            for name, amount in amounts.items():
                left[place][name] = left[place].get(name, 0) - amount
    return [Node(name, resources) for name, resources in left.items()]


def room(wanted: Amounts, nodes: Iterable[Node]) -> float:
    """Return how many replicas that each ask for ``wanted`` can be placed; infinity if they ask for nothing."""
    return sum(_fitting(wanted, node.resources) for node in nodes)


def shortage(number: int, wanted: Amounts, nodes: Iterable[Node], left: Iterable[Node]) -> str:
    """Say what was asked for and what there is, for ``number`` replicas that ``left`` of ``nodes`` cannot hold."""
    left = list(left)
    unused = {node.id: node.resources for node in left}
    there = [
        f"node {node.id[:8]} has {', '.join(_there_is(name, node.resources, unused[node.id]) for name in wanted)}"
        for node in nodes
    ]
    asks = ", ".join(f"{name} {amount:g}" for name, amount in wanted.items())
    return (
        f"{number} replica{'s' * (number > 1)} with {asks} each asked for, room for {room(wanted, left):g}: "
        f"{'; '.join(there) or 'the cluster has no node'}"
    )


def _there_is(name: str, total: Amounts, unused: Amounts) -> str:
    has, remains = total.get(name, 0), max(0, unused.get(name, 0))
    return f"{name} {has:g}" + (f" ({remains:g} unused)" if remains != has else "")


def _fitting(wanted: Amounts, there: Amounts) -> float:
    counts = [math.floor(there.get(name, 0) / amount + _ROUNDING) for name, amount in wanted.items()]
    return max(0, min(counts)) if counts else math.inf
