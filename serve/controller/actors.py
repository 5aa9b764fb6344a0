"""Pools of Ray actors: start, adopt, check and end the replicas or the proxies of an instance.

The actors are detached in Ray's sense, so that they outlive a controller that dies and is restarted. Each has a call
pending on the controller, which fails when the controller has ended for good; then the actor ends itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, cast

import ray
from ray.exceptions import ActorAlreadyExistsError, ActorUnavailableError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ...handles.errors import BackendError, PenstockError
from ..ray_actors.lifetime import NAMESPACE, actor_name

log = logging.getLogger(__name__)

_CONCURRENCY = 1000
_RETRY_S = 0.5
_DRAIN_MARGIN_S = 5.0
"""An actor that has not drained this long after its time is killed."""


def options_of_actor(instance: str, kind: str, name: str) -> dict[str, Any]:
    """Return Ray's options of an actor that outlives its controller."""
    return {
        "name": actor_name(instance, kind, name),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "max_restarts": 0,
        "max_concurrency": _CONCURRENCY,
    }


def options_of_proxy(node: str) -> dict[str, Any]:
    """Return further options of Ray for a proxy on the node with this id."""
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=node, soft=False)}


class ManagedActor:
    """One actor, from its start or adoption to its end."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.ready = False
        self.was_ready = False
        self.error: PenstockError | None = None
        """The error of its start or of a health check, or the cause of its death."""
        self.ending = False
        """Whether its end was requested, by a drain or a kill, so that it is not a failure."""
        self.checked_at_s = time.monotonic()
        self._gone = asyncio.Event()

    @property
    def gone(self) -> bool:
        return self._gone.is_set()

    def set_gone(self, error: PenstockError | None = None) -> None:
        """Record that the process has ended, for the reason ``error``."""
        self.ready = False
        self.error = self.error or error
        self._gone.set()

    async def wait_gone(self) -> None:
        await self._gone.wait()

    def kill(self) -> None:
        self.ending = True
        if not self.gone:
            ray.kill(self.handle)


class ActorPool:
    """All actors of one kind, by name.

    Args:
        instance: the name of the instance.
        kind: the kind of the actors, such as ``"replica"``; part of their names in Ray.
        on_change: called on the event loop when an actor becomes ready, fails a health check, or is gone.
    """

    def __init__(self, instance: str, kind: str, on_change: Callable[[], None]) -> None:
        self.members: dict[str, ManagedActor] = {}
        self._instance, self._kind, self._on_change = instance, kind, on_change
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, name: str, actor_class: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        """Create the actor ``name`` in the background. Its member shows whether it started.

        No member is added while Ray still knows an actor of that name. That one lives and should be adopted, or it has
        just died, which adopting it shows.
        """
        try:
            handle = actor_class.options(**options_of_actor(self._instance, self._kind, name), **options).remote(*args)
        except ActorAlreadyExistsError:
            return
        except Exception as e:  # Ray rejects the options with various types, such as for an invalid runtime_env.
            self.members[name] = member = ManagedActor(None)
            member.set_gone(error_of(e))
            self._on_change()
            return
        self._watch(name, handle)

    def adopt(self, name: str) -> None:
        """Add an actor that an earlier controller started. If Ray does not know it, its member is gone."""
        try:
            handle = cast(Any, ray.get_actor(actor_name(self._instance, self._kind, name), namespace=NAMESPACE))
        except ValueError:
            self.members[name] = member = ManagedActor(None)
            member.set_gone()
            return
        self._watch(name, handle)

    def drain(self, name: str, timeout_s: float, delay_s: float = 0.0) -> None:
        """Let an actor finish its requests, for at most ``timeout_s`` seconds, then end it; in the background.

        ``delay_s`` is for proxies: the seconds before, in which they accept connections but are not ready.
        """
        member = self.members[name]
        member.ending = True
        self._spawn(self._drain(member, timeout_s, delay_s))

    def kill(self, name: str) -> None:
        self.members[name].kill()

    def forget(self, name: str) -> None:
        del self.members[name]

    def check(self, name: str, timeout_s: float) -> None:
        """Run an actor's health check in the background. A failure, or no answer within ``timeout_s``, is its error."""
        member = self.members[name]
        member.checked_at_s = time.monotonic()
        self._spawn(self._check(member, timeout_s))

    async def end(self, drain_s: float) -> None:
        """Drain every actor for at most ``drain_s`` seconds; return when all are gone."""
        members = [member for member in self.members.values() if not member.gone]
        for member in members:
            member.ending = True
        await asyncio.gather(*(self._drain(member, drain_s) for member in members))

    def _watch(self, name: str, handle: Any) -> None:
        member = self.members[name] = ManagedActor(handle)
        self._spawn(self._watch_start(member))
        self._spawn(self._watch_end(member))

    async def _watch_start(self, member: ManagedActor) -> None:
        error = await _outcome(member.handle.ready.remote())
        if error is None:
            member.ready = member.was_ready = not member.gone
        elif not isinstance(error, RayActorError):  # The actor died: _watch_end records that.
            member.error = error_of(error)
        self._on_change()

    async def _watch_end(self, member: ManagedActor) -> None:
        controller = actor_name(self._instance, "controller")
        while True:
            error = await _outcome(member.handle.attend.remote(controller))
            if not isinstance(error, ActorUnavailableError):
                break
            await asyncio.sleep(_RETRY_S)  # The connection to the actor broke; the actor may be alive.
        member.set_gone(error_of(error) if error is not None else None)
        self._on_change()

    async def _drain(self, member: ManagedActor, timeout_s: float, delay_s: float = 0.0) -> None:
        if member.ready:
            arguments = (timeout_s, delay_s) if delay_s else (timeout_s,)
            longest_s = delay_s + timeout_s + _DRAIN_MARGIN_S
            try:
                await asyncio.wait_for(_outcome(member.handle.drain.remote(*arguments)), longest_s)
            except asyncio.TimeoutError:
                log.warning("a %s did not drain within %g s and is killed", self._kind, longest_s)
        member.kill()
        await member.wait_gone()

    async def _check(self, member: ManagedActor, timeout_s: float) -> None:
        try:
            failure = await asyncio.wait_for(_outcome(member.handle.check.remote()), timeout_s)
            error = None if failure is None else error_of(failure)
        except asyncio.TimeoutError:
            error = BackendError("TimeoutError", f"no answer to the health check within {timeout_s:g} s")
        if error is not None and not member.ending:
            member.error, member.ready = member.error or error, False
            self._on_change()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _outcome(call: Any) -> Exception | None:
    """Wait for a call of an actor; return the exception that it raised, or None."""
    try:
        await call
    except Exception as e:
        return e
    return None


def error_of(error: BaseException) -> PenstockError:
    """Return an exception that a call of an actor raised, or the actor's death, as a `PenstockError`."""
    if isinstance(error, RayTaskError):
        cause = cast("BaseException | None", error.cause)
        if isinstance(cause, PenstockError):
            return cause
        return BackendError(type(cause or error).__name__, str(cause or error), str(cast(Any, error).traceback_str))
    return error if isinstance(error, PenstockError) else BackendError(type(error).__name__, str(error).strip())
