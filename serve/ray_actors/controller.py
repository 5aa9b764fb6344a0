"""The Ray actor around the controller."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import ray

from .lifetime import end_this_actor, keep_objects

if TYPE_CHECKING:
    from ..controller.controller import Controller
    from ..settings import ProcessArguments

log = logging.getLogger(__name__)

_ERROR_S = 1.0
"""How long the actor of a controller that has failed remains, so that `ControllerActor.ready` can raise the error."""


class ControllerActor:
    """The controller as an asyncio actor. Ray runs the constructor in the event loop, also after a restart."""

    def __init__(self, arguments: ProcessArguments) -> None:
        keep_objects()
        from ...broker.defaults import adopt_environment
        from ...handles.log_context import set_up_logs
        from ..controller.controller import Controller

        adopt_environment(arguments.environment)
        set_up_logs()
        loop = asyncio.get_running_loop()
        self._connected: asyncio.Future[Controller] = loop.create_future()
        node = str(cast(Any, ray).get_runtime_context().get_node_id())
        leave = partial(end_this_actor, restart=True)  # as after a crash, on a node that does not drain
        connecting = Controller.connect(arguments, node=node, leave=leave)
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


def _end_actor(run: asyncio.Task[None]) -> None:
    delay_s = 0.0
    if not run.cancelled() and (error := run.exception()) is not None:
        log.error("the controller ends: %s", error)
        delay_s = _ERROR_S
    # An exit alone would make Ray restart the actor.
    run.get_loop().call_later(delay_s, end_this_actor)


RemoteController: Any = ray.remote(ControllerActor)
"""The actor class. Its arguments are those of `ControllerActor`."""
