"""Shared request clients: one for each event loop and instance, closed when its last user has left.

All handles of a loop share a client. It stays open between calls; `SharedClient.leave` closes it once nothing needs it
any more: no user, no call in flight, and no call that still waits for its connection or its endpoint (`starting`).
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager

from .request_client import Links, RequestClient
from .tracing import configure


class SharedClient(RequestClient):
    """A request client that the handles, connections and batches of one event loop share. Get one by `get`."""

    def __init__(self, url: str, instance: str, links: Links | None = None) -> None:
        super().__init__(url, instance, links=links)
        configure("penstock-caller")
        self._users = 0
        self._was_left = False
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def get(cls, url: str, instance: str) -> SharedClient:
        """Return the open client of the running loop and this instance. Connects if there is none.

        Raises:
            BrokerUnavailable: Redis cannot be reached.
            BrokerRefused: Redis answered with an error, such as a missing permission.
            ConfigError: ``url`` is not a Redis URL, or ``instance`` is not a name.
        """
        while True:
            client = cls.find(url, instance)
            if client is None:
                make_links = _links.get((url, instance))
                client = cls(url, instance, None if make_links is None else make_links())
                _clients.setdefault(asyncio.get_running_loop(), {})[url, instance] = client
            if not client.is_open:
                await client.open()
            if not client.closed:  # closed here: its last user left while this call waited
                return client

    @classmethod
    def find(cls, url: str, instance: str) -> SharedClient | None:
        """Return the client of the running loop and this instance, which may still be connecting; None without one."""
        client = _clients.get(asyncio.get_running_loop(), {}).get((url, instance))
        return None if client is None or client.closed else client

    @classmethod
    @asynccontextmanager
    async def using(cls, url: str, instance: str) -> AsyncGenerator[SharedClient]:
        """Return what `get` returns, and keep it open until the end of the block."""
        client = await cls.get(url, instance)
        client.add_user()
        try:
            yield client
        finally:
            client.remove_user()

    def add_user(self) -> None:
        """Keep the client open until `remove_user`."""
        self._users += 1

    def remove_user(self) -> None:
        """Undo one `add_user`."""
        self._users -= 1
        self._close_if_unneeded()

    async def leave(self) -> None:
        """Close the client once it has neither users nor calls in flight. No call is cancelled."""
        self._was_left = True
        self._close_if_unneeded()
        if self._closing is not None:
            await asyncio.shield(self._closing)

    def _on_idle(self) -> None:
        self._close_if_unneeded()

    def _close_if_unneeded(self) -> None:
        if not self._was_left or self._users or self.in_flight.by_id or self.kept.is_busy or self.closed:
            return
        if self._opening is not None and not self._opening.done():
            return  # the call that connects it needs it
        if starting_tasks(self.url, self.keys.instance):
            return  # their calls will be in flight, and the end of the last one leads here again
        self._mark_closed()  # at once, so that later calls connect anew
        self._closing = self.loop.create_task(self._disconnect(), name="request client closing")

    def _mark_closed(self) -> None:
        super()._mark_closed()
        # Removed by hand: the values of the dictionary keep its weak keys, the loops, alive.
        clients = _clients.get(self.loop, {})
        if clients.get((self.url, self.keys.instance)) is self:
            del clients[self.url, self.keys.instance]
            if not clients:
                del _clients[self.loop]


_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str], SharedClient]] = (
    weakref.WeakKeyDictionary()
)

_links: dict[tuple[str, str], Callable[[], Links]] = {}


def provide_links(url: str, instance: str, make_links: Callable[[], Links]) -> None:
    """Connect the clients of this process to an instance by ``make_links``, and not by Redis.

    It is called on the loop of each new client, and may raise. For ``penstock.testing``.
    """
    _links[url, instance] = make_links


def open_clients(url: str, instance: str) -> list[SharedClient]:
    """Return the clients of this process to an instance, on any loop."""
    return [client for clients in list(_clients.values()) if (client := clients.get((url, instance))) is not None]


_starting: dict[tuple[str, str], set[asyncio.Task[object]]] = {}


@contextmanager
def starting(url: str, instance: str) -> Generator[None]:
    """Count the current task among those that start a call to this instance, until the end of the block.

    Such a call waits for its connection or its endpoint, so it is not in flight yet.
    """
    task = asyncio.current_task()
    assert task is not None
    key = url, instance
    _starting.setdefault(key, set()).add(task)
    try:
        yield
    finally:
        tasks = _starting[key]
        tasks.discard(task)
        if not tasks:
            del _starting[key]


def starting_tasks(url: str, instance: str) -> list[asyncio.Task[object]]:
    """Return the tasks of the running loop that start a call to this instance."""
    loop = asyncio.get_running_loop()
    return [task for task in list(_starting.get((url, instance), ())) if task.get_loop() is loop]
