"""Writer of an HTTP connection. The ASGI path and the fast path share it, so that responses keep their order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

JOINED_BYTES = 64 * 1024
"""Copying a longer body behind its head costs more than a system call."""

_STATUS_LINE_START = b"HTTP/1.1 "


class ConnectionWriter:
    """An asyncio transport that sends head and body of a response in one write.

    uvicorn writes them separately, and the second system call cost a tenth of the proxy's time. A head without a body
    is sent at the end of the current turn of the event loop.

    Args:
        tcp: the transport of the connection.
        close: closes the connection; ``close`` of this transport calls it.
    """

    def __init__(self, tcp: asyncio.Transport, close: Callable[[], None]) -> None:
        self._tcp, self._protocol_close = tcp, close
        self._head = b""
        self._loop = asyncio.get_running_loop()
        self.abort = tcp.abort
        self.get_extra_info, self.set_protocol = tcp.get_extra_info, tcp.set_protocol
        self._is_closing = False
        self._has_begun_early = False
        self._is_paused = False
        self.is_full = False
        """Whether reading is paused because of pipelined requests."""

    def write(self, data: bytes) -> None:
        if self._is_closing:
            return  # such as the response to a request whose body was refused as malformed
        if self._head:
            if len(data) <= JOINED_BYTES:
                data = self._head + data
            else:
                self._tcp.write(self._head)
            self._head = b""
            self._tcp.write(data)
        elif data.startswith(_STATUS_LINE_START):
            if self._has_begun_early:
                data = self._rest_of(data)
            self._head = data
            self._loop.call_soon(self.flush)
        else:
            self._tcp.write(data)

    def write_response(self, head: bytes, body: bytes) -> None:
        """Write a whole response."""
        if self._head:
            self.flush()
        if self._has_begun_early:
            head = self._rest_of(head)
        if len(body) > JOINED_BYTES:
            self._tcp.write(head)
            self._tcp.write(body)
        else:
            self._tcp.write(head + body)

    def begin_early(self) -> None:
        """Send the first bytes of a status line, which all responses share; the response then omits them."""
        if not self._has_begun_early:
            self._has_begun_early = True
            self._tcp.write(_STATUS_LINE_START)

    def begin_chunk_early(self) -> None:
        """Send a leading zero of the next chunk's length (RFC 9112, section 7.1)."""
        self.flush()
        self._tcp.write(b"0")

    def flush(self) -> None:
        """Send a head that waits for its body."""
        if self._head:
            head, self._head = self._head, b""
            self._tcp.write(head)

    def end(self) -> None:
        """Flush, and drop later writes."""
        self.flush()
        self._is_closing = True

    def close(self) -> None:
        self._is_closing = True
        self._protocol_close()

    def is_closing(self) -> bool:
        return self._is_closing or self._tcp.is_closing()

    # Reading is paused for either of two reasons: uvicorn has a body that the application has not received, or
    # pipelined requests wait. It resumes when neither holds.

    def pause_reading(self) -> None:
        self._is_paused = True
        self._tcp.pause_reading()

    def resume_reading(self) -> None:
        self._is_paused = False
        if not self.is_full:
            self._tcp.resume_reading()

    def set_full(self, is_full: bool) -> None:
        """Pause or resume reading because of pipelined requests."""
        if is_full == self.is_full:
            return
        self.is_full = is_full
        if is_full:
            self._tcp.pause_reading()
        elif not self._is_paused:
            self._tcp.resume_reading()

    def _rest_of(self, head: bytes) -> bytes:
        self._has_begun_early = False
        return head[len(_STATUS_LINE_START) :]
