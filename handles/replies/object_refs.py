"""Replies as Ray object references, for code that uses ``ray.get`` and ``ray.wait``.

An object reference refers to the result of a Ray task. An actor on this node therefore makes the calls: one for each
process, started by the first call of the process and ended with it. Each request costs a call of that actor; a future
costs none. No other part of ``handles`` needs Ray. It is imported by the first call.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from ..errors import ConfigError

_CONCURRENCY = 10_000

Remote = Callable[..., Awaitable[Awaitable[Any]]]

_lock = threading.Lock()
_resolvers: dict[tuple[int, str], Any] = {}
"""The actor handle of this process, by process id and Ray job."""


class ObjectRefResolver:
    """Actor that calls endpoints for the process that started it."""

    async def call(self, remote: Remote, body: tuple[Any, ...], query: dict[str, Any]) -> Any:
        """Return the result of a call, or raise its error. ``ray.cancel`` of this task cancels the request."""
        future = await remote(*body, **query)
        return await future


def object_ref(remote: Remote, body: tuple[Any, ...], query: dict[str, Any]) -> Any:
    """Call ``remote``, and return the ``ray.ObjectRef`` of its result without waiting.

    Args:
        remote: the ``remote`` method of an asyncio handle.
        body: its positional arguments.
        query: its keyword arguments.

    Raises:
        ConfigError: this process is not connected to Ray, or Ray is not installed.
    """
    try:
        # Imported by name, as the thin install has no Ray.
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise ConfigError("return_type='object_ref' needs Ray: pip install 'penstock[serve]'") from None
    if not ray.is_initialized():
        raise ConfigError("return_type='object_ref' needs a process that is connected to Ray: call ray.init() first")
    context = ray.get_runtime_context()
    # A second ray.init() starts another job; the actors of the first one are gone.
    key = os.getpid(), context.get_job_id()
    with _lock:
        resolver = _resolvers.get(key)
        if resolver is None:
            strategies: Any = importlib.import_module("ray.util.scheduling_strategies")
            here = strategies.NodeAffinitySchedulingStrategy(node_id=context.get_node_id(), soft=True)
            options = {"num_cpus": 0, "max_concurrency": _CONCURRENCY, "max_restarts": -1, "max_task_retries": 0}
            resolver = ray.remote(ObjectRefResolver).options(scheduling_strategy=here, **options).remote()
            _resolvers.clear()
            _resolvers[key] = resolver
    return resolver.call.remote(remote, body, query)
