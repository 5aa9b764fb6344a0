"""Writer side of streamed replies: turns the values of a generator or a response into parts.

The producer calls `put` on a thread, or `put_soon` on the loop. It waits while a whole window of bytes is in flight
that the reader has not read. On the loop, all values of one turn are sent together as one part.
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
    """The stream was stopped: its caller has left, or its replica ends."""


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
        """The reason for the caller; empty if the caller itself stopped it."""
        self.on_stop: Callable[[], None] | None = None
        """Cancels a producer on the loop. A producer on a thread notices at its next `put`."""
        self.parts = 0
        """The number of parts that were sent."""
        self._sink, self._loop = stream_sink, loop
        # Shadow traffic has no reader, and its parts are dropped.
        self._window: float = claim.entry.header.window if claim.entry.caller else inf
        self._put = self._read = 0
        self._pending: deque[tuple[str, bytes, bool]] = deque()
        self._status = 200
        self._headers: Pairs = []
        self._head_due = False
        self._woken = False
        self._room = threading.Condition()
        self._waiting: asyncio.Future[None] | None = None

    # -- for the producer

    def start(self, status: int, headers: Pairs) -> None:
        """Send the head of an HTTP response, together with the bytes that follow in this loop tick."""
        self._status, self._headers, self._head_due = status, headers, True
        self._wake()

    def put(self, codec: str, body: bytes) -> None:
        """Send a value from a thread; blocks while the window is full. Raises `StreamStopped`."""
        for chunk, more in _cut(body):
            with self._room:
                while self._is_full() and not self.is_stopped:
                    self._room.wait()
            self._add(codec, chunk, more)

    async def put_soon(self, codec: str, body: bytes) -> None:
        """Send a value from the loop; waits while the window is full. Raises `StreamStopped`."""
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
        """Stop the producer. ``because`` is the reason for the caller; empty if the caller itself has left."""
        if self.is_stopped:
            return
        with self._room:
            self.is_stopped, self.stopped_because = True, because
            self._room.notify_all()
        self._wake_waiting()
        if self.on_stop is not None:
            self.on_stop()

    def finish(self) -> None:
        """Send the remaining parts. A reply without a value has one empty part."""
        self._head_due = self._head_due or (self.parts == 0 and not self._pending)
        self.flush()

    def flush(self) -> None:
        """Send all values that were put."""
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
        # Append, then read `_woken`; `flush` does both in the other order. So either it finds this value, or this
        # thread finds that the loop must be woken.
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
    """Send the values of a generator on the calling thread, then close it. Raises any error of the generator.

    Raises:
        StreamStopped: the stream was stopped.
    """
    try:
        for value in values:
            writer.put(*_encoded(value, backend, allow_pickle))
    finally:
        values.close()


async def pump_soon(writer: StreamWriter, values: AsyncGenerator[Any, Any], backend: str, allow_pickle: bool) -> None:
    """`pump` for an asynchronous generator, on the loop."""
    try:
        async for value in values:
            await writer.put_soon(*_encoded(value, backend, allow_pickle))
    finally:
        await values.aclose()


def _encoded(value: object, backend: str, allow_pickle: bool) -> tuple[str, bytes]:
    _, codec, headers, body = encode(value, backend, allow_pickle)
    if codec == "response":
        raise TypeError(f"backend {backend!r} yielded a response ({dict(headers)}); a generator yields its values")
    return codec, body


def _cut(body: bytes) -> Iterator[tuple[bytes, bool]]:
    """Yield the body in chunks, each with whether another follows."""
    for start in range(0, len(body) or 1, CHUNK):
        yield body[start : start + CHUNK], start + CHUNK < len(body)
