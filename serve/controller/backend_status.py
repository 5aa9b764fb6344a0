"""The status of a backend, which the controller reports and the calls that change a backend await. Pure functions."""

from __future__ import annotations

from typing import Any

from ...broker.registry.reports import BackendStatus, RefusedChange
from .planner import lacking
from .state import ActorState, DesiredBackend, ObservedState


def describe(backend: DesiredBackend, observed: ObservedState, failing: dict[str, Any] | None) -> BackendStatus:
    """Return the status of ``backend``. ``failing`` is the error of the last replica that could not start."""
    replicas = observed.replicas_by_backend().get(backend.tag, [])
    ready = backend.current(replicas, ActorState.READY)
    starting = backend.current(replicas, ActorState.STARTING)
    up_to_date = [replica for replica in ready if replica.config_version >= backend.config_version]
    is_complete = (
        len(up_to_date) == backend.replicas == len(ready)
        and not starting
        and not backend.outdated(replicas, ActorState.STARTING, ActorState.READY)
        and not any(replica.may_claim for replica in backend.outdated(replicas, ActorState.DRAINING))
    )
    missing = lacking(backend, observed)
    may_come = observed.growth is not None and observed.growth.may_bring(backend.resources)
    return BackendStatus(
        version=backend.version,
        config_version=backend.config_version,
        wanted=backend.replicas,
        ready=len(ready),
        starting=len(starting),
        rolled_out=is_complete or backend.rollout in observed.rolled_out,
        failing=failing,
        lacking=None if may_come or not observed.knows_growth else missing,
        waits_for_nodes=missing if may_come else None,
    )


def refused_change(before: BackendStatus | None, now: BackendStatus) -> RefusedChange | None:
    """Return the change to report as refused beside ``now``, given the status reported ``before``."""
    if before is None:
        return None
    if (before.version, before.config_version) != (now.version, now.config_version):
        has_trouble = before.failing or before.lacking or before.waits_for_nodes
        if has_trouble and not before.rolled_out:
            return RefusedChange(
                version=before.version,
                failing=before.failing,
                lacking=before.lacking or before.waits_for_nodes,
                undone_by=now.config_version,
            )
    known = before.refused
    if known is None or (now.rolled_out and now.config_version > known.undone_by):
        return None
    return known
