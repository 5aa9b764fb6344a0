"""Incoming streamed reply: a buffer between the reply receiver and its one reader."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from ...broker.wire._fields import VALUE_COST
from ...broker.wire.replies import Part, Reply
from ..errors import PenstockError, RequestCancelled, StreamBroken, from_wire


class StreamPiece(NamedTuple):
    """A value of an answer, or some of its bytes."""

    codec: str
    body: bytes
    more: bool
    """It goes on in the next piece."""


class IncomingStream:
    """The parts of one answer, in order and each once: or it ends with an error that says why not.

    Only for the caller's loop. What is not taken by `pieces` is not granted to the replica, which stops at a window's
    worth.
    """

    def __init__(
        self,
        first: Part,
        backend: str,
        shown_id: Callable[[], str],
        window: int,
        grant: Callable[[int], None],
        give_up: Callable[[], object],
    ) -> None:
        """``shown_id`` makes the id of the request for logs and messages."""
        self._shown_id, self.backend = shown_id, backend
        self.codec, self.status, self.headers = first.codec, first.status, first.headers
        """Of the first part; status and headers are those of an HTTP response if the codec is ``response``."""
        self.granted_at = asyncio.get_running_loop().time()
        self._window, self._grant, self._give_up = window, grant, give_up
        self._pieces: deque[StreamPiece] = deque()
        self._next = self._taken = self._granted = 0
        self._end: BaseException | None = None
        self._ended = False
        self._reader: asyncio.Future[None] | None = None

    @property
    def shown_id(self) -> str:
        """The id for logs and messages."""
        return self._shown_id()

    def take(self, part: Part) -> None:
        """Add a part; one that has come before is dropped. Raises `StreamBroken` if one is missing.

        After a broken connection a replica sends again whatever it does not know to have arrived. But of a first part
        that comes twice nobody can say whether another replica has begun.
        """
        if 0 < part.number < self._next:
            return
        if part.number != self._next:
            if part.number == 0:
                raise self._broken("another replica began it anew")
            raise self._broken(f"part {part.number} came where part {self._next} was due")
        self._next += 1
        start, last = 0, len(part.sizes) - 1
        for n, size in enumerate(part.sizes):
            self._pieces.append(StreamPiece(part.codec, part.body[start : start + size], part.more and n == last))
            start += size
        self._wake()

    def end(self, outcome: Reply | BaseException) -> None:
        """Hear how it ended; what was heard before can still be taken."""
        if self._ended:
            return
        self._ended = True
        if not isinstance(outcome, Reply):
            self._end = outcome
        elif outcome.error is not None:
            self._end = from_wire(outcome.error)
        elif outcome.codec != "stream":
            self._end = self._broken("another replica gave a whole answer")
        elif outcome.body != b"%d" % self._next:
            said = outcome.body[:20].decode(errors="replace")
            self._end = self._broken(f"it had {said} parts, of which {self._next} came")
        self._wake()

    async def pieces(self) -> list[StreamPiece]:
        """Take all that has come, waiting for the first; none means that the answer is complete.

        Raises:
            PenstockError: it broke off; or what the backend raised.
        """
        if self._reader is not None:
            raise RuntimeError("an answer in parts has one reader at a time")
        while not self._pieces:
            if self._ended:
                if self._end is not None:
                    raise self._end
                return []
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        taken = list(self._pieces)
        self._pieces.clear()
        self._taken += sum(len(piece.body) + VALUE_COST for piece in taken)
        if not self._ended and 2 * (self._taken - self._granted) >= self._window:
            self.grant()
        return taken

    def grant(self) -> None:
        """Say how much was taken."""
        self._granted = self._taken
        self.granted_at = asyncio.get_running_loop().time()
        self._grant(self._taken)

    def close(self) -> None:
        """Want no more of it: what is still produced is stopped, and who reads gets `RequestCancelled`."""
        self._pieces.clear()
        if not self._ended:
            self._give_up()
            self.end(RequestCancelled(self.shown_id))

    def _broken(self, reason: str) -> PenstockError:
        return StreamBroken(self.backend, self.shown_id, reason)

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
