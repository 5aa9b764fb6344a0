"""HTTP clients that pipeline without end, send what is never complete, or leave in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import cast
from urllib.parse import urlsplit

from tests.support.loop_thread import running_beside

_HOST = b"host: hostile\r\n"
_CALL = b'POST /job HTTP/1.1\r\n%bcontent-type: application/json\r\ncontent-length: 9\r\n\r\n"hostile"' % _HOST
_NOWHERE = b"GET /nowhere HTTP/1.1\r\n%b\r\n" % _HOST
_HEALTH = b"HEAD /-/healthz HTTP/1.1\r\n%b\r\n" % _HOST
_CHUNKED = b"POST /job HTTP/1.1\r\n%btransfer-encoding: chunked\r\n\r\n" % _HOST
_PIECE = 64 * 1024
_MOST = 32 * 1024 * 1024
_PAUSE_S = 0.01
_ANSWER_S = 60.0


class Hostile:
    """Hostile clients of the server at ``url``, with counts of their deeds."""

    def __init__(self, url: str) -> None:
        at = urlsplit(url)
        self._host, self._port = at.hostname or "", at.port or 80
        self.done: Counter[str] = Counter()
        """How often each kind of client came to its end."""
        self.pipelined = 0
        self.answered = 0
        """Of the pipelined requests whose client reads: those with the right answer, in the right place."""
        self.stop = threading.Event()

    async def run(self) -> None:
        clients = (self._reads, self._never_reads, self._leaves, self._sends_trailers, self._never_ends_a_head)
        await asyncio.gather(*(self._again(client) for client in clients))

    async def _again(self, client: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> None:
        while not self.stop.is_set():
            reader, writer = await asyncio.open_connection(self._host, self._port)
            try:
                with contextlib.suppress(ConnectionError):
                    await client(reader, writer)
            finally:
                writer.transport.abort()
            self.done[client.__name__.strip("_").replace("_", " ")] += 1
            await asyncio.sleep(_PAUSE_S)

    async def _reads(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pipeline requests of all kinds, shut down the sending direction, and read the answers in order."""
        kinds = 10 * [(_CALL, b"200"), (_HEALTH, b"200"), (_NOWHERE, b"404")]
        writer.write(b"".join(request for request, _ in kinds))
        writer.write_eof()
        self.pipelined += len(kinds)
        for request, status in kinds:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _ANSWER_S)
            lines = {name: value for name, _, value in (line.partition(b": ") for line in head.split(b"\r\n"))}
            body = b"" if request is _HEALTH else await reader.readexactly(int(lines[b"content-length"]))
            assert head.split()[1] == status, head
            assert request is not _CALL or body == b"hostile", body
            self.answered += 1
        assert await asyncio.wait_for(reader.read(), _ANSWER_S) == b""

    async def _never_reads(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        cast(asyncio.Transport, writer.transport).pause_reading()
        await self._flood(writer, (_PIECE // len(_NOWHERE)) * _NOWHERE)

    async def _leaves(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(1_000 * _CALL)
        await asyncio.wait_for(writer.drain(), _ANSWER_S)

    async def _sends_trailers(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_CHUNKED + b"0\r\n")
        await self._flood(writer, b"x-serve-call-method: admin\r\n" * (_PIECE // 28))

    async def _never_ends_a_head(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flood(writer, b"\r\n" * (_PIECE // 2))

    async def _flood(self, writer: asyncio.StreamWriter, piece: bytes) -> None:
        """Send as much as is taken, until nothing has been for a while."""
        for _ in range(_MOST // len(piece)):
            writer.write(piece)
            try:
                await asyncio.wait_for(writer.drain(), 1.0)
            except asyncio.TimeoutError:
                return
            if self.stop.is_set():
                return
            await asyncio.sleep(_PAUSE_S)


@contextmanager
def hostile(url: str) -> Generator[Hostile]:
    """Have hostile clients at the server at ``url``. What one of them found wrong is raised at the end."""
    clients = Hostile(url)
    with running_beside(clients.run, "hostile clients", clients.stop.set):
        yield clients
