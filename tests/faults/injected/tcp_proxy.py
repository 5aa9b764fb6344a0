"""A TCP proxy in front of a broker, whose connections can be cut, and which can lead new ones to another broker."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import unquote

ProxyT = TypeVar("ProxyT", bound="TcpProxy")


class TcpProxy:
    """Hands everything on to a Unix socket, in a thread of its own. ``url`` is where brokers' clients find it."""

    def __init__(self, target_url: str) -> None:
        self._path = _path_of(target_url)
        self._loop = asyncio.new_event_loop()
        self._links: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp proxy")
        self.cuts = self.visits = 0
        self.url = ""

    def __enter__(self: ProxyT) -> ProxyT:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def lead_to(self, target_url: str) -> None:
        """Lead connections that are made from now on to another Unix socket. Those that there are stay as they are."""
        self._path = _path_of(target_url)

    def cut(self, share: float) -> None:
        """Break this share of the connections that there are, and at least one, without a farewell."""
        self._loop.call_soon_threadsafe(self._cut, share)

    def _cut(self, share: float) -> None:
        links = list(self._links)
        for writer in random.sample(links, min(len(links), max(1, round(share * len(links))))):
            self.cuts += 1
            writer.transport.abort()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _close(self) -> None:
        # asyncio loses a socket whose server is closed, or task cancelled, before it is served.
        for listener in self._server.sockets:
            self._loop.remove_reader(listener.fileno())
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in self._serving:
                task.cancel()
            await asyncio.wait(tasks, timeout=0.01)
        self._server.close()
        await asyncio.sleep(0)  # what was aborted is closed in the next turn

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            await self._link(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # the broker is not there, or we end
        finally:
            self._serving.discard(task)
            writer.transport.abort()

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.visits += 1
        far_reader, far_writer = await asyncio.open_unix_connection(self._path)
        self._links.add(writer)
        ways = [asyncio.ensure_future(way) for way in self._ways(reader, far_writer, far_reader, writer)]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._links.discard(writer)
            far_writer.transport.abort()
            for way in ways:
                way.cancel()

    def _ways(
        self,
        reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> list[Coroutine[Any, Any, None]]:
        """Return what hands on between a client (``reader``, ``writer``) and the broker, until one of them ends."""
        return [_pump(reader, far_writer), _pump(far_reader, writer)]


def _path_of(url: str) -> str:
    return unquote(url.removeprefix("unix://"))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(256 * 1024):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass  # cut
