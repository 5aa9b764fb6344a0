"""Following the registry: a snapshot that is kept up to date by the feed of changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import cast

from ..errors import BrokerUnavailable, PenstockError
from ..transport.connection import BLOCK_MS, RedisConnection
from ..wire.keys import Keys
from .records import Snapshot
from .store import Registry

log = logging.getLogger(__name__)


class Watcher:
    """A snapshot that follows the registry, at most a moment behind it.

    It reads the change feed with a blocking read on a connection of its own, and takes a whole snapshot whenever
    something was appended, after each break of the connection, and every `BLOCK_MS` anyhow, so that it does not matter
    what it missed.
    """

    def __init__(self, url: str, registry: Registry, keys: Keys) -> None:
        self.snapshot = Snapshot()
        self._registry, self._keys = registry, keys
        self._feed = RedisConnection(url, name="penstock-watcher")
        self._feed.on_reconnect(self.refresh)
        self._task: asyncio.Task[None] | None = None
        self._listeners: list[Callable[[Snapshot], None]] = []
        self._changed = asyncio.Event()

    async def start(self) -> None:
        """Take the first snapshot, and follow from there. Raises `BrokerUnavailable`, or `BrokerRefused`."""
        await self._feed.open()
        position = await self._read_position()
        # Whoever may not follow is to know it, rather than to see what was for ever.
        await self._feed.send("XREAD", "COUNT", 1, "STREAMS", self._keys.feed, "$", repeat=True)
        await self.refresh()
        self._task = asyncio.get_running_loop().create_task(self._follow(position), name="registry watcher")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._feed.close()

    def add_listener(self, listener: Callable[[Snapshot], None]) -> None:
        """Call ``listener`` with each new snapshot, in the loop."""
        self._listeners.append(listener)

    async def wait_for(self, version: int, timeout_s: float) -> Snapshot:
        """Return the snapshot once it is at ``version`` or later.

        Raises:
            PenstockError: it was not within ``timeout_s``.
        """

        async def reached() -> Snapshot:
            while self.snapshot.version < version:
                changed = self._changed
                await changed.wait()
            return self.snapshot

        try:
            return await asyncio.wait_for(reached(), timeout_s)
        except asyncio.TimeoutError:
            raise PenstockError(
                f"the registry was not seen at version {version} within {timeout_s:g} s, but at {self.snapshot.version}"
            ) from None

    async def next_change(self, timeout_s: float) -> None:
        """Return when the snapshot changes, or after ``timeout_s`` seconds."""
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except asyncio.TimeoutError:
            pass

    async def _read_position(self) -> bytes:
        last = await self._feed.send("XREVRANGE", self._keys.feed, "+", "-", "COUNT", 1, repeat=True)
        return cast(bytes, last[0][0]) if last else b"0"

    async def _follow(self, position: bytes) -> None:
        while True:
            try:
                await self._feed.send("XREAD", "COUNT", 1, "BLOCK", BLOCK_MS, "STREAMS", self._keys.feed, position)
                # Whatever that said: a feed that began anew can have ids that are not after the last. The place comes
                # before the snapshot, so that nothing falls between them.
                position = await self._read_position()
                await self.refresh()
            except BrokerUnavailable:
                await asyncio.sleep(0.2)  # the connection comes back by itself
            except Exception:  # or nobody would follow any more
                log.exception("cannot read the registry")
                await asyncio.sleep(1.0)

    async def refresh(self) -> None:
        """Look at once, for who knows of a change before it was heard of. Raises `BrokerUnavailable`."""
        fresh = await self._registry.snapshot()
        if fresh == self.snapshot:  # not by the version alone: an instance that was erased begins again
            return
        self.snapshot = fresh
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        for listener in self._listeners:
            try:
                listener(fresh)
            except Exception:
                log.exception("a listener to the registry failed")
