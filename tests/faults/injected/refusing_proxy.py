"""A TCP proxy in front of a broker that refuses commands with an error of one's choice, for as long as one wants."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from tests.faults.injected.tcp_proxy import TcpProxy

READS = frozenset(
    b"AUTH CLIENT EXISTS GET HELLO HGETALL LRANGE PING PTTL ROLE SELECT TIME XINFO XLEN XRANGE XREAD XREVRANGE".split()
)
"""What a server takes that refuses writes. Scripts count as writes."""

ERRORS = {
    "NOREPLICAS": "NOREPLICAS Not enough good replicas to write.",
    "READONLY": "READONLY You can't write against a read only replica.",
    "BUSY": "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
    "MISCONF": "MISCONF Errors writing to the AOF file: No space left on device",
    "LOADING": "LOADING Redis is loading the dataset in memory",
    "OOM": "OOM command not allowed when used memory > 'maxmemory'.",
    "TRYAGAIN": "TRYAGAIN Multiple keys request during rehashing of slot",
    "CLUSTERDOWN": "CLUSTERDOWN Hash slot not served",
}


class RefusingProxy(TcpProxy):
    """Refuses every write with ``error`` while that is set. One command of a connection is under way at a time."""

    def __init__(self, target_url: str) -> None:
        super().__init__(target_url)
        self.error = ""
        self.refuses: Callable[[bytes, bytes], bool] = _writes
        """Whether a command is refused, by its name and its bytes."""
        self.refused: list[bytes] = []
        """The names of the commands that were refused."""

    def _ways(
        self,
        reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> list[Coroutine[Any, Any, None]]:
        return [self._relay(reader, far_writer, far_reader, writer)]

    async def _relay(
        self,
        reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        try:
            while True:
                name, command = await _read_command(reader)
                if self.error and self.refuses(name, command):
                    self.refused.append(name)
                    writer.write(f"-{self.error}\r\n".encode())
                else:
                    far_writer.write(command)
                    writer.write(await _read_reply(far_reader))
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass  # one of the two has gone


def _writes(name: bytes, command: bytes) -> bool:
    return name not in READS


async def _read_command(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n")
    pieces, name = [head], b""
    for n in range(int(head[1:])):
        length = await reader.readuntil(b"\r\n")
        arg = await reader.readexactly(int(length[1:]) + 2)
        pieces += (length, arg)
        if n == 0:
            name = arg[:-2].upper()
    return name, b"".join(pieces)


async def _read_reply(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n")
    count = int(head[1:]) if head[:1] in b"*$" else -1
    if count < 0:
        return head
    if head[:1] == b"$":
        return head + await reader.readexactly(count + 2)
    return head + b"".join([await _read_reply(reader) for _ in range(count)])
