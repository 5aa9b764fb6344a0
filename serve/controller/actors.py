"""The Ray actors of an instance: start, adopt, watch and end them. Decides nothing.

Replicas and proxies are detached actors in Ray's sense, so that they outlive a controller that dies and is restarted.
What ends them with their instance is a call that each of them has pending on the controller: it fails once the
controller has ended for good, as one that is not detached does with its script.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, cast

import ray
from ray.exceptions import ActorAlreadyExistsError, ActorUnavailableError, RayActorError, RayTaskError

from ...handles.errors import BackendError, PenstockError
from ...workers.actor import NAMESPACE
from .placement import Node

log = logging.getLogger(__name__)

_CONCURRENCY = 1000
_RETRY_S = 0.5
_DRAIN_MARGIN_S = 5.0
"""What an actor gets on top of the time that it has to drain, before it counts as hanging and is killed."""


def actor_name(instance: str, kind: str, name: str = "") -> str:
    return f"penstock:{instance}:{kind}:{name}" if name else f"penstock:{instance}:{kind}"


def alive_nodes() -> list[Node]:
    """Return the nodes of the cluster. Blocks for long when Ray's head is away."""
    found = cast("list[dict[str, Any]]", cast(Any, ray).nodes())
    return [Node(node["NodeID"], node["Resources"]) for node in found if node["Alive"]]


class ManagedActor:
    """One actor, from its start or adoption to its end."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.ready = False
        self.was_ready = False
        self.error: PenstockError | None = None
        """Why it could not start, is not well, or has died."""
        self.ending = False
        """It drains, or was killed: that it is gone soon is no failure."""
        self.checked_at_s = time.monotonic()
        self._gone = asyncio.Event()

    @property
    def gone(self) -> bool:
        return self._gone.is_set()

    def end(self, error: PenstockError | None = None) -> None:
        self.ready = False
        self.error = self.error or error
        self._gone.set()

    async def ended(self) -> None:
        await self._gone.wait()

    def kill(self) -> None:
        self.ending = True
        if not self.gone:
            ray.kill(self.handle)


class ActorPool:
    """All actors of one kind. ``changed`` is called, in the loop, when one is ready, not well, or gone."""

    def __init__(self, instance: str, kind: str, changed: Callable[[], None]) -> None:
        self.members: dict[str, ManagedActor] = {}
        self._instance, self._kind, self._changed = instance, kind, changed
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, name: str, actor_class: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        """Create the actor ``name``. Whether that works is seen later, at its member.

        There is no member where Ray holds the name still. Then one of that name lives, and is to be adopted, or has
        died just now, and adopting it tells so.
        """
        try:
            handle = actor_class.options(
                name=actor_name(self._instance, self._kind, name),
                namespace=NAMESPACE,
                lifetime="detached",
                max_restarts=0,
                max_concurrency=_CONCURRENCY,
                **options,
            ).remote(*args)
        except ActorAlreadyExistsError:
            return
        except Exception as e:  # whatever Ray has against the options: a runtime_env that cannot be, most of all
            self.members[name] = member = ManagedActor(None)
            member.end(error_of(e))
            self._changed()
            return
        self._follow(name, handle)

    def adopt(self, name: str) -> None:
        """Take charge of an actor that an earlier controller started. If it is not there, its member is gone."""
        try:
            handle = cast(Any, ray.get_actor(actor_name(self._instance, self._kind, name), namespace=NAMESPACE))
        except ValueError:
            self.members[name] = member = ManagedActor(None)
            member.end()
            return
        self._follow(name, handle)

    def drain(self, name: str, timeout_s: float) -> None:
        """Let an actor finish what it has begun, for at most ``timeout_s`` seconds, and end it then."""
        member = self.members[name]
        member.ending = True
        self._spawn(self._drain(member, timeout_s))

    def kill(self, name: str) -> None:
        self.members[name].kill()

    def forget(self, name: str) -> None:
        del self.members[name]

    def check(self, name: str, timeout_s: float) -> None:
        """Ask an actor whether it is well. If it says no, or nothing within ``timeout_s``, its ``error`` tells."""
        member = self.members[name]
        member.checked_at_s = time.monotonic()
        self._spawn(self._check(member, timeout_s))

    async def end(self, drain_s: float) -> None:
        """Drain all of them, end them, and return when that is done."""
        members = [member for member in self.members.values() if not member.gone]
        for member in members:
            member.ending = True
        await asyncio.gather(*(self._drain(member, drain_s) for member in members))

    def _follow(self, name: str, handle: Any) -> None:
        member = self.members[name] = ManagedActor(handle)
        self._spawn(self._await_ready(member))
        self._spawn(self._await_end(member))

    async def _await_ready(self, member: ManagedActor) -> None:
        error = await _outcome(member.handle.ready.remote())
        if error is None:
            member.ready = member.was_ready = not member.gone
        elif not isinstance(error, RayActorError):  # of those, its end tells
            member.error = error_of(error)
        self._changed()

    async def _await_end(self, member: ManagedActor) -> None:
        controller = actor_name(self._instance, "controller")
        while True:
            error = await _outcome(member.handle.attend.remote(controller))
            if not isinstance(error, ActorUnavailableError):
                break
            await asyncio.sleep(_RETRY_S)  # the connection to it broke: it may well be alive
        member.end(error_of(error) if error is not None else None)
        self._changed()

    async def _drain(self, member: ManagedActor, timeout_s: float) -> None:
        if member.ready:
            try:
                await asyncio.wait_for(_outcome(member.handle.drain.remote(timeout_s)), timeout_s + _DRAIN_MARGIN_S)
            except asyncio.TimeoutError:
                log.warning("a %s hangs instead of draining, and is killed", self._kind)
        member.kill()
        await member.ended()

    async def _check(self, member: ManagedActor, timeout_s: float) -> None:
        try:
            failure = await asyncio.wait_for(_outcome(member.handle.check.remote()), timeout_s)
            error = None if failure is None else error_of(failure)
        except asyncio.TimeoutError:
            error = BackendError("TimeoutError", f"it did not say within {timeout_s:g} s whether it is well")
        if error is not None and not member.ending:
            member.error, member.ready = member.error or error, False
            self._changed()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _outcome(call: Any) -> Exception | None:
    """Wait for a call of an actor, and return what it raised."""
    try:
        await call
    except Exception as e:
        return e
    return None


def error_of(error: BaseException) -> PenstockError:
    """Return what an actor raised, or what became of it, as one of our errors."""
    if isinstance(error, RayTaskError):
        cause = cast("BaseException | None", error.cause)
        if isinstance(cause, PenstockError):
            return cause
        return BackendError(type(cause or error).__name__, str(cause or error), str(cast(Any, error).traceback_str))
    return error if isinstance(error, PenstockError) else BackendError(type(error).__name__, str(error).strip())
