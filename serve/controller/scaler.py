"""Autoscaling of the backends of an instance, once per pass of the controller."""

from __future__ import annotations

import time
from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

from ...broker.queue.load import read_depth
from ...broker.registry.records import Snapshot
from ...broker.transport.connection import RedisConnection
from ...broker.wire.keys import Keys
from .autoscaler import Standing, decide
from .planner import DesiredState

Report = Mapping[str, Any]


class Scaler:
    """Remembers how long each backend's load has called for another number of replicas, and nothing else."""

    def __init__(self) -> None:
        self._standings: dict[str, Standing] = {}

    async def scaled(
        self,
        desired: DesiredState,
        snapshot: Snapshot,
        connection: RedisConnection,
        keys: Keys,
        statuses: Mapping[str, Report],
        replicas: Mapping[str, Report],
        came_about: Set[tuple[str, str, int]],
    ) -> DesiredState:
        """Return ``desired`` with as many replicas as the load calls for.

        ``statuses`` are what was reported of the backends last, ``replicas`` what replicas say of themselves. What
        never ``came_about``, a tag with its version and that of its configuration, has at least one replica: before it
        may rest, it is to be known that it can serve. Raises `BrokerUnavailable`.
        """
        backends = dict(desired.backends)
        for tag, backend in desired.backends.items():
            scaling = snapshot.backends[tag].config.autoscaling_config
            if scaling is None:
                self._standings.pop(tag, None)
                continue
            if (tag, backend.version, backend.config_version) not in came_about:
                scaling = replace(scaling, min_replicas=max(scaling.min_replicas, 1))
            standing = self._standings.get(tag)
            if standing is None:
                # A controller that was restarted goes on from where the one before it was.
                standing = Standing(replicas=statuses.get(tag, {}).get("wanted", backend.replicas))
            load = await read_depth(connection, keys, tag)
            capacity = max((said.get("capacity", 1) for said in replicas.values() if said["backend"] == tag), default=1)
            standing = decide(scaling, capacity, standing, load, time.monotonic())
            self._standings[tag] = standing
            backends[tag] = replace(backend, replicas=standing.replicas)
        for tag in self._standings.keys() - backends.keys():
            del self._standings[tag]
        return replace(desired, backends=backends)
