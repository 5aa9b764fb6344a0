"""The nodes of the Ray cluster, and whether Ray's autoscaler adds more. All of it blocks while Ray's head is away."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from typing import Any, cast

import ray

from .controller.placement import Growth, Node

_HEAD = "node:__internal_head__"
"""A resource of Ray's head."""

_QUERY_S = 5.0
"""Longest time for Ray's head to answer what its autoscaler does."""

_STATUS_OF_V1 = "__autoscaling_status"
"""The key in Ray's head under which version 1 of the autoscaler reports."""

_MIRRORED_TYPE = re.compile(r"node_[0-9a-f]{28,}")
"""The type of a node in the report of an autoscaler of version 1 that adds no nodes."""


def alive_nodes() -> list[Node]:
    """Return the nodes of the cluster that are alive."""
    found = cast("list[dict[str, Any]]", cast(Any, ray).nodes())
    draining = _draining_nodes()
    return [_node(node, draining.get(node["NodeID"])) for node in found if node["Alive"]]


def own_node() -> str:
    """Return the id of the node to which this process is connected."""
    return str(cast(Any, ray).get_runtime_context().get_node_id())


def address_of(node_id: str) -> str:
    """Return the address of a node; empty if there is none of that id."""
    found = cast("list[dict[str, Any]]", cast(Any, ray).nodes())
    return next((str(node["NodeManagerAddress"]) for node in found if node["NodeID"] == node_id), "")


def growth() -> Growth | None:
    """Return what Ray's autoscaler may add to the cluster; None if it adds nothing.

    Ray has no call for this. Version 2 of its autoscaler reports for which waiting resources it will add no node.
    Version 1 reports no more than the type of each node. Both also run on clusters without autoscaling: there version 1
    gives each node a type of its own, and version 2 has no state of its own, or refuses everything.

    Raises:
        LookupError: Ray does not tell, as in the first seconds of a cluster.
    """
    try:
        from ray.autoscaler.v2 import utils

        return _growth_by_v2() if cast(Any, utils).is_autoscaler_v2() else _growth_by_v1()
    except Exception as e:  # None of this is documented. An instance serves without it, on the nodes that there are.
        raise LookupError(f"Ray does not tell of its autoscaler: {e!r}") from e


def _growth_by_v1() -> Growth | None:
    from ray.experimental import internal_kv

    status = json.loads(cast(Any, internal_kv)._internal_kv_get(_STATUS_OF_V1))
    types = status["autoscaler_report"]["active_nodes"]
    if not types:
        raise LookupError("no report of a node")
    return None if all(_MIRRORED_TYPE.fullmatch(kind) for kind in types) else Growth(adds_nodes=True)


def _growth_by_v2() -> Growth | None:
    from ray.core.generated import autoscaler_pb2
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    reply = cast(Any, autoscaler_pb2).GetClusterStatusReply()
    reply.ParseFromString(cast(Any, internal_kv_get_gcs_client)().get_cluster_status(timeout_s=_QUERY_S))
    state = reply.autoscaling_state
    if not state.autoscaler_state_version:
        raise LookupError("it has not looked at the cluster yet, or only watches it, as under KubeRay")
    return Growth(
        refused=[dict(request.resources_bundle) for request in state.infeasible_resource_requests],
        adds_nodes=bool(state.pending_instance_requests or state.pending_instances),
    )


def _draining_nodes() -> dict[str, int]:
    """Return the nodes that drain, with their deadlines (Unix time in ms, or 0); none if this Ray does not tell."""
    try:
        from ray._private.state import state
    except ImportError:
        return {}
    return cast("dict[str, int]", cast(Any, state).get_draining_nodes())


def _node(fields: Mapping[str, Any], deadline_ms: int | None) -> Node:
    """Return a node of Ray, which is drained until ``deadline_ms``; 0 means that there is no deadline."""
    resources = fields["Resources"]
    drained_by_s = None
    if deadline_ms is not None:
        left_s = deadline_ms / 1000 - time.time() if deadline_ms else math.inf
        drained_by_s = time.monotonic() + left_s
    return Node(
        fields["NodeID"],
        resources,
        address=fields["NodeManagerAddress"],
        is_head=_HEAD in resources,
        drained_by_s=drained_by_s,
    )
