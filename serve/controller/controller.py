"""The controller: reconciles, pass by pass, and reports what it observed.

It holds nothing that it could not find out again: what should be lies in the registry, what is there says so itself,
and what to do about the difference is decided by `plan`. Killed, it is restarted by Ray and takes charge of what is
there.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ...broker.errors import BrokerUnavailable, PenstockError
from ...broker.queue.purge import retire
from ...broker.registry.records import BackendRecord, Snapshot
from ...broker.registry.store import Registry
from ...broker.registry.watcher import Watcher
from ...broker.transport import outages
from ...broker.transport.connection import RedisConnection
from ...broker.transport.url import shown_url
from ...broker.wire.keys import Keys
from ...handles.errors import BackendNotFound, to_wire
from ...workers.actor import RemoteReplica as ReplicaActor
from ...workers.runtime_env import for_ray
from ..config import HTTPOptions
from ..settings import Settings
from . import planner as planning
from .actors import ActorPool
from .observed_state import StateObserver
from .planner import ActorState, DesiredProxies, DesiredState, Step
from .proxy_actor import ProxyActor
from .registry_backup import RegistryBackup
from .scaler import Scaler

log = logging.getLogger(__name__)

LEASE_S = 5.0
"""The instance has an owner for so long after its controller was last seen. Ray restarts a controller in less."""

_PASS_S = 0.5
_CHECK_PROXIES_S = 5.0
_DRAIN_PROXIES_S = 2.0
_LAST_SENDERS_S = 2.0
"""Every process follows the registry within a second: after this long nobody sends to a backend that is gone."""


class Controller:
    """The controller of one instance: a plain asyncio class, which needs Ray to be there."""

    def __init__(self, redis_url: str, instance: str, replica_redis_url: str, proxy_redis_url: str) -> None:
        self._url, self._instance = redis_url, instance
        self._replica_url, self._proxy_url = replica_redis_url, proxy_redis_url
        self._keys = Keys(instance)
        self._wake = asyncio.Event()
        self._replicas = ActorPool(instance, "replica", self._wake.set)
        self._proxies = ActorPool(instance, "proxy", self._wake.set)
        self._http_ready = asyncio.Event()
        self._http_error: PenstockError | None = None
        self._sight = StateObserver(self._replicas, self._proxies)
        self._scaler = Scaler()
        self._copy = RegistryBackup()
        self._reading = asyncio.Lock()
        """Held so that an older copy does not take the place of a newer one."""
        self._waits = True
        """The registry may hold that Ray's head is waited for, if only as an earlier controller said it."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Work until the instance is told to stop, or is lost to another owner.

        Raises:
            PenstockError: there is no such instance.
        """
        await self._connect()
        await self._begin()
        complaint = ""
        while True:
            self._wake.clear()
            try:
                settings, snapshot = await self._read()
                if settings is None:
                    await self._copy.restore(self._registry)
                    continue
                if settings.stopping:
                    await self._stop(settings)
                    return
                if not await self._registry.own(settings.owner, LEASE_S):
                    log.error("instance %r has another owner now: ending its actors here", self._instance)
                    await self._end_actors()
                    return
                await self._bring_about(settings, snapshot)
                outages.report_ended(shown_url(self._url), self)
            except BrokerUnavailable as e:
                outages.report_began(shown_url(self._url), self, f"the controller waits for its broker: {e}")
            except Exception as e:
                if repr(e) != complaint:
                    log.exception("a pass of the controller failed; it tries again")
                complaint = repr(e)
            await self._sleep()

    async def http_ready(self) -> None:
        """Return when every proxy that should be there serves. Raises why one of them cannot."""
        await self._http_ready.wait()
        if self._http_error is not None:
            raise self._http_error

    async def _connect(self) -> None:
        while True:
            self._connection = RedisConnection(self._url, name="penstock-controller")
            self._registry = Registry(self._connection, self._keys)
            self._watcher = Watcher(self._url, self._registry, self._keys)
            try:
                await self._connection.open()
                await self._watcher.start()
            except BrokerUnavailable as e:
                log.warning("the controller waits for its broker: %s", e)
                await self._watcher.close()
                await self._connection.close()
                await asyncio.sleep(_PASS_S)
            else:
                self._watcher.add_listener(self._heard)
                self._connection.on_reconnect(self._look_again)
                return

    async def _begin(self) -> None:
        while True:
            try:
                settings = await Settings.read(self._registry)
                if settings is None:
                    raise PenstockError(f"there is no instance {self._instance!r}")
                self._options = await settings.http_options(self._registry)
                await self._sight.begin(self._registry)
                return
            except BrokerUnavailable as e:
                log.warning("the controller waits for its broker: %s", e)
                await asyncio.sleep(_PASS_S)

    async def _look_again(self) -> None:
        self._wake.set()

    def _heard(self, _: Snapshot) -> None:
        self._wake.set()
        # Now, as the pass that runs may take its time: what a call has changed is not to be lost when it has returned.
        self._spawn(self._copy_now())

    async def _copy_now(self) -> None:
        with suppress(PenstockError):  # the next pass meets it too, and says so
            await self._read()

    async def _read(self) -> tuple[Settings | None, Snapshot]:
        """Read what should be, and keep a copy of it. Without settings, the broker has lost its data."""
        async with self._reading:
            # In this order: where there are settings, what was read before them is whole, even if the broker loses its
            # data in this moment. The watcher's snapshot may be from just after that.
            snapshot = await self._registry.snapshot()
            settings = await Settings.read(self._registry)
            if settings is not None and not settings.stopping:
                await self._copy.keep(self._registry, settings, snapshot)
            return settings, snapshot

    async def _sleep(self) -> None:
        waking = asyncio.ensure_future(self._wake.wait())
        await asyncio.wait([waking], timeout=_PASS_S)
        waking.cancel()

    # -- one pass

    async def _bring_about(self, settings: Settings, snapshot: Snapshot) -> None:
        sight = self._sight
        await sight.look(self._registry)
        await self._tell_of_head(sight.head_answers)
        if not sight.head_answers:
            return
        asked = sight.desired(snapshot, settings)
        desired = await self._scaler.scaled(
            asked, snapshot, self._connection, self._keys, sight.statuses, sight.said(), sight.came_about
        )
        for step in planning.plan(desired, sight.seen()):
            await self._act(step, snapshot)
        self._check_health(snapshot)
        await self._report(desired)
        self._tell_http(desired.http)

    # -- steps

    async def _act(self, step: Step, snapshot: Snapshot) -> None:
        match step:
            case planning.StartReplica(tag, _):
                await self._start_replica(snapshot.backends[tag])
            case planning.DrainReplica(name, grace_s):
                self._replicas.drain(name, grace_s)
            case planning.KillReplica(name):
                self._replicas.kill(name)
            case planning.ForgetReplica(name):
                await self._forget_replica(name)
            case planning.RetireBackend(tag):
                await self._retire(tag)
            case planning.StartProxy(name, node, port):
                await self._start_proxy(name, node, port)
            case planning.DrainProxy(name):
                self._proxies.drain(name, _DRAIN_PROXIES_S)
            case planning.KillProxy(name):
                self._proxies.kill(name)
            case planning.ForgetProxy(name):
                await self._forget_proxy(name)

    async def _start_replica(self, record: BackendRecord) -> None:
        name = f"{record.tag}#{secrets.token_hex(3)}"
        # Written before there is an actor, so that a controller that takes over now knows of it.
        report = {
            "backend": record.tag,
            "version": record.version,
            "initial_config_version": record.config_version,
            "state": ActorState.STARTING.value,
        }
        await self._registry.report("replicas", name, report)
        self._sight.note_start(name, report)
        # Spread, so that what a node's death takes with it is a share of each backend, and not the whole of one.
        options: dict[str, Any] = {"num_cpus": 1, "scheduling_strategy": "SPREAD", **record.actor_options}
        if record.runtime_env is not None:
            options["runtime_env"] = for_ray(record.runtime_env)
        self._replicas.start(name, ReplicaActor, (self._replica_url, self._instance, record.tag, name), options)

    async def _forget_replica(self, name: str) -> None:
        await self._registry.drop_lease(self._sight.backend_of(name), name)
        await self._registry.report("replicas", name, None)
        self._sight.forget(self._replicas, name)

    async def _retire(self, tag: str) -> None:
        """Refuse what lies in the queue of a backend that is gone; and once more what late senders put there."""
        error = BackendNotFound(tag, (await self._registry.snapshot()).backends)
        await retire(self._connection, self._keys, tag, error.status, to_wire(error))
        await self._registry.report("backends", tag, None)
        self._sight.statuses.pop(tag, None)

        async def again() -> None:
            await asyncio.sleep(_LAST_SENDERS_S)
            if tag not in (await self._registry.snapshot()).backends:
                await retire(self._connection, self._keys, tag, error.status, to_wire(error))

        self._spawn(again())

    async def _start_proxy(self, name: str, node: str, port: int) -> None:
        report = {"node": node, "state": ActorState.STARTING.value}
        await self._registry.report("proxies", name, report)
        self._sight.note_start(name, report)
        options = {field: getattr(self._options, field) for field in HTTPOptions.model_fields} | {"port": port}
        where = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        args = (self._proxy_url, self._instance, name, options)
        self._proxies.start(name, ProxyActor, args, {"num_cpus": 0, "scheduling_strategy": where})

    async def _forget_proxy(self, name: str) -> None:
        await self._registry.report("proxies", name, None)
        self._sight.forget(self._proxies, name)

    # -- health, reports, the end

    def _check_health(self, snapshot: Snapshot) -> None:
        for name, member in self._replicas.members.items():
            record = snapshot.backends.get(self._sight.backend_of(name))
            if record is not None and member.ready and not member.ending:
                config = record.config
                if time.monotonic() - member.checked_at_s >= config.health_check_period_s:
                    self._replicas.check(name, config.health_check_timeout_s)
        for name, member in self._proxies.members.items():
            if member.ready and not member.ending and time.monotonic() - member.checked_at_s >= _CHECK_PROXIES_S:
                self._proxies.check(name, _CHECK_PROXIES_S)

    async def _tell_of_head(self, answers: bool) -> None:
        if self._waits or not answers:
            await self._registry.report("controllers", "controller", None if answers else {"waits_for": "Ray's head"})
        self._waits = not answers

    async def _report(self, desired: DesiredState) -> None:
        seen = self._sight.seen()
        for tag, backend in desired.backends.items():
            status = self._sight.status(backend, seen)
            if status != self._sight.statuses.get(tag):
                await self._registry.report("backends", tag, status)
                self._sight.statuses[tag] = status

    def _tell_http(self, http: DesiredProxies) -> None:
        wanted = len(http.nodes) * http.per_node
        ready = sum(member.ready for member in self._proxies.members.values())
        self._http_error = self._sight.proxy_error
        if ready >= wanted or self._http_error is not None:
            self._http_ready.set()

    async def _stop(self, settings: Settings) -> None:
        """End every actor, then delete what the instance has in Redis, or leave it to be resumed."""
        await self._end_actors()
        if settings.stopping == "erase":
            error = PenstockError(f"the instance {self._instance!r} was shut down")
            for tag in (await self._registry.snapshot()).backends:
                await retire(self._connection, self._keys, tag, 503, to_wire(error))
            await self._registry.erase()
            return
        for name in self._replicas.members:
            await self._registry.report("replicas", name, None)
        for name in self._proxies.members:
            await self._registry.report("proxies", name, None)
        await replace(settings, stopping="", stopped=True).write(self._registry)
        await self._registry.disown(settings.owner)

    async def _end_actors(self) -> None:
        # Proxies first: what they have accepted can still be answered.
        await self._proxies.end(_DRAIN_PROXIES_S)
        await self._replicas.end(0.0)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class ControllerActor:
    """The controller as an actor. Ray runs its constructor in the loop, after a restart too."""

    def __init__(self, redis_url: str, instance: str, replica_redis_url: str, proxy_redis_url: str) -> None:
        self._controller = Controller(redis_url, instance, replica_redis_url, proxy_redis_url)
        self._run = asyncio.get_running_loop().create_task(self._controller.run(), name="controller")
        self._run.add_done_callback(_end_actor)

    async def ready(self) -> None:
        """Return when every proxy serves. Raises why one of them cannot, or why the controller cannot work."""
        http_ready = asyncio.ensure_future(self._controller.http_ready())
        done, _ = await asyncio.wait([http_ready, self._run], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            await task

    async def pid(self) -> int:
        return os.getpid()

    async def attend(self) -> None:
        """Return never: who waits for this learns when the controller has ended for good. A restart is no end."""
        await asyncio.Event().wait()


def _end_actor(run: asyncio.Task[None]) -> None:
    if not run.cancelled() and (error := run.exception()) is not None:
        log.error("the controller ends: %s", error)
    # Merely to exit would have Ray restart it.
    ray.kill(cast(Any, ray.get_runtime_context()).current_actor)


# Whoever gets a handle to this actor imports its class, in a thread of Ray's, while the user's code may use
# `penstock.serve` in another. Looked for there and not here, it is found under the one lock that both take, that of
# `public`: with the locks of several modules taken in different orders, Python lets one of them see half a module.
ControllerActor.__module__ = "penstock.serve"
Actor: Any = ray.remote(ControllerActor)
