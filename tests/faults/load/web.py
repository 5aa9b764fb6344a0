"""The least of an HTTP client: at hundreds of requests a second, on the cores that it shares with what is tested."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from urllib.parse import urlsplit

_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Web:
    """Connections to one server, kept alive while the server keeps them."""

    def __init__(self, url: str) -> None:
        at = urlsplit(url)
        self._host, self._port = at.hostname or "", at.port or 80
        self._idle: deque[_Connection] = deque()

    async def post(self, path: str, value: str, method: str, headers: str = "") -> tuple[int, str]:
        """Return status and body. ``headers`` are further lines of the head, each with its end.

        Raises:
            OSError, asyncio.IncompleteReadError: the connection broke, before or after the request was sent.
        """
        reader, writer = await self._connection()
        try:
            body = json.dumps(value).encode()
            head = (
                f"POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
                f"x-serve-call-method: {method}\r\n{headers}content-length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            status, answered = _parsed(await reader.readuntil(b"\r\n\r\n"))
            answer = await reader.readexactly(int(answered["content-length"]))
        except BaseException:
            writer.transport.abort()
            raise
        if answered.get("connection") == "close":
            writer.close()
        else:
            self._idle.append((reader, writer))
        return status, answer.decode()

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()

    async def _connection(self) -> _Connection:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof() and not writer.transport.is_closing():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, self._port)


def _parsed(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    pairs = (line.partition(":") for line in lines)
    return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}
