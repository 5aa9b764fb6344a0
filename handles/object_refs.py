"""Replies as Ray object references, for code that uses ``ray.get`` and ``ray.wait``.

A reference is to what a task of Ray's returns, so an actor on this node makes the calls: one for each process, started
by its first call and ended with it. It costs each request a call of that actor; futures cost none. This is the only
part of ``handles`` that needs Ray, and loads it when it is first asked for.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from .errors import ConfigError

_CONCURRENCY = 10_000

Remote = Callable[..., Awaitable[Awaitable[Any]]]

_lock = threading.Lock()
_gatherers: dict[tuple[int, str], Any] = {}


class ObjectRefResolver:
    """Calls endpoints for the process that started it."""

    async def gather(self, remote: Remote, body: tuple[Any, ...], query: dict[str, Any]) -> Any:
        """Return the answer of a call, or raise its error. Cancelled (``ray.cancel``), it cancels the request."""
        future = await remote(*body, **query)
        return await future


def object_ref(remote: Remote, body: tuple[Any, ...], query: dict[str, Any]) -> Any:
    """Call ``remote`` and return the ``ray.ObjectRef`` of its answer, at once.

    Raises:
        ConfigError: this process is not connected to Ray, or Ray is not installed.
    """
    try:
        # By name, as nothing else here may depend on it: the thin install has no Ray.
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise ConfigError("return_type='object_ref' needs Ray: pip install 'penstock[serve]'") from None
    if not ray.is_initialized():
        raise ConfigError("return_type='object_ref' needs a process that is connected to Ray: call ray.init() first")
    context = ray.get_runtime_context()
    # A second ray.init() is another job, with which the actors of the first one are gone.
    key = os.getpid(), context.get_job_id()
    with _lock:
        gatherer = _gatherers.get(key)
        if gatherer is None:
            strategies: Any = importlib.import_module("ray.util.scheduling_strategies")
            here = strategies.NodeAffinitySchedulingStrategy(node_id=context.get_node_id(), soft=True)
            options = {"num_cpus": 0, "max_concurrency": _CONCURRENCY, "max_restarts": -1, "max_task_retries": 0}
            gatherer = ray.remote(ObjectRefResolver).options(scheduling_strategy=here, **options).remote()
            _gatherers.clear()
            _gatherers[key] = gatherer
    return gatherer.gather.remote(remote, body, query)
