"""The Ray actor around a proxy."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import ray

from ...runtime.sigterm import DrainsOnSigterm
from .lifetime import actor_name, end_with, keep_objects


class HTTPProxy(DrainsOnSigterm):
    """A proxy as an asyncio actor: calls of its methods may overlap."""

    def __init__(
        self, redis_url: str, instance: str, name: str, options: Mapping[str, Any], environment: Mapping[str, str]
    ) -> None:
        keep_objects()
        from ...broker.defaults import adopt_environment, belong_to
        from ...handles.log_context import set_up_logs
        from ...proxy.options import ProxyOptions
        from ...proxy.proxy import Proxy

        adopt_environment(environment)
        set_up_logs(proxy=name)
        belong_to(redis_url, instance)  # The defaults of `serve.connect()` in middlewares.
        context = ray.get_runtime_context()
        address = cast(Any, ray.util).get_node_ip_address()
        self._proxy = Proxy(redis_url, instance, name, options, node=context.get_node_id(), address=address)
        limits = ProxyOptions.from_fields(options)
        # After this time every request has its response, or a streamed response that is cut off.
        self.on_sigterm(partial(self._proxy.drain, limits.request_timeout_s, limits.drain_delay_s))
        # From the beginning: the process that starts the first proxy may die before the controller has adopted it.
        self._attending = asyncio.ensure_future(end_with(actor_name(instance, "controller")))

    async def ready(self) -> dict[str, Any]:
        """Return the proxy's report once it serves."""
        report = await self._proxy.ready()
        # Without the objects that exist by now, and with rarer collections, p99 at 100 connections fell from 19 to
        # 10 ms. Requests leave hardly any reference cycles, so little garbage accumulates between collections.
        gc.collect()
        keep_objects()
        gc.set_threshold(20_000, 50, 50)
        return report

    async def check(self) -> None:
        await self._proxy.check()

    async def drain(self, timeout_s: float, delay_s: float = 0.0) -> None:
        await self._proxy.drain(timeout_s, delay_s)

    async def attend(self, controller: str) -> None:
        """Return never: this actor ends when the actor ``controller`` has ended for good."""
        await asyncio.shield(self._attending)


ProxyActor: Any = ray.remote(HTTPProxy)
"""The actor class. Its arguments are those of `HTTPProxy`."""
