"""The Ray actor around the controller: its class, start and end."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any, cast

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ...broker.defaults import adopt_environment
from ...handles.log_context import set_up_logs
from ...workers.actor import NAMESPACE
from ..instance import AlreadyRunning
from ..ray_nodes import own_node
from ..settings import ProcessArguments
from .actors import actor_name, error_of
from .controller import Controller

log = logging.getLogger(__name__)

_CONCURRENCY = 10_000
"""Every replica and every proxy has a call pending on the controller."""


class ControllerActor:
    """The controller as an asyncio actor. Ray runs the constructor in the event loop, also after a restart."""

    def __init__(self, arguments: ProcessArguments) -> None:
        adopt_environment(arguments.environment)
        set_up_logs()
        loop = asyncio.get_running_loop()
        self._connected: asyncio.Future[Controller] = loop.create_future()
        connecting = Controller.connect(arguments, node=own_node(), leave=_restart_actor)
        self._run = loop.create_task(self._connect_and_run(connecting), name="controller")
        self._run.add_done_callback(_end_actor)

    async def ready(self) -> None:
        """Return when every proxy serves.

        Raises:
            PenstockError: a proxy failed, or the controller ended with this error.
        """
        http_ready = asyncio.ensure_future(self._http_ready())
        done, _ = await asyncio.wait([http_ready, self._run], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            await task

    async def pid(self) -> int:
        return os.getpid()

    async def attend(self) -> None:
        """Never return. The call fails when the controller has ended for good; a restart does not end it."""
        await asyncio.Event().wait()

    async def _connect_and_run(self, connecting: Awaitable[Controller]) -> None:
        controller = await connecting
        self._connected.set_result(controller)
        await controller.run()

    async def _http_ready(self) -> None:
        controller = await asyncio.shield(self._connected)
        await controller.http_ready()


def _restart_actor() -> None:
    """Let Ray restart this actor, as after a crash, on a node that does not drain."""
    ray.kill(cast(Any, ray.get_runtime_context()).current_actor, no_restart=False)


def _end_actor(run: asyncio.Task[None]) -> None:
    if not run.cancelled() and (error := run.exception()) is not None:
        log.error("the controller ends: %s", error)
    # An exit alone would make Ray restart the actor.
    ray.kill(cast(Any, ray.get_runtime_context()).current_actor)


# A process that receives a handle to this actor imports its class on a thread of Ray, while user code may import
# `penstock.serve` on another. Both imports go through `penstock.serve`, so both take its lock first. If the class were
# looked up in this module, the two threads would take the locks of several modules in different orders, and Python
# would break that deadlock by handing out a half-initialised module.
ControllerActor.__module__ = "penstock.serve"
Actor: Any = ray.remote(ControllerActor)
"""The actor class. Its arguments are those of `ControllerActor`."""


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
        return Actor.options(**options).remote(arguments)
    except ValueError:  # Ray's error for a name that is in use.
        raise AlreadyRunning(
            f"the instance {arguments.instance!r} is already running in this Ray cluster, on another Redis: another "
            "name (instance=...) starts one beside it"
        ) from None


async def wait_until_ready(controller: Any) -> None:
    """Return when every proxy serves. Raises `PenstockError` if one cannot, or if the controller has ended."""
    try:
        await controller.ready.remote()
    except RayError as e:
        raise error_of(e) from None


def end_controller(controller: Any) -> None:
    """End the controller, and with it any actor of its instance that is left."""
    with suppress(RayError, ValueError):  # It has ended already.
        if ray.is_initialized():
            ray.kill(controller)
