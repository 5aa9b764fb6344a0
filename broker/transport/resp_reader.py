"""RESP reader: parses replies as they arrive, and reads a large body straight into its final buffer."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from typing import Any, cast

import hiredis

_READ_BYTES = 256 * 1024
"""No less than a Unix socket holds by default (212,992): what is left there waits for another turn of the loop."""
_MORE = object()
_LINE_END = b"\r\n"
_BULK_STRING = ord("$")


class RespReader(asyncio.BufferedProtocol):
    """Reads a connection, in the place of the stream reader that it was opened with.

    A reply is handed over in the very callback of the read that completes it. Through a stream reader it waited for a
    task to be woken, and a large one was copied five times: with both, a body of 10 MiB took 7 ms instead of 2.5.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        on_data: Callable[[], None],
        on_reply: Callable[[Any], None],
        is_body_next: Callable[[], bool],
        reply_error: Callable[[str], Exception],
    ) -> None:
        """Take over from what reads ``transport`` now, which hears of its end all the same.

        ``on_data`` is called for each read, ``on_reply`` for each reply, ``is_body_next`` to know whether the reply
        that comes next is a bulky one. What the server says against a command is passed through ``reply_error``.
        """
        self._transport, self._former = transport, transport.get_protocol()
        self._on_data, self._on_reply, self._is_body_next = on_data, on_reply, is_body_next
        self._parser = hiredis.Reader(replyError=reply_error, notEnoughData=_MORE)
        # It takes any buffer, whatever its annotation says.
        self._feed = cast("Callable[[bytearray, int, int], None]", self._parser.feed)
        self._buffer = bytearray(_READ_BYTES)
        self._view = memoryview(self._buffer)
        self._body: _Body | None = None
        self._between = True
        """The parser is at the end of a reply, not within one."""
        self.bulky = 0
        """How many of the replies that are to come may be bodies."""
        self.ended = asyncio.get_running_loop().create_future()
        """Resolved when the connection has ended; an exception says why."""
        self._closed = False
        # A transport looks at its protocol's kind when it begins to read.
        transport.pause_reading()
        transport.set_protocol(self)
        transport.resume_reading()

    def close(self) -> None:
        """Hand over nothing more."""
        self._closed = True

    # -- the transport's protocol

    def get_buffer(self, sizehint: int) -> memoryview:
        body = self._body
        return self._view if body is None or not body.missing else body.missing

    def buffer_updated(self, nbytes: int) -> None:
        if self._closed:
            return
        self._on_data()
        try:
            if self.bulky:
                self._take_with_bodies(nbytes)
            else:
                self._take(0, nbytes)
        except Exception as e:
            self._end(e)
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._former.connection_lost(exc)
        self._end(exc)

    def _end(self, error: Exception | None) -> None:
        if self._closed or self.ended.done():
            return
        self._closed = True
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)

    # -- from bytes to replies

    def _take(self, start: int, end: int) -> None:
        """Parse what lies in the buffer from ``start`` to ``end``, and hand over what it completes."""
        self._feed(self._buffer, start, end - start)
        parser = self._parser
        while (reply := parser.gets()) is not _MORE:
            self._on_reply(reply)
            if not parser.has_data():
                self._between = True
                return
        self._between = False

    def _take_with_bodies(self, nbytes: int) -> None:
        """Do the same, but have a body that is not all here yet read straight into the bytes that it will be.

        That takes its beginning. So what comes before it is parsed line by line: replies end with lines.
        """
        if self._body is not None and self._body.missing:
            self._body.take(nbytes)
            return
        at = 0
        while at < nbytes:
            if self._body is not None:
                at += self._end_body(nbytes)
            elif not self.bulky:
                self._take(at, nbytes)
                return
            elif self._between and self._is_body_next() and self._begin_body(at, nbytes):
                return
            else:
                end = self._buffer.find(_LINE_END, at, nbytes)
                end = nbytes if end < 0 else end + len(_LINE_END)
                self._take(at, end)
                at = end

    def _begin_body(self, at: int, end: int) -> bool:
        """Return whether a body begins at ``at`` that goes on behind ``end``; all that is here of it is taken then."""
        starts_at = self._buffer.find(_LINE_END, at, end) + len(_LINE_END)
        if self._buffer[at] != _BULK_STRING or starts_at < len(_LINE_END):
            return False
        length, here = int(self._buffer[at + 1 : starts_at]), end - starts_at
        if length <= here:
            return False
        self._body = _Body(length)
        self._body.missing[:here] = self._view[starts_at:end]
        self._body.take(here)
        return True

    def _end_body(self, nbytes: int) -> int:
        """Take what is left of the line end behind a body, and hand that over if it is all; return how much it was."""
        body = self._body
        assert body is not None
        taken = min(nbytes, body.line_end)
        body.line_end -= taken
        if not body.line_end:
            self._body = None
            self._on_reply(body.value())
        return taken


class _Body:
    """A body as it arrives."""

    def __init__(self, length: int) -> None:
        # What CPython's BytesIO returns are the bytes that it wrote into, without a copy.
        self._file = io.BytesIO()
        self._file.seek(length - 1)
        self._file.write(b"\0")
        self.missing = self._file.getbuffer()
        """Where what is still to come is to lie; empty at the end."""
        self.line_end = len(_LINE_END)
        """How many bytes of it are still to come then. They are left for another read, as a transport may hold what it
        was lent of ours until it has told us what it read.
        """

    def take(self, nbytes: int) -> None:
        self.missing = self.missing[nbytes:]

    def value(self) -> bytes:
        self.missing.release()
        self._file.truncate()  # there is nothing to cut off, but it raises an error if a part is still lent
        return self._file.getvalue()
