"""The Ray actor around a proxy."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import ray

from ...broker.defaults import belong_to
from ...handles.log_context import name_requests
from ...proxy.proxy import Proxy
from ...runtime.sigterm import DrainsOnSigterm
from ...workers.actor import outlast


class HTTPProxy(DrainsOnSigterm):
    """A proxy as a Ray actor. All of its methods may be waiting at once."""

    def __init__(self, redis_url: str, instance: str, name: str, options: Mapping[str, Any]) -> None:
        name_requests()
        belong_to(redis_url, instance)  # for what middlewares start or connect to
        context = ray.get_runtime_context()
        address = cast(Any, ray.util).get_node_ip_address()
        self._proxy = Proxy(redis_url, instance, name, options, node=context.get_node_id(), address=address)
        # By then each request has its answer, or the beginning of one that streams and is cut off.
        self.on_sigterm(partial(self._proxy.drain, float(options.get("request_timeout_s", 60.0))))

    async def ready(self) -> dict[str, Any]:
        where = await self._proxy.ready()
        # What was made so far, Ray's modules most of all, lives as long as the process. To look through it again and
        # again is what makes one request in a hundred slow: with it frozen, and collections rarer, p99 at 100
        # connections fell from 19 to 10 ms in the prototype. Requests leave hardly any cycles, so that little piles up.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 50, 50)
        return where

    async def check(self) -> None:
        await self._proxy.check()

    async def drain(self, timeout_s: float) -> None:
        await self._proxy.drain(timeout_s)

    async def attend(self, controller: str) -> None:
        """Live as long as the actor ``controller``, over its restarts; end when that has ended for good."""
        await outlast(controller)
        ray.kill(cast("Any", ray.get_runtime_context()).current_actor)


ProxyActor: Any = ray.remote(HTTPProxy)
"""Takes the broker's URL, the instance's name, the proxy's own and the fields of `HTTPOptions`."""
