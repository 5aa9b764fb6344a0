"""The actors that ``serve.start`` starts: the controller, and beside it the first proxy of a new instance."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import ActorAlreadyExistsError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..broker.registry.reports import ProxyReport
from .controller.actors import error_of, options_of_actor, options_of_proxy
from .controller.planner import proxy_name
from .instance import AlreadyRunning
from .ray_actors.controller import RemoteController
from .ray_actors.lifetime import NAMESPACE, actor_name
from .ray_actors.proxy import ProxyActor
from .settings import ProcessArguments

_CONCURRENCY = 10_000
"""Every replica and every proxy has a call pending on the controller."""


def start_controller(arguments: ProcessArguments, *, node: str, detached: bool) -> Any:
    """Start the controller of an instance; return its handle at once.

    Args:
        arguments: the instance, its broker, and its variables.
        node: the id of the Ray node on which it preferably runs.
        detached: whether it outlives this process.

    Raises:
        AlreadyRunning: the Ray cluster has a controller of that name.
    """
    options: dict[str, Any] = {
        "name": actor_name(arguments.instance, "controller"),
        "namespace": NAMESPACE,
        "lifetime": "detached" if detached else "non_detached",
        "num_cpus": 0,
        # One byte, because Ray places an actor without resources on any node, despite its scheduling strategy.
        "memory": 1,
        "max_restarts": -1,
        "max_task_retries": -1,
        "max_concurrency": _CONCURRENCY,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=node, soft=True),
    }
    try:
        return RemoteController.options(**options).remote(arguments)
    except ValueError:  # Ray's error for a name that is in use.
        raise AlreadyRunning(
            f"the instance {arguments.instance!r} is already running in this Ray cluster, on another Redis: another "
            "name (instance=...) starts one beside it"
        ) from None


class FirstProxy:
    """The first proxy of a new instance: it starts beside the controller, which adopts it.

    The controller would start the same one, but not before it has started itself, a second later. It adopts an actor
    of which the registry has a report, so that is written first. If this process dies before that, and the controller
    with it, the proxy ends itself.

    Args:
        arguments: the instance, its broker, and its variables.
        node: the id of the Ray node on which it runs.
    """

    def __init__(self, arguments: ProcessArguments, node: str) -> None:
        self.name = proxy_name(node, 0)
        self.report = ProxyReport(node=node)
        self._arguments = arguments

    def start(self, http: Mapping[str, Any]) -> Any:
        """Start it with the fields of `HTTPOptions`; return its handle at once, or None if the controller was first."""
        # Detached also from this process: one that this process owned, and that died, was not replaced.
        options = options_of_actor(self._arguments.instance, "proxy", self.name) | options_of_proxy(self.report.node)
        try:
            return ProxyActor.options(**options).remote(*self._arguments.for_proxy(self.name, http))
        except ActorAlreadyExistsError:
            return None


async def wait_until_ready(controller: Any) -> None:
    """Return when every proxy serves. Raises `PenstockError` if one cannot, or if the controller has ended."""
    try:
        await controller.ready.remote()
    except RayError as e:
        raise error_of(e) from None


def end_actor(handle: Any) -> None:
    """End the controller, and with it any actor of its instance that is left; or the first proxy, unless it is None."""
    with suppress(RayError, ValueError):  # It has ended already.
        if handle is not None and ray.is_initialized():
            ray.kill(handle)
