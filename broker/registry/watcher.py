"""Watcher of the registry: a snapshot that follows the feed of changes.

A change reaches the snapshot within moments; if an entry of the feed is missed, after `BLOCK_MS` at the latest.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ..errors import BrokerUnavailable, PenstockError
from ..transport.connection import RedisConnection
from ..transport.session import BLOCK_MS
from ..wire.keys import Keys
from .records import Snapshot
from .store import Registry

log = logging.getLogger(__name__)


class Watcher:
    """Keeps ``snapshot`` up to date with the registry.

    Reads the feed with a blocking read on a connection of its own. It takes a snapshot whenever the feed has a new
    entry, after each reconnect, and at least every `BLOCK_MS`, so that a missed entry does no harm.
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
        """Take the first snapshot, and follow the feed in the background.

        Raises:
            BrokerUnavailable: the broker cannot be reached.
            BrokerRefused: the broker answered with an error, such as a missing permission.
        """
        await self._feed.open()
        # A user without the permission to read the feed must fail here, and not keep an old snapshot for ever.
        await self._feed.send("XREAD", "COUNT", 1, "STREAMS", self._keys.feed, "$", repeat=True)
        await self.refresh()
        self._task = asyncio.get_running_loop().create_task(self._follow(), name="registry watcher")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._feed.close()

    def add_listener(self, listener: Callable[[Snapshot], None]) -> None:
        """Call ``listener`` with each new snapshot, on the event loop. Exceptions of a listener are logged."""
        self._listeners.append(listener)

    async def wait_for(self, version: int, timeout_s: float) -> Snapshot:
        """Return the snapshot once it is at ``version`` or later.

        Raises:
            PenstockError: the snapshot did not reach ``version`` within ``timeout_s`` seconds.
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

    async def _follow(self) -> None:
        while True:
            try:
                # Not the id that the last read returned: a feed that was created again can have lower ones.
                position = self.snapshot.place.entry or b"0"
                await self._feed.send("XREAD", "COUNT", 1, "BLOCK", BLOCK_MS, "STREAMS", self._keys.feed, position)
                await self.refresh()
            except BrokerUnavailable:
                await asyncio.sleep(0.2)  # the connection reconnects by itself
            except Exception:  # the task must go on, or the snapshot would stay as it is
                log.exception("cannot read the registry")
                await asyncio.sleep(1.0)

    async def refresh(self) -> None:
        """Take a snapshot now, without waiting for the feed, and call the listeners if it has changed.

        Raises:
            BrokerUnavailable: the broker cannot be reached.
        """
        fresh = await self._registry.snapshot()
        last, self.snapshot = self.snapshot, fresh
        if fresh == last:
            return
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        for listener in self._listeners:
            try:
                listener(fresh)
            except Exception:
                log.exception("a listener of the registry watcher failed")
