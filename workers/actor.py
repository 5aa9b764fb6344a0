"""The Ray actor of a replica: reads from the registry what to run, and reports its state there.

Nobody has to tell it anything but when to end, so it goes on serving whatever becomes of the controller and of Ray.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import Coroutine, Mapping
from typing import Any, cast

import ray
from ray.exceptions import ActorDiedError, RayError

from ..broker.defaults import belong_to
from ..broker.errors import BrokerRefused, BrokerUnavailable, PenstockError
from ..broker.queue import stats
from ..broker.registry.records import DEFAULTS, BackendRecord, Snapshot
from ..broker.registry.store import Registry
from ..broker.registry.watcher import Watcher
from ..broker.transport import outages
from ..broker.transport.connection import FateUnknown, RedisConnection
from ..broker.transport.url import shown_url
from ..broker.wire.keys import Keys
from ..handles.errors import BackendNotFound, to_wire
from ..handles.log_context import name_requests
from ..runtime.memory import Memory
from ..runtime.sigterm import DrainsOnSigterm
from .executing.runner import Runner
from .replica import Replica
from .runtime_env import UnpackedRuntimeEnv

log = logging.getLogger(__name__)

NAMESPACE = "penstock"

_RETRY_S = 0.5
_PROMPTLY_S = 1.0
_COUNT_S = 1.0


class Serving:
    """The life of one replica, from `ready` to `drain`: a plain asyncio class, which needs no Ray."""

    def __init__(
        self, redis_url: str, instance: str, backend: str, replica: str, where: Mapping[str, Any] | None = None
    ) -> None:
        self._url, self._instance, self._backend, self._replica = redis_url, instance, backend, replica
        self._keys = Keys(instance)
        self._version = ""
        self._config_version = self._refused = 0
        self._said: dict[str, Any] = {"backend": backend, "state": "starting", "error": None, **(where or {})}
        self._connection: RedisConnection | None = None
        self._directories: UnpackedRuntimeEnv | None = None
        self._runner: Runner | None = None
        self._worker: Replica | None = None
        self._memory = Memory()
        self._starting: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[bool] | None = None
        self._following: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def ready(self) -> None:
        """Return when it serves, however long the user's constructor takes. Called again, it tells the same.

        Raises:
            BackendNotFound: its backend was deleted.
            BackendError: the user's code cannot be loaded, constructed or configured.
        """
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start())
        await asyncio.shield(self._starting)

    async def check(self) -> None:
        """Return if it is well, as far as is known by now. At rest, give back memory that large bodies took.

        A ``check_health`` of the user's that waits behind a long request is no sign of illness: it is not waited for,
        and what it says is said by the next call.

        Raises:
            PenstockError: it could not start, or it has stopped claiming though requests wait.
            BackendError: the user's ``check_health`` raised, or took too long.
        """
        if self._starting is not None and self._starting.done():
            await self._starting
        if self._runner is None or self._worker is None:
            return
        await self._worker.check()
        if self._checking is None:
            self._checking = asyncio.ensure_future(self._runner.check_health())
        checking = self._checking
        await asyncio.wait([checking], timeout=_PROMPTLY_S)
        if checking.done():
            self._checking = None
            await checking
        if not self._worker.in_progress:
            self._memory.give_back()

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new, finish what was begun, and stop serving for good.

        Returns False if some of it was unfinished after ``timeout_s`` seconds. Other replicas take that over.
        """
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end(timeout_s))
        return await asyncio.shield(self._ending)

    async def drain_gracefully(self) -> bool:
        """`drain`, for as long as its backend's configuration says."""
        config = DEFAULTS if self._runner is None else self._runner.config
        return await self.drain(config.graceful_shutdown_timeout_s)

    # -- starting

    async def _start(self) -> None:
        await self._connect()
        try:
            record = self._watcher.snapshot.backends.get(self._backend)
            if record is None:
                raise BackendNotFound(self._backend, self._watcher.snapshot.backends)
            self._version = record.version
            self._say(version=record.version, config_version=0, initial_config_version=record.config_version)
            code = await self._code(record.code)
            if record.files:
                self._directories = await asyncio.to_thread(UnpackedRuntimeEnv, await self._code(record.files))
                self._directories.enter()
            self._runner = await Runner.start(self._backend, self._replica, code, record.config)
        except PenstockError as e:
            log.error("replica %s cannot start: %s", self._replica, e)
            self._say(state="failed", error=to_wire(e))
            raise
        self._worker = await self._claiming(self._runner)
        self._config_version = record.config_version
        self._say(state="ready", config_version=record.config_version, capacity=self._worker.capacity)
        self._watcher.add_listener(self._on_change)
        self._on_change(self._watcher.snapshot)
        self._spawn(self._keep_counting(self._worker))

    async def _connect(self) -> None:
        while True:
            connection = RedisConnection(self._url, name=f"penstock-{self._replica}-registry")
            self._registry = Registry(connection, self._keys)
            self._watcher = Watcher(self._url, self._registry, self._keys)
            try:
                await connection.open()
                await self._watcher.start()
            except BrokerUnavailable as e:
                outages.report_began(shown_url(self._url), self, f"replica {self._replica} waits for its broker: {e}")
                await self._watcher.close()
                await connection.close()
                await asyncio.sleep(_RETRY_S)
            else:
                outages.report_ended(shown_url(self._url), self)
                connection.on_reconnect(self._tell)  # a broker that lost its data has lost what we said too
                self._connection = connection
                return

    async def _code(self, digest: str) -> bytes:
        while True:
            try:
                return await self._registry.get_code(digest)
            except BrokerUnavailable:
                await asyncio.sleep(_RETRY_S)

    async def _claiming(self, runner: Runner) -> Replica:
        while True:
            worker = Replica(self._url, self._instance, self._backend, self._replica, runner)
            try:
                await worker.start()
            except BrokerUnavailable as e:
                outages.report_began(shown_url(self._url), self, f"replica {self._replica} waits for its broker: {e}")
                await worker.stop()
                await asyncio.sleep(_RETRY_S)
            else:
                outages.report_ended(shown_url(self._url), self)
                return worker

    # -- following the registry

    def _on_change(self, _: Snapshot) -> None:
        if self._following is None or self._following.done():
            self._following = self._spawn(self._follow())

    async def _follow(self) -> None:
        """Take over configurations until there is no newer one."""
        assert self._worker is not None
        while (record := self._newer()) is not None:
            try:
                await self._worker.reconfigure(record.config)
            except PenstockError as e:
                log.error("replica %s keeps its configuration: %s", self._replica, e)
                self._refused = record.config_version
                self._say(error=to_wire(e), refused=record.config_version)
            else:
                self._config_version = record.config_version
                capacity = self._worker.capacity
                self._say(config_version=record.config_version, error=None, refused=None, capacity=capacity)

    def _newer(self) -> BackendRecord | None:
        record = self._watcher.snapshot.backends.get(self._backend)
        # A new version of the code has replicas of its own, and its configuration may not suit ours.
        if record is None or record.version != self._version or self._ending is not None:
            return None
        return record if record.config_version > max(self._config_version, self._refused) else None

    def _say(self, **news: Any) -> None:
        """Change what the registry holds of us, as soon as that can be reached."""
        self._said = {name: value for name, value in {**self._said, **news}.items() if value is not None}
        self._spawn(self._tell())

    async def _tell(self) -> None:
        while True:
            try:
                return await self._registry.report("replicas", self._replica, self._said)
            except BrokerUnavailable:
                await asyncio.sleep(_RETRY_S)

    # -- counting

    async def _keep_counting(self, worker: Replica) -> None:
        while True:
            await asyncio.sleep(_COUNT_S)
            await self._count(worker)

    async def _count(self, worker: Replica) -> None:
        """Say what was done since this was said last."""
        run_stats = worker.take_run_stats()
        if not run_stats or self._connection is None:
            return
        try:
            await stats.add_stats(self._connection, self._keys, self._backend, run_stats)
        except FateUnknown:
            pass  # rather not counted than twice
        except BrokerUnavailable:
            worker.run_stats.add(run_stats)
        except BrokerRefused as e:
            log.warning("cannot count what %s has done: %s", self._replica, e)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- ending

    async def _end(self, timeout_s: float) -> bool:
        loop, finished = asyncio.get_running_loop(), True
        ends_at = loop.time() + timeout_s
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait([self._starting])
        if self._connection is not None:
            self._say(state="draining")
        if self._worker is not None:
            finished = await self._worker.drain(timeout_s)
        if self._runner is not None:
            finished = await self._runner.stop(max(0.0, ends_at - loop.time())) and finished
        if self._worker is not None:
            await self._worker.stop()
        for task in self._tasks:
            task.cancel()
        if self._connection is not None:
            if self._worker is not None and self._connection.connected:
                await self._count(self._worker)
            await self._watcher.close()
            await self._connection.close()
        if self._directories is not None:
            await asyncio.to_thread(self._directories.remove)
        return finished


