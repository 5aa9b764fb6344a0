"""The life of a replica: reads its code and configuration from the registry, and reports its state there.

Only its end is requested by a call. So the replica goes on serving if the controller or Ray's head node dies.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from ..broker.errors import BrokerRefused, BrokerUnavailable, PenstockError
from ..broker.queue import stats
from ..broker.registry.record_follower import RecordFollower
from ..broker.registry.records import DEFAULTS, BackendRecord
from ..broker.registry.reports import ReplicaReport
from ..broker.registry.store import Registry
from ..broker.transport import outages
from ..broker.transport.connection import FateUnknown, RedisConnection
from ..broker.transport.url import shown_url
from ..broker.wire.keys import Keys
from ..handles.calls import tracing
from ..handles.errors import BackendNotFound, to_wire
from ..runtime.memory import Memory
from .executing.runner import Runner
from .replica import Replica, connection_of
from .runtime_env import UnpackedRuntimeEnv

log = logging.getLogger(__name__)

_RETRY_S = 0.5
_HEALTH_WAIT_S = 1.0
_STATS_EVERY_S = 1.0


class _OpenRegistry:
    """The registry of an instance over the connection of one replica, and the record of its backend."""

    def __init__(self, url: str, keys: Keys, backend: str, replica: str) -> None:
        self.connection = connection_of(url, replica)
        self.registry = Registry(self.connection, keys)
        self.follower = RecordFollower(self.connection, keys, backend)

    @classmethod
    async def open(cls, url: str, keys: Keys, backend: str, replica: str, serving: Serving) -> _OpenRegistry:
        """Open it, however long the broker is unreachable. The outage is logged once for ``serving``."""
        while True:
            opened = cls(url, keys, backend, replica)
            try:
                await opened.connection.open()
                await opened.follower.start()
            except BrokerUnavailable as e:
                outages.report_began(shown_url(url), serving, f"replica {replica} waits for its broker: {e}")
                await opened.close()
                await asyncio.sleep(_RETRY_S)
            except BaseException:
                await opened.close()
                raise
            else:
                outages.report_ended(shown_url(url), serving)
                return opened

    async def get_code(self, digest: str) -> bytes:
        """Return the code with that digest, however long the broker is unreachable."""
        while True:
            try:
                return await self.registry.get_code(digest)
            except BrokerUnavailable:
                await asyncio.sleep(_RETRY_S)

    async def close(self) -> None:
        self.follower.close()
        await self.connection.close()


class Serving:
    """The life of one replica, from `ready` to `drain`: a plain asyncio class that needs no Ray.

    Args:
        redis_url: the broker's URL.
        instance: the name of the instance.
        backend: the backend's tag.
        replica: the replica's tag.
        node: the id of its Ray node, for its report.
    """

    def __init__(self, redis_url: str, instance: str, backend: str, replica: str, node: str = "") -> None:
        tracing.configure(f"penstock-{backend}")
        self._url, self._instance, self._backend, self._replica = redis_url, instance, backend, replica
        self._keys = Keys(instance)
        self._report = ReplicaReport(backend=backend, node=node, pid=os.getpid(), niceness=os.nice(0))
        self._registry: _OpenRegistry | None = None
        self._runtime_env: UnpackedRuntimeEnv | None = None
        self._runner: Runner | None = None
        self._worker: Replica | None = None
        self._memory = Memory()
        self._starting: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[bool] | None = None
        self._following: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def ready(self) -> None:
        """Return when the replica serves, however long the constructor takes. A second call has the same result.

        Raises:
            BackendNotFound: its backend was deleted.
            BackendError: user code cannot be loaded, constructed or configured.
        """
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start())
        await asyncio.shield(self._starting)

    async def check(self) -> None:
        """Return if the replica is healthy, as far as is known now. If it is idle, return the memory of large bodies.

        A user's ``check_health`` may wait behind a long request, and that is not a failure. So this call waits for it
        only briefly, and its result is that of a later call.

        Raises:
            PenstockError: the replica could not start, or has stopped claiming although requests wait.
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
        await asyncio.wait([checking], timeout=_HEALTH_WAIT_S)
        if checking.done():
            self._checking = None
            try:
                await checking
            except PenstockError as e:
                log.error("replica %s failed its health check: %s", self._replica, e)
                raise
        if not self._worker.in_progress:
            self._memory.give_back()

    async def drain(self, timeout_s: float) -> bool:
        """Stop claiming, finish the claims that have started, and stop serving for good.

        Returns False if some were unfinished after ``timeout_s`` seconds. Other replicas redeliver those.
        """
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end(timeout_s))
        return await asyncio.shield(self._ending)

    async def drain_gracefully(self) -> bool:
        """`drain` with the timeout of the backend's configuration."""
        config = DEFAULTS if self._runner is None else self._runner.config
        return await self.drain(config.graceful_shutdown_timeout_s)

    # -- starting

    async def _start(self) -> None:
        opened = self._registry = await _OpenRegistry.open(self._url, self._keys, self._backend, self._replica, self)
        opened.connection.on_reconnect(self._send_report)  # a broker that lost its data has lost the report too
        try:
            record = opened.follower.record
            if record is None:
                raise BackendNotFound(self._backend, await opened.registry.get_tags())
            self._update_report(version=record.version, initial_config_version=record.config_version)
            code = await opened.get_code(record.code)
            if record.files:
                self._runtime_env = await asyncio.to_thread(UnpackedRuntimeEnv, await opened.get_code(record.files))
                self._runtime_env.enter()
            self._runner = await Runner.start(self._backend, self._replica, code, record.config)
        except PenstockError as e:
            log.error("replica %s cannot start: %s", self._replica, e)
            self._update_report(state="failed", error=to_wire(e))
            raise
        worker = self._worker = await self._start_worker(self._runner, opened)
        self._update_report(state="ready", config_version=record.config_version, capacity=worker.capacity)

        def on_change() -> None:
            if self._following is None or self._following.done():
                self._following = self._spawn(self._follow(opened.follower, worker))

        opened.follower.on_change(on_change)
        on_change()
        self._spawn(self._send_stats_regularly(opened.connection, worker))

    async def _start_worker(self, runner: Runner, opened: _OpenRegistry) -> Replica:
        while True:
            worker = Replica(
                self._url,
                self._instance,
                self._backend,
                self._replica,
                runner,
                commands=opened.connection,
                on_record_changed=opened.follower.read,
            )
            try:
                await worker.start()
            except BrokerUnavailable as e:
                outages.report_began(shown_url(self._url), self, f"replica {self._replica} waits for its broker: {e}")
                await worker.stop()
                await asyncio.sleep(_RETRY_S)
            except BaseException:
                await worker.stop()
                raise
            else:
                outages.report_ended(shown_url(self._url), self)
                return worker

    # -- following the registry

    async def _follow(self, follower: RecordFollower, worker: Replica) -> None:
        """Apply configurations until there is no newer one."""
        while (record := self._newer_record(follower.record)) is not None:
            try:
                await worker.reconfigure(record.config)
            except PenstockError as e:
                log.error("replica %s keeps its configuration: %s", self._replica, e)
                self._update_report(error=to_wire(e), refused=record.config_version)
            else:
                version, capacity = record.config_version, worker.capacity
                self._update_report(config_version=version, error=None, refused=None, capacity=capacity)

    def _newer_record(self, record: BackendRecord | None) -> BackendRecord | None:
        report = self._report
        # A new version of the code has replicas of its own, and its configuration may not fit this version.
        if record is None or record.version != report.version or self._ending is not None:
            return None
        return record if record.config_version > max(report.config_version, report.refused or 0) else None

    def _update_report(self, **changes: Any) -> None:
        """Change the report of this replica in the registry, as soon as the broker can be reached."""
        self._report = replace(self._report, **changes)
        self._spawn(self._send_report())

    async def _send_report(self) -> None:
        while self._registry is not None:
            try:
                return await self._registry.registry.put_report(self._replica, self._report)
            except BrokerUnavailable:
                await asyncio.sleep(_RETRY_S)

    # -- stats

    async def _send_stats_regularly(self, connection: RedisConnection, worker: Replica) -> None:
        while True:
            await asyncio.sleep(_STATS_EVERY_S)
            await self._send_stats(connection, worker)

    async def _send_stats(self, connection: RedisConnection, worker: Replica) -> None:
        """Add the counters since the last call to the stats of the backend."""
        run_stats = worker.take_run_stats()
        if not run_stats:
            return
        try:
            await stats.add_stats(connection, self._keys, self._backend, run_stats)
        except FateUnknown:
            pass  # better not counted than counted twice
        except BrokerUnavailable:
            worker.run_stats.add(run_stats)
        except BrokerRefused as e:
            log.warning("cannot add the stats of replica %s: %s", self._replica, e)

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
        if self._registry is not None:
            self._update_report(state="draining")
        if self._worker is not None:
            finished = await self._worker.drain(timeout_s)
        if self._runner is not None:
            finished = await self._runner.stop(max(0.0, ends_at - loop.time())) and finished
        if self._worker is not None:
            await self._worker.stop()
        for task in self._tasks:
            task.cancel()
        if self._registry is not None:
            if self._worker is not None and self._registry.connection.connected:
                await self._send_stats(self._registry.connection, self._worker)
            await self._registry.close()
        if self._runtime_env is not None:
            await asyncio.to_thread(self._runtime_env.remove)
        return finished
