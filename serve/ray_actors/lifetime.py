"""The lifetime of an actor: how it lasts as long as the controller, and the objects that it keeps."""

from __future__ import annotations

import asyncio
import gc
import logging
from typing import Any, cast

import ray
from ray.exceptions import RayError

log = logging.getLogger(__name__)

NAMESPACE = "penstock"
"""Ray's namespace of all actors."""

_RETRY_S = 0.5


def actor_name(instance: str, kind: str, name: str = "") -> str:
    """Return the name of an actor within `NAMESPACE`."""
    return f"penstock:{instance}:{kind}:{name}" if name else f"penstock:{instance}:{kind}"


async def outlast(name: str) -> None:
    """Return when the actor now called ``name`` has died and will not restart. A later one may have its name."""
    watched: Any = None
    while True:
        try:
            # In a thread, as it blocks for long while Ray's head node is down.
            actor: Any = await asyncio.to_thread(lambda: cast("Any", ray).get_actor(name, namespace=NAMESPACE))
            if watched is not None and actor != watched:
                return
            watched = actor
            # Without retries: Ray would report one on the terminal of the script, even where the instance has ended.
            await actor.attend.options(max_task_retries=0).remote()
        except ValueError:  # there is none of that name any more
            return
        except RayError as e:
            # Also an ActorDiedError: a call gets it from an actor that restarts, as its node has died with it.
            log.debug("cannot watch the actor %s: %s", name, e)
        await asyncio.sleep(_RETRY_S)


async def end_with(controller: str) -> None:
    """Return never: end the current actor when the actor ``controller`` has ended for good."""
    await outlast(controller)
    end_this_actor()


def end_this_actor(*, restart: bool = False) -> None:
    """End the current actor; Ray starts another in its place only with ``restart``."""
    ray.kill(cast("Any", ray.get_runtime_context()).current_actor, no_restart=not restart)


def keep_objects() -> None:
    """Exempt the objects that exist from garbage collection: those of imports live as long as the process.

    A collection that scans those of Ray takes a tenth of a second. Called before an actor imports what it runs, and
    again, after a collection, when it has started.
    """
    gc.freeze()
