"""Streamed replies as HTTP responses: parts are sent as they arrive, and a broken-off reply never looks complete.

A generator's strings and bytes are sent unchanged. Its other values are sent as lines of JSON. The first value decides
which of the two applies to all of them. The body of a Starlette response is sent unchanged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import orjson
from starlette.types import Receive, Send

from ..broker.wire.replies import Reply
from ..handles.calls.incoming_stream import IncomingStream, StreamPiece
from ..handles.errors import BackendError, PayloadTooLarge, PenstockError
from . import responses
from .http1.disconnects import ClientDisconnected, wait_for_disconnect
from .responses import HTTPResponse

logger = logging.getLogger("penstock.proxy")

_JSON_LINES: responses.RawHeaders = [(b"content-type", b"application/x-ndjson")]
_UNCHANGED_CODECS = frozenset(("response", "text", "bytes"))


class CutOff(Exception):
    """A streamed response broke off after its head was sent. `http1.protocol` closes the connection for it."""

    def __init__(self, error: PenstockError) -> None:
        super().__init__(error)
        self.error = error


def head(incoming: IncomingStream, *, debug: bool) -> HTTPResponse:
    """Return the response without its body, or an error if HTTP cannot carry the reply."""
    codec = incoming.codec
    if codec in ("json", "none"):
        return HTTPResponse(200, _JSON_LINES)
    # The same rules for status, headers and Python-only values as for a whole reply, here with an empty body.
    return responses.of_reply(Reply("", incoming.status, codec, incoming.headers), debug=debug)


async def body(incoming: IncomingStream) -> AsyncIterator[bytes]:
    """Yield the body in chunks. Each one holds everything that has arrived.

    Raises:
        PenstockError: the reply ended before it was complete; the exception is its reason.
    """
    write = _unchanged if incoming.codec in _UNCHANGED_CODECS else _Lines()
    while pieces := await incoming.read():
        if chunk := b"".join(map(write, pieces)):
            yield chunk


def whole(pieces: list[StreamPiece], *, debug: bool) -> HTTPResponse:
    """Return the response to a request whose streamed reply was kept.

    Raises:
        BackendError: HTTP cannot carry all of its values.
    """
    if not pieces:
        return HTTPResponse(200, [])
    codec = pieces[0].codec
    if codec in ("json", "none"):
        return HTTPResponse(200, _JSON_LINES, b"".join(map(_Lines(), pieces)))
    response = responses.of_reply(Reply("", codec=codec), debug=debug)
    return response if response.status != 200 else response._replace(body=b"".join(map(_unchanged, pieces)))


async def gather(incoming: IncomingStream, head: HTTPResponse, *, limit: int, debug: bool) -> HTTPResponse:
    """Return a streamed reply as a whole response of at most ``limit`` bytes, or the error that ended the reply."""
    whole = bytearray()
    try:
        async for chunk in body(incoming):
            whole += chunk
            if len(whole) > limit:
                raise PayloadTooLarge(len(whole), limit)
    except PenstockError as e:
        return responses.of_error(e, debug=debug)
    return head._replace(body=bytes(whole))


async def send_on(
    incoming: IncomingStream, status: int, headers: responses.RawHeaders, receive: Receive, send: Send
) -> None:
    """Send a streamed reply as the response.

    Raises:
        CutOff: the reply broke off.
        ClientDisconnected: the client disconnected.
    """
    watcher = asyncio.get_running_loop().create_task(_close_on_disconnect(incoming, receive))
    try:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        async for chunk in body(incoming):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    except PenstockError as e:
        if watcher.done():
            raise ClientDisconnected from None
        # The first line only: the message of a backend's exception may contain its traceback.
        logger.warning("the response to request %s is cut off: %s", incoming.shown_id, str(e).partition("\n")[0])
        raise CutOff(e) from None
    finally:
        watcher.cancel()
        incoming.close()
    await send({"type": "http.response.body", "body": b""})


async def _close_on_disconnect(incoming: IncomingStream, receive: Receive) -> None:
    if await wait_for_disconnect(receive):
        incoming.close()


def _unchanged(piece: StreamPiece) -> bytes:
    if piece.codec not in _UNCHANGED_CODECS:
        raise _mixed(piece, "strings and bytes")
    return piece.body


class _Lines:
    """Writes each value as a line of JSON."""

    def __init__(self) -> None:
        self._text: list[bytes] = []

    def __call__(self, piece: StreamPiece) -> bytes:
        codec, body, more = piece
        if codec == "text":  # quoted as a whole, when its last piece is there
            self._text.append(body)
            if more:
                return b""
            body = orjson.dumps(b"".join(self._text).decode())
            self._text.clear()
        elif codec == "none":
            body = b"null"
        elif codec != "json":
            raise _mixed(piece, "JSON")
        return body if more else body + b"\n"


def _mixed(piece: StreamPiece, others: str) -> BackendError:
    return BackendError("TypeError", f"the backend yielded a value written as {piece.codec!r} among {others}")
