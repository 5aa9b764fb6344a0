"""uvicorn's protocol, with an end to what it would wait for for ever, and head and body of an answer in one write."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import httptools
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from .streaming import CutOff

logger = logging.getLogger("penstock.proxy")

MAX_HEAD_BYTES = 64 * 1024
"""Longer request lines and headers are refused with 431. What arrives in one read is only looked at beyond this."""

HEAD_TIMEOUT_S = 15.0
"""A client that has begun a request must have sent its headers by then."""

STALL_TIMEOUT_S = 60.0
"""A client that takes nothing of its answer for so long is cut off."""

JOINED_BYTES = 64 * 1024
"""Copying a longer body behind its head costs more than a system call."""

_HEAD_TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_FRAMING = (b"content-length", b"transfer-encoding")
# After nginx's lingering_timeout and lingering_time.
_LINGER_IDLE_S = 5.0
_LINGER_S = 30.0


class Protocol(HttpToolsProtocol):
    """uvicorn's, with an end to what it would wait for for ever: long heads, slow heads, answers that nobody reads.

    And with a lingering close: to close a connection on which the client still sends resets it, and may so take the
    answer away before the client has read it. We only end our direction then, and drop what still comes for a while.
    """

    _head_bytes = 0
    _head_since = 0.0
    _unsent = 0
    _unsent_since = 0.0
    _lingering_since = 0.0
    _heard_at = 0.0
    _parsed = b""
    """What the parser is being fed."""
    _unparsed = b""
    """What it left, as it took the head before that for the last one in HTTP."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._tcp = cast(asyncio.Transport, transport)
        self._corked = _Transport(self._tcp, self.close)
        super().connection_made(cast(asyncio.Transport, self._corked))
        self._head_since = time.monotonic()  # a client that connects has as long for its first request

    def data_received(self, data: bytes) -> None:
        if self._lingering_since:
            self._heard_at = time.monotonic()
            return
        if (
            len(data) > MAX_HEAD_BYTES
            and self._head_bytes == 0
            and not self._in_body()
            and data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES) < 0
        ):
            self._refuse_head()
            return
        self._parse(data)
        if self._in_head():
            if self._head_bytes == 0:
                self._head_since = time.monotonic()
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse_head()
        else:
            self._head_bytes = 0

    def _parse(self, data: bytes) -> None:
        self._parsed = data
        super().data_received(data)
        while self._unparsed:
            self._parsed, self._unparsed = self._unparsed, b""
            super().data_received(self._parsed)
        self._parsed = b""

    def on_body(self, body: bytes) -> None:
        # A piece that comes alone is kept as it is: uvicorn copies each, and again when the application receives it.
        here: bytearray | bytes = self.cycle.body
        if not here:
            self.cycle.body, body = cast("bytearray", body), b""
        elif isinstance(here, bytes):
            self.cycle.body = bytearray(here)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_cut_short():
            super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        super()._start_asgi_task(cycle, _cutting_off(self, cycle, app))

    def _unsupported_upgrade_warning(self) -> None:
        """Go on in HTTP/1.1 behind a head that asks for another protocol (RFC 9110, section 7.8).

        The parser skips the body there. Whatever came of it in the same read would be lost, and the rest of it would be
        read as the next request: one that a client smuggles past whoever stands before us.
        """
        upgrade = sys.exc_info()[1]
        assert isinstance(upgrade, httptools.HttpParserUpgrade)
        self._unparsed = self._parsed[upgrade.args[0] :]
        if self._is_cut_short():
            framing = b"".join(b"%b: %b\r\n" % pair for pair in self.headers if pair[0] in _FRAMING)
            self.parser = httptools.HttpRequestParser(_BehindHead(self))
            self._unparsed = b"POST / HTTP/1.1\r\n" + framing + b"\r\n" + self._unparsed

    def _is_cut_short(self) -> bool:
        return self.parser.should_upgrade() and any(name in _FRAMING for name, _ in self.headers)

    def shutdown(self) -> None:
        if self._lingering_since:
            self._tcp.close()
        elif not self._has_begun_head():  # a request that is on its way is still served
            super().shutdown()

    def close(self) -> None:
        """Close the connection once what was written is sent; with a client in the middle of a message, linger."""
        if self._tcp.is_closing() or self._lingering_since:
            return
        self._corked.flush()
        if self._has_begun_head() or self._in_body():
            self._linger()
        else:
            self._tcp.close()

    def _linger(self) -> None:
        self._lingering_since = self._heard_at = time.monotonic()
        self._corked.flush()
        self._tcp.write_eof()
        self.flow.resume_reading()

    def give_up(self) -> None:
        """Answer at once what is still waited for. Here nothing is: the tasks of requests have been cancelled."""

    @property
    def unsent_bytes(self) -> int:
        """Bytes of replies that the kernel has not taken yet."""
        return self._tcp.get_write_buffer_size()

    def cut_off_if_stalled(self, now: float) -> None:
        if self._lingering_since:
            if now - self._heard_at > _LINGER_IDLE_S or now - self._lingering_since > _LINGER_S:
                self._tcp.abort()
            return
        if self._in_head() and now - self._head_since > HEAD_TIMEOUT_S:
            self._tcp.abort()
            return
        unsent = self._tcp.get_write_buffer_size()
        if unsent == 0 or unsent != self._unsent:
            self._unsent, self._unsent_since = unsent, now
        elif now - self._unsent_since > STALL_TIMEOUT_S:
            self._tcp.abort()

    def _current(self) -> RequestResponseCycle | None:
        return self.cycle  # None until the first request, whatever its annotation says

    def _in_head(self) -> bool:
        # A message gets its scope with its first byte, and its cycle with the last one of its head.
        cycle = self._current()
        return cycle is None or cycle.scope is not self.scope

    def _has_begun_head(self) -> bool:
        return cast("Scope | None", self.scope) is not None and self._in_head()

    def _in_body(self) -> bool:
        return not self._in_head() and self.cycle.more_body

    def _refuse_head(self) -> None:
        logger.warning("refused a request whose head has more than %d bytes", MAX_HEAD_BYTES)
        cycle = self._current()
        if cycle is None or cycle.response_complete:
            self._corked.flush()
            self._tcp.write(_HEAD_TOO_LONG)
        self._linger()


