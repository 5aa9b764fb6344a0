"""Streamed replies over HTTP: sent as they come, and broken off visibly.

The values of a generator go out as they are if they are strings or bytes. Any other value is a line of JSON; the first
one decides for all of them. The body of a response goes out as it is.
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
from .disconnects import ClientDisconnected, wait_for_disconnect
from .responses import HTTPResponse

logger = logging.getLogger("penstock.proxy")

_JSON_LINES: responses.RawHeaders = [(b"content-type", b"application/x-ndjson")]
_AS_THEY_ARE = frozenset(("response", "text", "bytes"))


class CutOff(Exception):  # for `Protocol`, which closes the connection
    """An answer broke off after its head was sent."""

    def __init__(self, error: PenstockError) -> None:
        super().__init__(error)
        self.error = error


def head(incoming: IncomingStream, *, debug: bool) -> HTTPResponse:
    """Return the answer without its body, or an error if it cannot be sent by HTTP."""
    codec = incoming.codec
    if codec in ("json", "none"):
        return HTTPResponse(200, _JSON_LINES)
    # As of a whole answer, whose body is empty so far: one rule for headers, status and what is for Python only.
    return responses.of_reply(Reply("", incoming.status, codec, incoming.headers), debug=debug)


async def body(incoming: IncomingStream) -> AsyncIterator[bytes]:
    """Yield the body in as few chunks as do not wait for each other.

    Raises:
        PenstockError: why there is no more.
    """
    write = _as_they_are if incoming.codec in _AS_THEY_ARE else _Lines()
    while pieces := await incoming.pieces():
        if chunk := b"".join(map(write, pieces)):
            yield chunk


async def gather(incoming: IncomingStream, head: HTTPResponse, *, limit: int, debug: bool) -> HTTPResponse:
    """Return an answer in parts as a whole one of at most ``limit`` bytes, or the error that ended it."""
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
    """Send an answer in parts.

    Raises:
        CutOff: it broke off.
        HungUp: the client went away.
    """
    watcher = asyncio.get_running_loop().create_task(_close_when_hung_up(incoming, receive))
    try:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        async for chunk in body(incoming):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    except PenstockError as e:
        if watcher.done():
            raise ClientDisconnected from None
        # Its first line: of what the backend raised, the rest is a traceback.
        logger.warning("the answer to request %s is cut off: %s", incoming.shown_id, str(e).partition("\n")[0])
        raise CutOff(e) from None
    finally:
        watcher.cancel()
        incoming.close()
    await send({"type": "http.response.body", "body": b""})


async def _close_when_hung_up(incoming: IncomingStream, receive: Receive) -> None:
    if await wait_for_disconnect(receive):
        incoming.close()


def _as_they_are(piece: StreamPiece) -> bytes:
    if piece.codec not in _AS_THEY_ARE:
        raise _mixed(piece, "strings and bytes")
    return piece.body


class _Lines:
    """Writes each value as a line of JSON."""

    def __init__(self) -> None:
        self._text: list[bytes] = []

    def __call__(self, piece: StreamPiece) -> bytes:
        codec, body, more = piece
        if codec == "text":  # to be quoted as a whole
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
