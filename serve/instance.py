"""An instance as its clients change it: each change is written to the registry and awaited.

This is the async core of `Client`. It needs no Ray: what a change comes to, the controller reports in the registry.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Any

from ..broker.errors import ConfigError, PenstockError
from ..broker.queue.load import read_depth
from ..broker.queue.stats import read_stats
from ..broker.registry.records import BackendRecord, Change, Snapshot
from ..broker.registry.store import Registry
from ..broker.transport.connection import RedisConnection
from ..broker.transport.url import shown_url
from ..broker.wire.keys import Keys
from ..handles.calls.shared_client import SharedClient
from ..handles.errors import from_wire
from . import registry_changes
from .settings import Settings
from .status import Status, explained, explained_refusal

_POLL_S = 0.02
_ALIVE_S = 1.0
_GONE_S = 5.0
"""A controller whose lease has lapsed for so long will not come back: Ray restarts one in less."""
_LAST_BREATH_S = 2.0
"""Ray ends what a script has left behind in less."""
_LIVE_S = 30.0
"""A proxy that is well follows the registry within a second; one that has not after this long is not well."""
_STOP_S = 60.0
_LONG_S = 30.0
_STILL_STARTING = (
    "backend %r is still starting after %g s: %d of %d replicas are ready. Their constructors may take long, or others "
    "hold the resources that they wait for; `ray status` tells"
)

log = logging.getLogger(__name__)


class Instance:
    """One instance, for the loop that opened it."""

    def __init__(self, redis_url: str, name: str) -> None:
        self.redis_url, self.name = redis_url, name
        self._keys = Keys(name)
        self._connection = RedisConnection(redis_url, name="penstock-client")
        self.registry = Registry(self._connection, self._keys)

    async def open(self) -> Instance:
        """Connect. Raises `BrokerUnavailable`."""
        await self._connection.open()
        return self

    async def close(self) -> None:
        await self._connection.close()

    async def snapshot(self) -> Snapshot:
        return await self.registry.snapshot()

    # -- owning

    async def take(self, owner: str, ttl_s: float) -> None:
        """Become the owner of the instance, of one whose owner is gone too.

        Raises:
            ConfigError: it has an owner that is alive.
        """
        renewed_since_s, lowest_ms = None, None
        while not await self.registry.own(owner, ttl_s):
            left_ms = int(await self._connection.send("PTTL", self._keys.owner, repeat=True))
            if lowest_ms is None or left_ms <= lowest_ms:
                lowest_ms = left_ms
            else:
                # Somebody renews it. It may be a controller that is about to end, as its script has just been killed.
                now_s = time.monotonic()
                renewed_since_s = renewed_since_s or now_s
                if now_s - renewed_since_s > _LAST_BREATH_S:
                    raise ConfigError(
                        f"the instance {self.name!r} runs already on {shown_url(self.redis_url)}: serve.connect() "
                        "finds it; its shutdown(), or `penstock shutdown`, ends it; another name (instance=..., "
                        "--instance) starts one beside it"
                    )
            await asyncio.sleep(_POLL_S)

    async def has_owner(self) -> bool:
        return bool(await self._connection.send("EXISTS", self._keys.owner, repeat=True))

    async def end(self, *, erase: bool) -> None:
        """Have the controller end every process of the instance, and erase its keys, or keep what can be resumed.

        Raises:
            PenstockError: the controller did not do so in time.
        """
        settings = await Settings.read(self.registry)
        if settings is not None and not settings.stopped and await self.has_owner():
            await replace(settings, stopping="erase" if erase else "keep").write(self.registry)
            await self._until(self._has_stopped, f"instance {self.name!r} did not end", _STOP_S)
        # What the handles of this process share, so that they do not look for a broker that may end now.
        if (caller := SharedClient.find(self.redis_url, self.name)) is not None:
            await caller.close()
        if erase:
            await self.registry.erase()

    async def _has_stopped(self) -> bool:
        settings = await Settings.read(self.registry)
        return settings is None or settings.stopped or not await self.has_owner()

    # -- backends

    async def add_backend(self, record: BackendRecord, code: bytes, files: bytes = b"") -> None:
        # Before the code is sent, which can be large.
        registry_changes.add_backend(await self.snapshot(), record)
        record = replace(record, **await self._store(code=code, files=files))
        try:
            await self.registry.change(lambda seen: registry_changes.add_backend(seen, record))
            await self._come_about(record)
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
        """Change a backend; what it was serves on if what it is to be cannot. Code and files that are None stay."""
        registry_changes.update_backend(await self.snapshot(), tag, update)
        stored = await self._store(code=code, files=files)
        before: BackendRecord | None = None
        record: BackendRecord | None = None

        def decide(seen: Snapshot) -> Change:
            nonlocal before, record
            change = registry_changes.update_backend(seen, tag, lambda old: replace(update(old), **stored))
            before, record = seen.backends[tag], change.backends.get(tag)
            return change

        try:
            await self.registry.change(decide)
            if record is None:
                return  # it was like this already
            await self._come_about(record)
        except BaseException:
            if record is not None:
                await self._undo(record, before)
            else:
                await self._delete(stored.values())
            raise
        if before is not None:
            await self._delete(before.stored - record.stored)

    async def remove_backend(self, tag: str, *, drain: bool) -> None:
        seen = await self.snapshot()
        registry_changes.remove_backend(seen, tag)
        record = seen.backends[tag]
        if drain:
            grace_s = record.config.graceful_shutdown_timeout_s
            await self._until(lambda: self._is_idle(tag), "", grace_s, late_is_fine=True)
        await self.registry.change(lambda seen: registry_changes.remove_backend(seen, tag))
        await self._delete(record.stored)
        await self._gone(tag)

    async def _store(self, **blobs: bytes | None) -> dict[str, Any]:
        """Store code and files, all or none of them; return the digests of those that are not None, empty for empty."""
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

    async def _come_about(self, record: BackendRecord) -> None:
        """Return when ``record`` serves, however long its replicas take to start.

        Raises:
            BackendError: a replica could not start.
            ConfigError: the cluster does not have what it asks for.
            PenstockError: somebody else changed it meanwhile.
        """
        started_s, patient = time.monotonic(), True

        async def has_come_about() -> bool:
            nonlocal patient
            status = (await self.registry.reports("backends")).get(record.tag, {})
            if (status.get("version"), status.get("config_version")) == (record.version, record.config_version):
                if status["came_about"]:
                    return True
                if status["failing"]:
                    raise from_wire(status["failing"])
                if status["lacking"]:
                    raise ConfigError(f"backend {record.tag!r}: {status['lacking']}")
            elif (await self.snapshot()).backends.get(record.tag) != record:
                raise PenstockError(f"the backend {record.tag!r} was changed or deleted by somebody else meanwhile")
            if patient and time.monotonic() - started_s > _LONG_S:
                patient = False
                log.warning(_STILL_STARTING, record.tag, _LONG_S, status.get("ready", 0), status.get("wanted", 0))
            return False

        await self._until(has_come_about, f"backend {record.tag!r} did not come about")

    async def _undo(self, failed: BackendRecord, before: BackendRecord | None) -> None:
        """Take ``failed`` back; return when what was started for it has ended."""
        undone: BackendRecord | None = None

        def decide(seen: Snapshot) -> Change:
            nonlocal undone
            change = registry_changes.undo_backend(seen, failed, before)
            undone = change.backends.get(failed.tag)
            return change

        await self.registry.change(decide)
        await self._delete(failed.stored - (before.stored if before is not None else frozenset()))
        if before is None:
            await self._gone(failed.tag)
        elif undone is not None:
            await self._left_alone(failed, undone)

    async def _left_alone(self, failed: BackendRecord, undone: BackendRecord) -> None:
        """Return when no replica is left of what ``failed`` asked for, or was changed again by somebody else."""

        async def is_so() -> bool:
            status = (await self.registry.reports("backends")).get(failed.tag)
            if status is None:
                return failed.tag not in (await self.snapshot()).backends
            reports = (await self.registry.reports("replicas")).values()
            left = sum((said["backend"], said.get("version")) == (failed.tag, failed.version) for said in reports)
            # Of a refused configuration, the replicas of the one before are of the same version.
            allowed = status["wanted"] if failed.version == undone.version else 0
            return status["config_version"] >= undone.config_version and left <= allowed

        await self._until(is_so, f"what {failed.tag!r} was to be did not end", _STOP_S, late_is_fine=True)

    async def _gone(self, tag: str) -> None:
        async def is_gone() -> bool:
            return tag not in await self.registry.reports("backends") or tag in (await self.snapshot()).backends

        await self._until(is_gone, f"the replicas of {tag!r} did not end", _STOP_S)

    async def _is_idle(self, tag: str) -> bool:
        return await self.queued(tag) == 0

    async def queued(self, tag: str) -> int:
        """Return how many requests of a backend are unsettled: waiting or running."""
        return (await read_depth(self._connection, self._keys, tag)).unsettled

    async def status(self) -> Status:
        return Status(
            backends={
                tag: await self._status(tag, said) for tag, said in (await self.registry.reports("backends")).items()
            },
            proxies=await self.registry.reports("proxies"),
            controller=await self._controller(),
        )

    async def _controller(self) -> str:
        if not await self.has_owner():
            return "away"
        said = (await self.registry.reports("controllers")).get("controller")
        return "alive" if said is None else f"waiting for {said['waits_for']}"

    async def _status(self, tag: str, said: dict[str, Any]) -> dict[str, Any]:
        backend_stats = await read_stats(self._connection, self._keys, tag)
        answered = backend_stats.served + backend_stats.failed
        return {
            **said,
            "failing": explained(said.get("failing")),
            "refused": explained_refusal(said.get("refused")),
            "queued": backend_stats.queued,
            "in_progress": backend_stats.in_progress,
            "queued_bytes": backend_stats.queued_bytes,
            "dead_letters": backend_stats.dead_letters,
            "dead_letters_dropped": backend_stats.dead_letters_dropped,
            "served": backend_stats.served,
            "failed": backend_stats.failed,
            "mean_run_ms": round(1000 * backend_stats.run_s / answered, 3) if answered else 0.0,
        }

    # -- endpoints

    async def change(self, decide: Callable[[Snapshot], Change]) -> None:
        """Make a change that is live at every proxy, and for the handles of this process, when this returns."""
        version = await self.registry.change(decide)
        async with SharedClient.using(self.redis_url, self.name) as caller:
            await caller.watcher.wait_for(version, _LIVE_S)

        async def is_live() -> bool:
            proxies = (await self.registry.reports("proxies")).items()
            late = [name for name, proxy in proxies if proxy.get("url") and proxy.get("version", 0) < version]
            return not any([await self._lives(name) for name in late])

        await self._until(is_live, "a proxy did not take the change over", _LIVE_S)

    async def _lives(self, proxy: str) -> bool:
        """Tell it by its lease: when a whole node dies, Ray may take half a minute to say so."""
        return bool(await self._connection.send("EXISTS", self._keys.proxy_alive(proxy), repeat=True))

    async def http_url(self) -> str | None:
        """Return where HTTP is served, best on the node that started the instance; ``None`` without a server."""
        settings = await Settings.read(self.registry)
        proxies = (await self.registry.reports("proxies")).items()
        urls = [
            (settings is None or proxy.get("node") != settings.node, name, proxy["url"])
            for name, proxy in proxies
            if proxy.get("url")
        ]
        return min(urls)[2] if urls else None

    # -- waiting

    async def _until(
        self,
        condition: Callable[[], Awaitable[bool]],
        complaint: str,
        timeout_s: float | None = None,
        *,
        late_is_fine: bool = False,
    ) -> None:
        """Return once ``condition`` holds.

        Raises:
            PenstockError: it did not within ``timeout_s``, or there is no controller any more to bring it about.
        """
        started_s = asked_s = seen_s = time.monotonic()
        while not await condition():
            now_s = time.monotonic()
            if timeout_s is not None and now_s - started_s > timeout_s:
                if late_is_fine:
                    return
                raise PenstockError(f"{complaint} within {timeout_s:g} s")
            if now_s - asked_s > _ALIVE_S:
                asked_s = now_s
                if await self.has_owner():
                    seen_s = now_s
                elif now_s - seen_s > _GONE_S:
                    raise PenstockError(
                        f"{complaint}: the instance {self.name!r} has lost its controller; serve.start resumes it"
                    )
            await asyncio.sleep(_POLL_S)
