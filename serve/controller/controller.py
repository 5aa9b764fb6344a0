"""The controller: reconciles an instance pass by pass until it is shut down, and keeps a backup of its registry.

Its memory can be lost without harm. The desired state is in the registry and running actors report themselves; so a
controller that was killed is restarted by Ray, adopts the actors that run, and continues.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from ...broker.errors import BrokerUnavailable, PenstockError
from ...broker.queue.purge import purge_backend
from ...broker.registry.records import Snapshot
from ...broker.registry.store import Registry
from ...broker.registry.watcher import Watcher
from ...broker.transport import outages
from ...broker.transport.connection import RedisConnection
from ...broker.transport.url import shown_url
from ...broker.wire.keys import Keys
from ...handles.errors import to_wire
from ..settings import LEASE_S, ProcessArguments, Settings
from .actors import ActorPool
from .reconciler import Reconciler
from .registry_backup import RegistryBackup

log = logging.getLogger(__name__)

_PASS_S = 0.5
"""Longest pause between two passes; changes and events of actors start one at once."""

_FORGET_JOBS_EVERY_S = 60.0


class Controller:
    """The controller of one instance, connected to its broker. `connect` makes one.

    A plain asyncio class. It needs a process that is connected to Ray.
    """

    def __init__(
        self,
        shown_url: str,
        connection: RedisConnection,
        registry: Registry,
        keys: Keys,
        watcher: Watcher,
        reconciler: Reconciler,
        wake: asyncio.Event,
        node: str,
        leave: Callable[[], None],
    ) -> None:
        self._node, self._leave = node, leave
        self._shown_url = shown_url
        self._connection, self._registry, self._keys = connection, registry, keys
        self._reconciler = reconciler
        self._wake = wake
        self._backup = RegistryBackup()
        self._reading = asyncio.Lock()
        """Held during a read, so that an older backup cannot replace a newer one."""
        self._backup_tasks: set[asyncio.Task[None]] = set()
        self._forget_jobs_at_s = 0.0
        watcher.add_listener(self._on_change)
        connection.on_reconnect(self._on_reconnect)

    @classmethod
    async def connect(
        cls,
        arguments: ProcessArguments,
        *,
        node: str,
        leave: Callable[[], None],
    ) -> Controller:
        """Return the controller of an instance; wait for the broker while it cannot be reached.

        Args:
            arguments: the instance, its broker, and its variables.
            node: the id of the Ray node on which it runs.
            leave: restarts the controller, on another node, when its own one drains.

        Raises:
            PenstockError: there is no such instance.
        """
        instance, redis_url = arguments.instance, arguments.redis_url
        keys, wake = Keys(instance), asyncio.Event()
        while True:
            connection = RedisConnection(redis_url, name="penstock-controller")
            registry = Registry(connection, keys)
            watcher = Watcher(redis_url, registry, keys)
            try:
                await connection.open()
                await watcher.start()
                settings = await Settings.read(registry)
                if settings is None:
                    raise PenstockError(f"there is no instance {instance!r} on {shown_url(redis_url)}")
                reconciler = Reconciler(
                    connection,
                    registry,
                    keys,
                    ActorPool(instance, "replica", wake.set),
                    ActorPool(instance, "proxy", wake.set),
                    http=await settings.proxy_options(registry),
                    arguments=arguments,
                )
                await reconciler.restore()
            except BrokerUnavailable as e:
                outages.report_began(shown_url(redis_url), wake, f"the controller waits for its broker: {e}")
                await watcher.close()
                await connection.close()
                await asyncio.sleep(_PASS_S)
            else:
                outages.report_ended(shown_url(redis_url), wake)
                return cls(shown_url(redis_url), connection, registry, keys, watcher, reconciler, wake, node, leave)

    async def run(self) -> None:
        """Reconcile until the instance is shut down or has another owner."""
        last_error = ""
        while True:
            self._wake.clear()
            try:
                settings, snapshot = await self._read()
                if settings is None:
                    await self._backup.restore(self._registry)
                    continue
                if settings.stopping:
                    await self._shut_down(settings)
                    return
                if not await self._registry.own(settings.owner, LEASE_S):
                    log.error("instance %r has another owner: ending its actors in this cluster", self._keys.instance)
                    await self._reconciler.end_actors()
                    return
                await self._reconciler.run_pass(settings, snapshot)
                await self._forget_jobs()
                if self._reconciler.can_leave(self._node):
                    log.info("the controller leaves node %s, which drains", self._node)
                    self._leave()
                outages.report_ended(self._shown_url, self)
            except BrokerUnavailable as e:
                outages.report_began(self._shown_url, self, f"the controller waits for its broker: {e}")
            except Exception as e:
                if repr(e) != last_error:
                    log.exception("a pass of the controller failed; it is tried again every %g s", _PASS_S)
                last_error = repr(e)
            await self._pause()

    async def http_ready(self) -> None:
        """Return when every desired proxy serves.

        Raises:
            PenstockError: a proxy failed.
        """
        await self._reconciler.http_ready()

    async def _on_reconnect(self) -> None:
        self._wake.set()

    def _on_change(self, _: Snapshot) -> None:
        self._wake.set()
        # At once, because the running pass may take long: a change whose call has returned must be in the backup.
        task = asyncio.get_running_loop().create_task(self._back_up())
        self._backup_tasks.add(task)
        task.add_done_callback(self._backup_tasks.discard)

    async def _back_up(self) -> None:
        with suppress(PenstockError):  # The next pass meets the same error and logs it.
            await self._read()

    async def _read(self) -> tuple[Settings | None, Snapshot]:
        """Read the desired state and back it up. Settings of None mean that the broker has lost its data."""
        async with self._reading:
            # In this order: if there are settings, the snapshot that was read before them is complete, even if the
            # broker loses its data at this moment. The watcher's snapshot might be from just after that.
            snapshot = await self._registry.snapshot()
            settings = await Settings.read(self._registry)
            if settings is not None and not settings.stopping:
                await self._backup.keep(self._registry, settings, snapshot)
            return settings, snapshot

    async def _forget_jobs(self) -> None:
        """Delete the reports of expired jobs now and then, as no process of theirs is left to do so."""
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._forget_jobs_at_s:
            self._forget_jobs_at_s = now_s + _FORGET_JOBS_EVERY_S
            await self._registry.forget_jobs()

    async def _pause(self) -> None:
        waking = asyncio.ensure_future(self._wake.wait())
        await asyncio.wait([waking], timeout=_PASS_S)
        waking.cancel()

    async def _shut_down(self, settings: Settings) -> None:
        """End every actor, then erase the instance's keys, or leave them in a state that can be resumed."""
        await self._reconciler.end_actors()
        if settings.stopping == "erase":
            error = PenstockError(f"the instance {self._keys.instance!r} was shut down")
            for tag in (await self._registry.snapshot()).backends:
                await purge_backend(self._connection, self._keys, tag, 503, to_wire(error))
            await self._registry.erase()
            return
        await self._reconciler.delete_reports()
        await replace(settings, stopping="", stopped=True).write(self._registry)
        await self._registry.disown(settings.owner)