def _cutting_off(protocol: Protocol, cycle: RequestResponseCycle, app: ASGIApp) -> Any:
    """Return ``app`` with an end to its connection where an answer broke off, which is no failure of ours."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except CutOff:
            # Without its end, so clients know that there was to be more. uvicorn need not complain that it lacks.
            cycle.disconnected = True
            protocol.transport.close()

    return run


class _BehindHead:
    """What a parser calls that reads on behind a head which another one has read, and is fed a short one instead."""

    def __init__(self, protocol: Protocol) -> None:
        self._protocol, self._is_behind = protocol, False
        self.on_body, self.on_message_complete = protocol.on_body, protocol.on_message_complete

    def on_message_begin(self) -> None:
        if self._is_behind:
            self._protocol.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self._is_behind:
            self._protocol.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_behind:
            self._protocol.on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_behind:
            self._protocol.on_headers_complete()
        self._is_behind = True


class _Transport:
    """A transport that holds back the head of an answer until its body comes, and whose ``close`` is the protocol's.

    uvicorn writes head and body apart, and the second system call cost a tenth of the proxy's time. A head whose body
    does not come in the same turn of the loop is sent at its end.
    """

    def __init__(self, tcp: asyncio.Transport, close: Callable[[], None]) -> None:
        self._tcp, self._protocol_close = tcp, close
        self._head = b""
        self._loop = asyncio.get_running_loop()
        self.abort = tcp.abort
        self.pause_reading, self.resume_reading = tcp.pause_reading, tcp.resume_reading
        self.get_extra_info, self.set_protocol = tcp.get_extra_info, tcp.set_protocol
        self._closing = False

    def write(self, data: bytes) -> None:
        if self._closing:
            return  # such as the answer to a request whose body turned out to be none, which has been refused
        if self._head:
            if len(data) <= JOINED_BYTES:
                data = self._head + data
            else:
                self._tcp.write(self._head)
            self._head = b""
            self._tcp.write(data)
        elif data.startswith(b"HTTP/1.1 "):
            self._head = data
            self._loop.call_soon(self.flush)
        else:
            self._tcp.write(data)

    def flush(self) -> None:
        if self._head:
            head, self._head = self._head, b""
            self._tcp.write(head)

    def close(self) -> None:
        self._closing = True
        self._protocol_close()

    def is_closing(self) -> bool:
        return self._closing or self._tcp.is_closing()
