"""The Ray actor around a replica."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import ray

from ...runtime.sigterm import DrainsOnSigterm
from .lifetime import end_with, keep_objects


class ReplicaActor(DrainsOnSigterm):
    """A replica as a Ray actor. Its methods may run concurrently."""

    def __init__(
        self, redis_url: str, instance: str, backend: str, replica: str, environment: Mapping[str, str]
    ) -> None:
        keep_objects()
        from ...broker.defaults import adopt_environment, belong_to
        from ...handles.log_context import set_up_logs
        from ...workers.serving import Serving

        adopt_environment(environment)
        set_up_logs(backend=backend, replica=replica)
        belong_to(redis_url, instance)  # for `serve.connect()` in the user's code
        node = ray.get_runtime_context().get_node_id()
        self._serving = Serving(redis_url, instance, backend, replica, node)
        self.on_sigterm(self._serving.drain_gracefully)

    async def ready(self) -> None:
        await self._serving.ready()
        gc.collect()
        keep_objects()

    async def check(self) -> None:
        await self._serving.check()

    async def drain(self, timeout_s: float) -> bool:
        return await self._serving.drain(timeout_s)

    async def attend(self, controller: str) -> None:
        """Wait while the actor ``controller`` lives, over its restarts, and end this actor after it."""
        await end_with(controller)


RemoteReplica: Any = ray.remote(ReplicaActor)
"""The actor class. Its arguments are those of `ReplicaActor`."""
