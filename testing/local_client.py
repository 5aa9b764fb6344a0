"""The callers of a backend in memory: the request client that handles and proxies use, without Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ..broker.queue.flow_control import CREDIT
from ..broker.queue.publisher import Published, Publisher, QueueFull
from ..broker.queue.queued_bytes import NO_LIMIT
from ..broker.queue.reply_stream import ReplyStream
from ..broker.registry.records import Snapshot
from ..broker.registry.store import Registry
from ..broker.registry.watcher import Watcher
from ..broker.transport.connection import RedisConnection
from ..broker.wire.keys import Keys
from ..broker.wire.requests import RawEntry
from ..handles.calls.request_client import Links
from .local_connection import LocalConnection
from .local_queue import LocalQueue


def local_links(url: str, keys: Keys, snapshot: Snapshot, queue: LocalQueue) -> Links:
    """Return the links of a new request client of the running loop."""
    connection = LocalConnection(url, queue)

    def open_reply_stream(
        commands: RedisConnection,
        keys: Keys,
        caller: str,
        on_reply: Callable[[list[bytes]], None],
        on_loss: Callable[[], Awaitable[None]],
    ) -> ReplyStream:
        return LocalReplyStream(queue, commands, keys, caller, on_reply, on_loss)

    def send_credit(call: str, read_bytes: int) -> None:
        queue.on_signal(b"%b%b %d" % (CREDIT, call.encode(), read_bytes))

    return Links(
        connection,
        LocalWatcher(url, Registry(connection, keys), keys, snapshot),
        LocalPublisher(connection, keys, queue),
        open_reply_stream,
        send_credit,
    )


class LocalWatcher(Watcher):
    """A snapshot that does not change."""

    def __init__(self, url: str, registry: Registry, keys: Keys, snapshot: Snapshot) -> None:
        super().__init__(url, registry, keys)
        self.snapshot = snapshot

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def refresh(self) -> None:
        pass


class LocalReplyStream(ReplyStream):
    """Receives the replies to one caller, on its loop."""

    def __init__(
        self,
        queue: LocalQueue,
        commands: RedisConnection,
        keys: Keys,
        caller: str,
        on_reply: Callable[[list[bytes]], None],
        on_loss: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(commands, keys, caller, on_reply, on_loss)
        self._queue, self._caller, self._pass_on = queue, caller, on_reply
        self._loop = asyncio.get_running_loop()

    async def open(self) -> None:
        self._queue.listen(self._caller, self._receive)

    async def close(self) -> None:
        self._queue.leave(self._caller)

    async def drain(self) -> None:
        pass

    def trim(self) -> None:
        pass

    def _receive(self, fields: list[bytes]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._pass_on, fields)
        except RuntimeError:  # the loop of the caller is closed
            self._queue.leave(self._caller)


class LocalPublisher(Publisher):
    """Publishes to the queue."""

    def __init__(self, connection: RedisConnection, keys: Keys, queue: LocalQueue) -> None:
        super().__init__(connection, keys)
        self._queue = queue
        self._loop = asyncio.get_running_loop()

    def publish(
        self,
        backend: str,
        entry: RawEntry,
        limit: int,
        then: Callable[[Published], None],
        *,
        batch: bool = False,
        limit_bytes: int = NO_LIMIT,
    ) -> None:
        # At the end of the loop tick, as with Redis: the caller may withdraw it before.
        self._loop.call_soon(lambda: then(self._queue.publish(entry, limit, limit_bytes)))

    def reserve(
        self,
        backend: str,
        entry: RawEntry,
        limit: int,
        then: Callable[[QueueFull | Exception | None], None],
        *,
        batch: bool = False,
        limit_bytes: int = NO_LIMIT,
    ) -> None:
        self._loop.call_soon(then, None)  # `publish` decides, as nothing is sent before

    def forget_reservation(self, backend: str, entry: RawEntry) -> None:
        pass

    def withdraw(self, backend: str, entry: bytes, *, batch: bool = False) -> None:
        self._queue.withdraw(entry)
