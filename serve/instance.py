"""The asyncio core of `Client`: writes changes to the registry, and waits until the controller has carried them out.

It needs no Ray, because the controller reports the outcome of each change in the registry.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Any

from ..broker.errors import ConfigError, PenstockError
from ..broker.queue.counts.queue_depth import read_depth
from ..broker.registry.records import BackendRecord, Change, Snapshot
from ..broker.registry.reports import BackendStatus, ProxyReport, ReplicaReport
from ..broker.registry.store import Registry
from ..broker.transport.connection import RedisConnection
from ..broker.transport.url import shown_url
from ..broker.wire.keys import Keys
from ..handles.calls.shared_client import SharedClient
from . import registry_changes
from .rollout_wait import RolloutWait
from .settings import Settings
from .status.reader import StatusReader
from .status.status import Status

_POLL_S = 0.02
_CHECK_OWNER_EVERY_S = 1.0
CONTROLLER_LOST_S = 15.0
"""A controller whose ownership expired this long ago will not return: Ray restarts one in 7 s on a busy machine."""

_SCRIPT_END_S = 2.0
"""After the death of a script, Ray ends its controller within this time."""

_LIVE_S = 30.0
"""A healthy proxy follows the registry within a second; one that has not followed after this time is not healthy."""

_END_S = 60.0


class AlreadyRunning(ConfigError):
    """The instance has an owner that is alive, so it cannot be started again."""


class Instance:
    """One instance, used on the event loop that opened it."""

    def __init__(self, redis_url: str, name: str) -> None:
        self.redis_url, self.name = redis_url, name
        self._keys = Keys(name)
        self._connection = RedisConnection(redis_url, name="penstock-client")
        self.registry = Registry(self._connection, self._keys)
        self._status = StatusReader(self._connection, self._keys)

    async def open(self) -> Instance:
        """Connect and return self. Raises `BrokerUnavailable`."""
        await self._connection.open()
        return self

    async def close(self) -> None:
        await self._connection.close()

    async def snapshot(self) -> Snapshot:
        return await self.registry.snapshot()

    # -- ownership

    async def acquire(self, owner: str, ttl_s: float) -> None:
        """Acquire the ownership of the instance for ``ttl_s`` seconds; also if the previous owner has died.

        Raises:
            AlreadyRunning: the instance has an owner that is alive.
        """
        renewed_since_s, lowest_ms = None, None
        while not await self.registry.own(owner, ttl_s):
            left_ms = int(await self._connection.send("PTTL", self._keys.owner, repeat=True))
            if lowest_ms is None or left_ms <= lowest_ms:
                lowest_ms = left_ms
            else:
                # The owner renews it. It may be a controller that is about to end because its script was killed.
                now_s = time.monotonic()
                renewed_since_s = renewed_since_s or now_s
                if now_s - renewed_since_s > _SCRIPT_END_S:
                    raise AlreadyRunning(
                        f"the instance {self.name!r} is already running on {shown_url(self.redis_url)}: "
                        "serve.connect() connects to it; client.shutdown() or `penstock shutdown` ends it; another "
                        "name (instance=..., --instance) starts one beside it"
                    )
            await asyncio.sleep(_POLL_S)

    async def has_owner(self) -> bool:
        return await self._status.has_owner()

    async def end(self, *, erase: bool) -> None:
        """End every process of the instance by its controller; then erase its keys, or keep those to resume from.

        Raises:
            PenstockError: the controller did not end in time.
        """
        settings = await Settings.read(self.registry)
        if settings is not None and not settings.stopped and await self.has_owner():
            await replace(settings, stopping="erase" if erase else "keep").write(self.registry)
            await self.registry.wake_watchers()
            await self._wait_until(self.has_stopped, f"instance {self.name!r} did not end", _END_S)
        # The client that the handles of this process share would try to reconnect to a broker that may end now.
        if (caller := SharedClient.find(self.redis_url, self.name)) is not None:
            await caller.close()
        if erase:
            await self.registry.erase()

    async def has_stopped(self) -> bool:
        """Return whether the instance was shut down or has lost its controller."""
        settings = await Settings.read(self.registry)
        return settings is None or settings.stopped or not await self.has_owner()

    # -- backends

    async def add_backend(self, record: BackendRecord, code: bytes, files: bytes = b"") -> None:
        # Checked before the code is sent, which can be large.
        registry_changes.add_backend(await self.snapshot(), record)
        record = replace(record, **await self._store(code=code, files=files))
        try:
            await self.registry.change(lambda snapshot: registry_changes.add_backend(snapshot, record))
            await self._wait_for_rollout(record)
        except BaseException:
            await self._undo(record, None)
            raise

    async def update_backend(
        self,
        tag: str,
        update: Callable[[BackendRecord], BackendRecord],
        *,
        code: bytes | None = None,
        files: bytes | None = None,
    ) -> None:
        """Change a backend, and undo the change if it cannot be rolled out.

        Args:
            tag: the backend.
            update: returns the new record for the current one; must be pure.
            code: the new code; None keeps the present one.
            files: the new directories of ``runtime_env``; None keeps the present ones.

        Raises:
            BackendNotFound: there is no such backend.
            BackendError: a replica could not start, or did not apply the configuration.
            ConfigError: the cluster does not have the resources.
        """
        registry_changes.update_backend(await self.snapshot(), tag, update)
        stored = await self._store(code=code, files=files)
        before: BackendRecord | None = None
        record: BackendRecord | None = None

        def decide(snapshot: Snapshot) -> Change:
            nonlocal before, record
            change = registry_changes.update_backend(snapshot, tag, lambda old: replace(update(old), **stored))
            before, record = snapshot.backends[tag], change.backends.get(tag)
            return change

        try:
            await self.registry.change(decide)
            if record is None:
                return  # The backend was like this already.
            await self._wait_for_rollout(record)
        except BaseException:
            if record is not None:
                await self._undo(record, before)
            else:
                await self._delete(stored.values())
            raise
        if before is not None:
            await self._delete(before.stored - record.stored)

    async def remove_backend(self, tag: str, *, drain: bool) -> None:
        """Delete a backend; with ``drain`` wait first until its queue is empty, for at most its grace period.

        Raises:
            BackendNotFound: there is no such backend.
            ConfigError: an endpoint uses it.
        """
        snapshot = await self.snapshot()
        registry_changes.remove_backend(snapshot, tag)
        record = snapshot.backends[tag]
        if drain:
            grace_s = record.config.graceful_shutdown_timeout_s
            await self._wait_until(lambda: self._is_idle(tag), "", grace_s, raise_on_timeout=False)
        await self.registry.change(lambda snapshot: registry_changes.remove_backend(snapshot, tag))
        await self._delete(record.stored)
        await self._wait_until_purged(tag)

    async def _store(self, **blobs: bytes | None) -> dict[str, Any]:
        """Store code and files, all or none. Return the digest of each that is not None; of an empty one, ``""``."""
        stored: dict[str, Any] = {}
        try:
            for name, blob in blobs.items():
                if blob is not None:
                    stored[name] = await self.registry.put_code(blob) if blob else ""
        except BaseException:
            await self._delete(stored.values())
            raise
        return stored

    async def _delete(self, digests: Iterable[str]) -> None:
        for digest in filter(None, digests):
            await self.registry.delete_code(digest)

    async def _wait_for_rollout(self, record: BackendRecord) -> None:
        """Return when ``record`` is rolled out, however long its replicas take to start.

        Raises:
            BackendError: a replica could not start, or did not apply the configuration.
            ConfigError: the cluster does not have the resources.
            PenstockError: another client changed the backend meanwhile.
        """
        wait = RolloutWait(record, time.monotonic())

        async def is_rolled_out() -> bool:
            status = await self._status_of(record.tag)
            of_record = (record.version, record.config_version)
            if status is None or (status.version, status.config_version) != of_record:
                if (await self.snapshot()).backends.get(record.tag) != record:
                    raise PenstockError(f"another client changed or deleted the backend {record.tag!r} meanwhile")
                status = None
            return wait.is_over(status, time.monotonic())

        await self._wait_until(is_rolled_out, f"backend {record.tag!r} was not rolled out")

    async def _status_of(self, tag: str) -> BackendStatus | None:
        return (await self.registry.get_reports(BackendStatus)).get(tag)

    async def _undo(self, failed: BackendRecord, before: BackendRecord | None) -> None:
        """Replace ``failed`` by ``before``, or delete it; return when the replicas started for it have ended."""
        undone: BackendRecord | None = None

        def decide(snapshot: Snapshot) -> Change:
            nonlocal undone
            change = registry_changes.undo_backend(snapshot, failed, before)
            undone = change.backends.get(failed.tag)
            return change

        await self.registry.change(decide)
        await self._delete(failed.stored - (before.stored if before is not None else frozenset()))
        if before is None:
            await self._wait_until_purged(failed.tag)
        elif undone is not None:
            await self._wait_until_undone(failed, undone)

    async def _wait_until_undone(self, failed: BackendRecord, undone: BackendRecord) -> None:
        """Return when the replicas that were started for ``failed`` have ended, or the backend was deleted."""

        async def is_undone() -> bool:
            status = await self._status_of(failed.tag)
            if status is None:
                return failed.tag not in (await self.snapshot()).backends
            reports = (await self.registry.get_reports(ReplicaReport)).values()
            left = sum((report.backend, report.version) == (failed.tag, failed.version) for report in reports)
            # After a change of the configuration alone, the replicas that stay have the same version.
            allowed = status.wanted if failed.version == undone.version else 0
            return status.config_version >= undone.config_version and left <= allowed

        complaint = f"the replicas that were started for the refused change of {failed.tag!r} did not end"
        await self._wait_until(is_undone, complaint, _END_S, raise_on_timeout=False)

    async def _wait_until_purged(self, tag: str) -> None:
        """Return when a deleted backend has neither replicas nor keys, or was created again."""

        async def is_purged() -> bool:
            return await self._status_of(tag) is None or tag in (await self.snapshot()).backends

        await self._wait_until(is_purged, f"the replicas of {tag!r} did not end", _END_S)

    async def _is_idle(self, tag: str) -> bool:
        return await self.queued(tag) == 0

    async def queued(self, tag: str) -> int:
        """Return the number of unsettled requests of a backend, waiting and running."""
        return (await read_depth(self._connection, self._keys, tag)).unsettled

    async def status(self) -> Status:
        return await self._status.read()

    # -- endpoints

    async def change(self, decide: Callable[[Snapshot], Change]) -> None:
        """Change the registry; return when every proxy and the handles of this process apply the change.

        Args:
            decide: see `Registry.change`.

        Raises:
            PenstockError: a proxy did not apply it in time. The change is made all the same.
        """
        version = await self.registry.change(decide)
        async with SharedClient.using(self.redis_url, self.name) as caller:
            await caller.watcher.wait_for(version, _LIVE_S)

        async def is_live() -> bool:
            proxies = (await self.registry.get_reports(ProxyReport)).items()
            late = [name for name, proxy in proxies if proxy.url and proxy.version < version]
            return not any([await self._is_alive(name) for name in late])

        await self._wait_until(is_live, "a proxy did not apply the change", _LIVE_S)

    async def _is_alive(self, proxy: str) -> bool:
        """Return whether a proxy holds its lease. When a node dies, Ray may need half a minute to notice."""
        return bool(await self._connection.send("EXISTS", self._keys.proxy_alive(proxy), repeat=True))

    async def http_url(self) -> str | None:
        """Return the URL of a proxy, preferably on the node that started the instance; None without proxies."""
        settings = await Settings.read(self.registry)
        proxies = (await self.registry.get_reports(ProxyReport)).items()
        urls = [
            (settings is None or proxy.node != settings.node, name, proxy.url) for name, proxy in proxies if proxy.url
        ]
        return min(urls)[2] if urls else None

    # -- waiting

    async def _wait_until(
        self,
        condition: Callable[[], Awaitable[bool]],
        complaint: str,
        timeout_s: float | None = None,
        *,
        raise_on_timeout: bool = True,
    ) -> None:
        """Return once ``condition`` holds, or after ``timeout_s`` unless ``raise_on_timeout``.

        Raises:
            PenstockError: ``complaint``: it did not hold in time, or the instance has lost its controller.
        """
        started_s = checked_s = owned_s = time.monotonic()
        while not await condition():
            now_s = time.monotonic()
            if timeout_s is not None and now_s - started_s > timeout_s:
                if not raise_on_timeout:
                    return
                raise PenstockError(f"{complaint} within {timeout_s:g} s")
            if now_s - checked_s > _CHECK_OWNER_EVERY_S:
                checked_s = now_s
                if await self.has_owner():
                    owned_s = now_s
                elif now_s - owned_s > CONTROLLER_LOST_S:
                    raise PenstockError(
                        f"{complaint}: the instance {self.name!r} has lost its controller; serve.start resumes it"
                    )
            await asyncio.sleep(_POLL_S)