class ReplicaActor(DrainsOnSigterm):
    """A replica as a Ray actor. All of its methods may be waiting at once."""

    def __init__(self, redis_url: str, instance: str, backend: str, replica: str) -> None:
        name_requests()
        belong_to(redis_url, instance)  # for `serve.connect()` in the user's code
        where = {"node": ray.get_runtime_context().get_node_id(), "pid": os.getpid()}
        self._serving = Serving(redis_url, instance, backend, replica, where)
        self.on_sigterm(self._serving.drain_gracefully)

    async def ready(self) -> None:
        await self._serving.ready()
        # What was made so far lives as long as the process: it need not be looked through again and again.
        gc.collect()
        gc.freeze()

    async def check(self) -> None:
        await self._serving.check()

    async def drain(self, timeout_s: float) -> bool:
        return await self._serving.drain(timeout_s)

    async def attend(self, controller: str) -> None:
        """Live as long as the actor ``controller``, over its restarts; end when that has ended for good."""
        await outlast(controller)
        ray.kill(cast("Any", ray.get_runtime_context()).current_actor)


async def outlast(name: str) -> None:
    """Return when the actor ``name`` will not come back."""
    while True:
        try:
            # In a thread, as it blocks for long when Ray's head is away.
            actor: Any = await asyncio.to_thread(lambda: cast("Any", ray).get_actor(name, namespace=NAMESPACE))
            await actor.attend.remote()
        except (ValueError, ActorDiedError):  # a ValueError: there is none of that name
            return
        except RayError as e:
            log.debug("cannot attend to %s: %s", name, e)
        await asyncio.sleep(_RETRY_S)


RemoteReplica: Any = ray.remote(ReplicaActor)
"""Takes the broker's URL, the names of the instance and of the backend, and the replica's own."""
