"""Streamed replies as iterators, for sync and asyncio code. Both wrap a `StreamState`, which belongs to one loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections import deque
from collections.abc import Coroutine, Mapping
from types import TracebackType
from typing import Any

from ...broker.wire.replies import Reply
from ...runtime.notebooks import NotebookTable
from .. import background_loop
from ..calls.call import Call, CallOutcome
from ..calls.incoming_stream import IncomingStream, StreamPiece
from ..calls.pickle_policy import PicklePolicy
from ..codec import decode
from .response import value_of


class StreamState:
    """The values of one streamed reply. A reply that is not streamed is a stream of one value."""

    def __init__(self, endpoint: str, pickles: PicklePolicy) -> None:
        self.endpoint = endpoint
        """Name of the endpoint."""
        self.call: Call | None = None
        """The call, once it has been dispatched."""
        self._pickles = pickles
        self._loop = asyncio.get_running_loop()
        self._begun: asyncio.Future[CallOutcome] = self._loop.create_future()
        """The outcome of the call: the incoming stream, a whole reply, or an error."""
        self._partial_value: list[bytes] = []
        """Pieces of a value whose other pieces have not arrived."""
        self.is_closed = False
        """Whether the stream has ended or was closed."""

    def on_outcome(self, outcome: CallOutcome) -> None:
        """Record the outcome of the call."""
        if not self._begun.done():
            self._begun.set_result(outcome)

    async def read(self) -> list[Any]:
        """Return the values that have arrived, after waiting for the first. An empty list is the end of the stream.

        Raises:
            PenstockError: the stream is broken, or the backend raised.
        """
        while not self.is_closed:
            # Shielded: a reader that is cancelled may read again.
            outcome = await asyncio.shield(self._begun)
            if not isinstance(outcome, IncomingStream):
                self.is_closed = True
                return [_value_or_raise(outcome)]
            try:
                pieces = await outcome.read()
                if not pieces:
                    break
                await self._check_pickles(pieces)
                if values := [value for piece in pieces for value in self._join(*piece)]:
                    return values
            except asyncio.CancelledError:
                raise
            except BaseException:
                self.close()
                raise
        self.is_closed = True
        return []

    async def _check_pickles(self, pieces: list[StreamPiece]) -> None:
        """Check that pickled pieces may be read.

        Raises:
            WireError: the backend's record does not allow pickle.
        """
        call = self.call
        assert call is not None
        if any(piece.codec == "pickle" for piece in pieces) and not self._pickles.allows(call):
            await self._pickles.check(call)

    def _join(self, codec: str, body: bytes, is_partial: bool) -> list[Any]:
        """Return the value that a piece completes, in a list, or an empty list."""
        if is_partial or self._partial_value:
            self._partial_value.append(body)
            if is_partial:
                return []
            body = b"".join(self._partial_value)
            self._partial_value.clear()
        return [body if codec == "response" else decode(codec, body, allow_pickle=True)]

    def close(self) -> None:
        """End the stream and close the backend's generator. Idempotent; only for the loop of the stream."""
        if self.is_closed:
            return
        self.is_closed = True
        if not self._begun.done():
            if self.call is not None:
                self.call.cancel()
            self._begun.cancel()
        elif not self._begun.cancelled() and isinstance(incoming := self._begun.result(), IncomingStream):
            incoming.close()

    def close_threadsafe(self) -> None:
        """Call `close` from any thread."""
        try:
            self._loop.call_soon_threadsafe(self.close)
        except RuntimeError:
            pass  # the loop is closed, and its calls with it


class AsyncResponseStream(NotebookTable):
    """The values that a backend yields, for ``async for``. Made by ``remote`` of an `AsyncStreamingHandle`.

    Each value is returned as soon as it has arrived, in order; an error is raised after the values before it. A slow
    reader slows the backend down. Leaving an ``async with`` block, or `aclose`, closes the backend's generator; so does
    dropping the stream.

    Iterating raises `BackendError` if the backend's code raised, `StreamBroken` if the replica died after the first
    value, `RequestTimeout` if no value arrived within ``timeout_s``.
    """

    def __init__(self, stream: StreamState) -> None:
        self._stream = stream
        self._values: deque[Any] = deque()

    @classmethod
    async def open(cls, opening: Coroutine[Any, Any, StreamState]) -> AsyncResponseStream:
        """Return the stream that ``opening`` returns, once its request is durably on its stream.

        Raises:
            PenstockError: the request was refused.
        """
        stream = await opening
        try:
            assert stream.call is not None
            await stream.call.accepted()
        except BaseException:
            stream.close()
            raise
        return cls(stream)

    def __repr__(self) -> str:
        return f"<AsyncResponseStream of endpoint {self._stream.endpoint!r}, {self._state()}>"

    def _notebook_fields(self) -> Mapping[str, object]:
        return {"endpoint": self._stream.endpoint, "state": self._state()}

    def _state(self) -> str:
        return "closed" if self._stream.is_closed and not self._values else "open"

    def __aiter__(self) -> AsyncResponseStream:
        return self

    async def __anext__(self) -> Any:
        if not self._values:
            self._values.extend(await self._stream.read())
            if not self._values:
                raise StopAsyncIteration
        return self._values.popleft()

    async def aclose(self) -> None:
        """End the stream and close the backend's generator. Idempotent."""
        self._values.clear()
        self._stream.close()

    async def __aenter__(self) -> AsyncResponseStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._stream.close_threadsafe()


class ResponseStream(NotebookTable):
    """The values that a backend yields, for ``for``. Made by ``remote`` of a `StreamingHandle`.

    See `AsyncResponseStream` for the guarantees and errors. Iterating also raises what the future of a handle would
    raise for a request that was not accepted, such as `EndpointNotFound` or `Overloaded`. For one thread at a time.
    """

    def __init__(self, endpoint: str, opening: Coroutine[Any, Any, StreamState]) -> None:
        self._endpoint = endpoint
        self._opening: concurrent.futures.Future[StreamState] = background_loop.submit(opening)
        self._values: deque[Any] = deque()
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<ResponseStream of endpoint {self._endpoint!r}, {self._state()}>"

    def _notebook_fields(self) -> Mapping[str, object]:
        return {"endpoint": self._endpoint, "state": self._state()}

    def _state(self) -> str:
        return "closed" if self._is_closed else "open"

    def __iter__(self) -> ResponseStream:
        return self

    def __next__(self) -> Any:
        if not self._values:
            if self._opening.cancelled():
                raise StopIteration
            if background_loop.is_current():
                raise background_loop.would_wait_for_itself()
            self._values.extend(background_loop.run(self._opening.result().read()))
            if not self._values:
                self._is_closed = True
                raise StopIteration
        return self._values.popleft()

    def close(self) -> None:
        """End the stream and close the backend's generator. Idempotent."""
        self._is_closed = True
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
        opening.result().close_threadsafe()


def _value_or_raise(outcome: Reply | BaseException) -> Any:
    if isinstance(outcome, Reply):
        return value_of(outcome)
    raise outcome
