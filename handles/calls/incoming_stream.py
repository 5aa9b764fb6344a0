"""Incoming streamed reply: a buffer between the reply receiver and the one reader of the stream."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from ...broker.wire._fields import VALUE_COST
from ...broker.wire.replies import Part, Reply
from ..errors import PenstockError, RequestCancelled, StreamBroken, from_wire


class StreamPiece(NamedTuple):
    """One value of a streamed reply, or a piece of it."""

    codec: str
    body: bytes
    is_partial: bool
    """Whether the value continues in the next piece."""


class IncomingStream:
    """The parts of one streamed reply: each once, in order, then the end or an error.

    The buffer is bounded by ``window`` bytes: the replica sends no more until `read` has granted it new credit. Only
    for the event loop of the client.
    """

    def __init__(
        self,
        first: Part,
        backend: str,
        shown_id: Callable[[], str],
        window: int,
        send_credit: Callable[[int], None],
        cancel: Callable[[], object],
    ) -> None:
        """Create the stream from its first part, which `add` must still be given.

        Args:
            first: the part that names the codec, and the status and headers of a streamed HTTP response.
            backend: tag of the backend, for error messages.
            shown_id: returns the id of the request for logs and error messages.
            window: bytes that may be in flight.
            send_credit: reports to the replica how many bytes have been read in total.
            cancel: cancels the call.
        """
        self._shown_id, self.backend = shown_id, backend
        self.codec, self.status, self.headers = first.codec, first.status, first.headers
        self.granted_at_s = asyncio.get_running_loop().time()
        """Time of the last `grant` by the event loop's clock."""
        self._window, self._send_credit, self._cancel = window, send_credit, cancel
        self._pieces: deque[StreamPiece] = deque()
        self._next_part = 0
        self._read_bytes = self._granted_bytes = 0
        self._has_ended = False
        self._error: BaseException | None = None
        """Why the stream ended before it was complete."""
        self._reader: asyncio.Future[None] | None = None

    @property
    def shown_id(self) -> str:
        """Id of the request for logs and error messages."""
        return self._shown_id()

    def add(self, part: Part) -> None:
        """Append a part to the buffer. A part that has been added before is dropped.

        After a broken connection a replica sends every part again that may not have arrived. But when a first part
        arrives twice, another replica may have begun the reply, so the stream is broken.

        Raises:
            StreamBroken: a part is missing, or the first one arrived again.
        """
        if 0 < part.number < self._next_part:
            return
        if part.number != self._next_part:
            if part.number == 0:
                raise self._broken("another replica began it anew")
            raise self._broken(f"part {part.number} came where part {self._next_part} was due")
        self._next_part += 1
        start, last = 0, len(part.sizes) - 1
        for n, size in enumerate(part.sizes):
            self._pieces.append(StreamPiece(part.codec, part.body[start : start + size], part.more and n == last))
            start += size
        self._wake_reader()

    def end(self, outcome: Reply | BaseException) -> None:
        """End the stream with the outcome of its call. Parts in the buffer can still be read."""
        if self._has_ended:
            return
        self._has_ended = True
        if not isinstance(outcome, Reply):
            self._error = outcome
        elif outcome.error is not None:
            self._error = from_wire(outcome.error)
        elif outcome.codec != "stream":
            self._error = self._broken("another replica gave a whole answer")
        elif outcome.body != b"%d" % self._next_part:
            count = outcome.body[:20].decode(errors="replace")
            self._error = self._broken(f"it had {count} parts, of which {self._next_part} came")
        self._wake_reader()

    async def read(self) -> list[StreamPiece]:
        """Return the pieces that have arrived, after waiting for the first. An empty list is the end of the reply.

        Raises:
            PenstockError: the stream is broken, or the backend raised.
            RuntimeError: another reader is waiting.
        """
        if self._reader is not None:
            raise RuntimeError("a streamed reply has one reader at a time")
        while not self._pieces:
            if self._has_ended:
                if self._error is not None:
                    raise self._error
                return []
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        pieces = list(self._pieces)
        self._pieces.clear()
        self._read_bytes += sum(len(piece.body) + VALUE_COST for piece in pieces)
        if not self._has_ended and 2 * (self._read_bytes - self._granted_bytes) >= self._window:
            self.grant()
        return pieces

    def grant(self) -> None:
        """Report to the replica how much has been read, so that it can send as much again."""
        self._granted_bytes = self._read_bytes
        self.granted_at_s = asyncio.get_running_loop().time()
        self._send_credit(self._read_bytes)

    def close(self) -> None:
        """Drop the buffer and cancel the call, unless it has ended. `read` then raises `RequestCancelled`."""
        self._pieces.clear()
        if not self._has_ended:
            self._cancel()
            self.end(RequestCancelled(self.shown_id))

    def _broken(self, reason: str) -> PenstockError:
        return StreamBroken(self.backend, self.shown_id, reason)

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
