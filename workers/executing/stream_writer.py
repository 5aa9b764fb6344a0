"""Streamed replies: from the user's generator or response to the stream sender, in parts.

The code that makes values is one side, on a thread or on the loop. It waits while a window's worth is under way that
the caller's reader has not taken. The other side, on the loop, sends what came within one turn of it as one part.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from math import inf
from types import AsyncGeneratorType, GeneratorType
from typing import Any, Protocol, Union

from ...broker.queue.flow_control import CHUNK
from ...broker.wire._fields import VALUE_COST, Pairs
from ...broker.wire.replies import Part
from ..claim import Claim
from .results import encode

GENERATORS = (GeneratorType, AsyncGeneratorType)
Values = Union[Generator[Any, Any, Any], AsyncGenerator[Any, Any]]  # noqa: UP007 - evaluated, also on Python 3.10


class StreamStopped(Exception):  # it never leaves the replica
    """Nobody wants the rest."""


class StreamSink(Protocol):
    """Sends parts to callers: the stream sender."""

    def begin(self, writer: StreamWriter) -> None:
        """Note that the first part of a reply is about to be sent."""
        ...

    def send(self, writer: StreamWriter, part: Part) -> None:
        """Send a part."""
        ...


class StreamWriter:
    """One streamed reply on its way out."""

    def __init__(self, stream_sink: StreamSink, loop: asyncio.AbstractEventLoop, claim: Claim) -> None:
        self.claim = claim
        self.is_stopped = False
        self.stopped_because = ""
        """What its caller is to be told; nothing if it was the caller who stopped it."""
        self.on_stop: Callable[[], None] | None = None
        """Interrupts code on the loop, wherever it is; what is on a thread finds out when it yields."""
        self.parts = 0
        """How many were sent."""
        self._sink, self._loop = stream_sink, loop
        # Nobody takes anything of a copy to a shadow, and nothing of it is sent.
        self._window: float = claim.entry.header.window if claim.entry.caller else inf
        self._put = self._read = 0
        self._pending: deque[tuple[str, bytes, bool]] = deque()
        self._status = 200
        self._headers: Pairs = []
        self._head_due = False
        self._woken = False
        self._room = threading.Condition()
        self._waiting: asyncio.Future[None] | None = None

    # -- for who makes the values

    def start(self, status: int, headers: Pairs) -> None:
        """Send the head of an HTTP response, with its first bytes or as soon as the loop turns."""
        self._status, self._headers, self._head_due = status, headers, True
        self._wake()

    def put(self, codec: str, body: bytes) -> None:
        """Send a value from a thread, when there is room. Raises `StreamStopped`."""
        for chunk, more in _cut(body):
            with self._room:
                while self._is_full() and not self.is_stopped:
                    self._room.wait()
            self._add(codec, chunk, more)

    async def put_soon(self, codec: str, body: bytes) -> None:
        """Send a value from the loop, when there is room. Raises `StreamStopped`."""
        for chunk, more in _cut(body):
            while self._is_full() and not self.is_stopped:
                self._waiting = self._loop.create_future()
                await self._waiting
            self._add(codec, chunk, more)

    # -- for the loop

    def grant(self, read_bytes: int) -> None:
        """Record that the reader has read ``read_bytes`` in total, and send as much more as the window allows."""
        if read_bytes > self._read:
            with self._room:
                self._read = read_bytes
                self._room.notify_all()
            self._wake_waiting()

    def stop(self, because: str = "") -> None:
        """Nobody wants the rest: have the code closed that makes it."""
        if self.is_stopped:
            return
        with self._room:
            self.is_stopped, self.stopped_because = True, because
            self._room.notify_all()
        self._wake_waiting()
        if self.on_stop is not None:
            self.on_stop()

    def finish(self) -> None:
        """Send what is left; an answer without a value has one empty part."""
        self._head_due = self._head_due or (self.parts == 0 and not self._pending)
        self.flush()

    def flush(self) -> None:
        """Send what there is."""
        self._woken = False
        pending = self._pending
        while (pending or self._head_due) and not self.is_stopped:
            codec, sizes, bodies, size, more = "response", list[int](), list[bytes](), 0, False
            while pending and not more and size < CHUNK and (not sizes or pending[0][0] == codec):
                codec, body, more = pending.popleft()
                bodies.append(body)
                sizes.append(len(body))
                size += len(body) + VALUE_COST
            if self.parts == 0:
                self._sink.begin(self)
            part = Part(
                self.claim.entry.id, self.parts, codec, sizes, more, self._status, self._headers, b"".join(bodies)
            )
            self._head_due = False
            self.parts += 1
            self._sink.send(self, part)

    def _is_full(self) -> bool:
        return self._put - self._read >= self._window

    def _add(self, codec: str, body: bytes, more: bool) -> None:
        if self.is_stopped:
            raise StreamStopped
        self._put += len(body) + VALUE_COST
        # Appended first, looked at second; `flush` does both the other way round. So either it sees this one, or we see
        # that it must be woken.
        self._pending.append((codec, body, more))
        self._wake()

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self.flush)

    def _wake_waiting(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


def pump(writer: StreamWriter, values: Generator[Any, Any, Any], backend: str, allow_pickle: bool) -> None:
    """Send what a generator yields, on the thread that this is called on, and close it. Raises what it raises.

    Raises:
        Stopped: nobody wants the rest.
    """
    try:
        for value in values:
            writer.put(*_written(value, backend, allow_pickle))
    finally:
        values.close()


async def pump_soon(writer: StreamWriter, values: AsyncGenerator[Any, Any], backend: str, allow_pickle: bool) -> None:
    """`pump` for an asynchronous generator, on the loop."""
    try:
        async for value in values:
            await writer.put_soon(*_written(value, backend, allow_pickle))
    finally:
        await values.aclose()


def _written(value: object, backend: str, allow_pickle: bool) -> tuple[str, bytes]:
    _, codec, headers, body = encode(value, backend, allow_pickle)
    if codec == "response":
        raise TypeError(f"backend {backend!r} yielded a response ({dict(headers)}); a generator yields its values")
    return codec, body


def _cut(body: bytes) -> Iterator[tuple[bytes, bool]]:
    """Yield the body in chunks, each with whether there are more."""
    for start in range(0, len(body) or 1, CHUNK):
        yield body[start : start + CHUNK], start + CHUNK < len(body)
