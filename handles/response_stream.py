"""Streamed replies as iterators, for sync and asyncio code.

Both are thin faces of one `StreamState`, which lives in the loop of its caller.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections import deque
from collections.abc import Coroutine
from types import TracebackType
from typing import Any

from ..broker.wire.replies import Reply
from . import background_loop
from .calls.call import Call, CallOutcome
from .calls.incoming_stream import IncomingStream, StreamPiece
from .calls.pickle_policy import PicklePolicy
from .codec import decode
from .response import value_of


class StreamState:
    """The values of one answer. A whole answer is a stream of one."""

    def __init__(self, pickles: PicklePolicy) -> None:
        self.call: Call | None = None
        self._pickles = pickles
        self._loop = asyncio.get_running_loop()
        self._begun: asyncio.Future[CallOutcome] = self._loop.create_future()
        self._unfinished: list[bytes] = []
        """Of a value whose other pieces are still to come."""
        self._closed = False

    def hear(self, outcome: CallOutcome) -> None:
        if not self._begun.done():
            self._begun.set_result(outcome)

    async def values(self) -> list[Any]:
        """Return all that have come, waiting for the first; none means that there will be no more.

        Raises:
            PenstockError: why there are no more before the answer was complete.
        """
        while not self._closed:
            # Shielded, as who waits may stop waiting and come again.
            outcome = await asyncio.shield(self._begun)
            if not isinstance(outcome, IncomingStream):
                self._closed = True
                return [_value_or_raise(outcome)]
            try:
                pieces = await outcome.read()
                if not pieces:
                    break
                await self._check(pieces)
                if values := [value for piece in pieces for value in self._join(*piece)]:
                    return values
            except asyncio.CancelledError:
                raise
            except BaseException:
                self.close()
                raise
        self._closed = True
        return []

    async def _check(self, pieces: list[StreamPiece]) -> None:
        """Raise `WireError` if some are pickled and the backend's record does not allow that."""
        call = self.call
        assert call is not None
        if any(piece.codec == "pickle" for piece in pieces) and not self._pickles.allows(call):
            await self._pickles.check(call)

    def _join(self, codec: str, body: bytes, more: bool) -> list[Any]:
        if more or self._unfinished:
            self._unfinished.append(body)
            if more:
                return []
            body = b"".join(self._unfinished)
            self._unfinished.clear()
        return [body if codec == "response" else decode(codec, body, allow_pickle=True)]

    def close(self) -> None:
        """Want no more: the backend's generator is closed where it runs."""
        if self._closed:
            return
        self._closed = True
        if not self._begun.done():
            if self.call is not None:
                self.call.cancel()
            self._begun.cancel()
        elif not self._begun.cancelled() and isinstance(incoming := self._begun.result(), IncomingStream):
            incoming.close()

    def close_from_outside(self) -> None:
        """`close`, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self.close)
        except RuntimeError:
            pass  # the loop is closed, and its caller with it


class AsyncResponseStream:
    """The values that a backend yields, for ``async for``.

    In order, each as soon as it has come; those that came before an error are given before it is raised. A reader that
    is slow slows the backend down. Leave it early by ``aclose()`` or by the end of an ``async with`` block: that stops
    the backend's generator.
    """

    def __init__(self, stream: StreamState) -> None:
        self._stream = stream
        self._values: deque[Any] = deque()

    @classmethod
    async def open(cls, opening: Coroutine[Any, Any, StreamState]) -> AsyncResponseStream:
        """Return it once its request is durably on its stream. Raises why it never will be."""
        stream = await opening
        try:
            assert stream.call is not None
            await stream.call.accepted()
        except BaseException:
            stream.close()
            raise
        return cls(stream)

    def __aiter__(self) -> AsyncResponseStream:
        return self

    async def __anext__(self) -> Any:
        if not self._values:
            self._values.extend(await self._stream.values())
            if not self._values:
                raise StopAsyncIteration
        return self._values.popleft()

    async def aclose(self) -> None:
        """Want no more of it. Idempotent."""
        self._values.clear()
        self._stream.close()

    async def __aenter__(self) -> AsyncResponseStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._stream.close_from_outside()


class ResponseStream:
    """The values that a backend yields, for ``for``; see `AsyncResponseStream`.

    Leave it early by ``close()`` or by the end of a ``with`` block. For one thread at a time.
    """

    def __init__(self, opening: Coroutine[Any, Any, StreamState]) -> None:
        self._opening: concurrent.futures.Future[StreamState] = background_loop.submit(opening)
        self._values: deque[Any] = deque()

    def __iter__(self) -> ResponseStream:
        return self

    def __next__(self) -> Any:
        if not self._values:
            if self._opening.cancelled():
                raise StopIteration
            if background_loop.is_current():
                raise background_loop.would_wait_for_itself()
            self._values.extend(background_loop.run(self._opening.result().values()))
            if not self._values:
                raise StopIteration
        return self._values.popleft()

    def close(self) -> None:
        """Want no more of it. Idempotent."""
        self._values.clear()
        if not self._opening.cancel():
            self._opening.add_done_callback(_close)

    def __enter__(self) -> ResponseStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _close(opening: concurrent.futures.Future[StreamState]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close_from_outside()


def _value_or_raise(outcome: Reply | BaseException) -> Any:
    if isinstance(outcome, Reply):
        return value_of(outcome)
    raise outcome
