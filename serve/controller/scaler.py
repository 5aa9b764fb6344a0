"""Autoscaling of an instance's backends, once per pass of the controller."""

from __future__ import annotations

import time
from collections.abc import Mapping, Set
from dataclasses import replace

from ...broker.queue.counts.queue_depth import read_depth
from ...broker.registry.records import Snapshot
from ...broker.registry.reports import BackendStatus, ReplicaReport
from ...broker.transport.connection import RedisConnection
from ...broker.wire.keys import Keys
from .autoscaler import ScalingState, decide
from .state import DesiredState, Rollout


class Scaler:
    """Applies the autoscaling policy to every backend that is configured for it."""

    def __init__(self, connection: RedisConnection, keys: Keys) -> None:
        self._connection, self._keys = connection, keys
        self._states: dict[str, ScalingState] = {}

    async def scale(
        self,
        desired: DesiredState,
        snapshot: Snapshot,
        *,
        statuses: Mapping[str, BackendStatus],
        replica_reports: Mapping[str, ReplicaReport],
        rolled_out: Set[Rollout],
    ) -> DesiredState:
        """Return ``desired`` with the numbers of replicas that the load requires.

        A backend that is not in ``rolled_out`` has at least one replica, so that a change is tried before the backend
        may scale to zero.

        Args:
            desired: the desired state.
            snapshot: the records that it was made of.
            statuses: the last reported status of each backend.
            replica_reports: the reports of all replicas.
            rolled_out: the rollouts that were complete at some time.

        Raises:
            BrokerUnavailable: the queue depths cannot be read.
        """
        backends = dict(desired.backends)
        for tag, backend in desired.backends.items():
            scaling = snapshot.backends[tag].config.autoscaling_config
            if scaling is None:
                self._states.pop(tag, None)
                continue
            if backend.rollout not in rolled_out:
                scaling = replace(scaling, min_replicas=max(scaling.min_replicas, 1))
            state = self._states.get(tag)
            if state is None:
                # A restarted controller continues with the number of the one before it.
                reported = statuses.get(tag)
                state = ScalingState(replicas=backend.replicas if reported is None else reported.wanted)
            depth = await read_depth(self._connection, self._keys, tag)
            capacities = [report.capacity for report in replica_reports.values() if report.backend == tag]
            state = decide(scaling, max(capacities, default=1), state, depth, time.monotonic())
            self._states[tag] = state
            backends[tag] = replace(backend, replicas=state.replicas)
        for tag in self._states.keys() - backends.keys():
            del self._states[tag]
        return replace(desired, backends=backends)
