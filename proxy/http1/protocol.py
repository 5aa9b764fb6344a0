"""HTTP/1.1 connections: uvicorn's protocol with strict framing and with limits on the time and memory of a connection.

A connection has one request at a time. The parser is fed up to the end of a message and no further: pipelined requests
wait as bytes, and reading pauses when there are many of them. So responses leave in the order of their requests, and
a connection that is lost leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import logging
import urllib.parse
from collections.abc import Callable
from typing import Any, cast

import httptools
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from .. import responses
from ..response_streaming import CutOff
from . import framing, time_limits
from .connection_limit import ConnectionLimit
from .disconnects import is_at_eof
from .ignored_upgrade import parser_for_body
from .presence import PresenceCheck
from .time_limits import Overdue, TimeLimits
from .writer import ConnectionWriter

logger = logging.getLogger("penstock.proxy")

MAX_PIPELINED_BYTES = 64 * 1024
"""Reading pauses while more than this waits behind an unanswered request. One read may exceed it."""

_COPIED_BYTES = 4 * 1024
"""Copying a piece of less than this costs less than a memoryview of it."""

_LINGERING_REFUSALS = 1_000
"""Connections beyond `ConnectionLimit.maximum` that get a lingering close at a time. Others are closed at once."""


class Protocol(HttpToolsProtocol):
    """One connection: feeds the parser, runs the application, refuses invalid requests and enforces `TimeLimits`.

    A connection whose client still sends gets a lingering close. To close it at once would reset it, and the client
    could lose the response before it reads it. So only the sending direction is shut down, and later bytes are dropped
    for a while.
    """

    _app_checks_framing = False
    """Whether the application calls `framing.refusal` itself, where the check costs less."""

    _is_counted = False
    """Whether the connection counts as served; one beyond the limit counts as refused."""
    _in_head = False
    """Whether a head has begun and is incomplete."""
    _in_body = False
    """Whether a head is complete and its message is not."""
    _is_busy = False
    """Whether a request awaits its response."""
    _head_bytes = 0
    """Bytes of the current head, blank lines before it included."""
    _body_left: int | None = None
    """Bytes that the current body still lacks, or `framing.CHUNKED`; None before its first piece."""
    _trailers: framing.DiscardedTrailers
    """Trailers of the last chunked body."""
    _has_progressed = False
    """Whether the last piece of the current chunked body had the beginning or bytes of a chunk."""
    _stalled_bytes = 0
    """Bytes since the last piece that had."""
    _unread = b""
    """Received bytes, of which those from `_at` on are not parsed."""
    _at = 0
    _last_target = b""
    """Target of the previous request: most clients repeat it on a connection."""
    _last_path: tuple[str, bytes, bytes]
    """Path, raw path and query string of that target."""
    _message_event: Callable[[], asyncio.Event] = asyncio.Event
    """Makes the event through which a cycle waits for more of its body."""
    _is_lingering = False
    """Whether a lingering close has begun."""
    _at_eof = False
    """Whether the client has shut down its sending direction."""
    _presence_check: PresenceCheck | None = None

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limit: ConnectionLimit,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limit = limit
        self._blank_lines = framing.BlankLines()
        self._time_limits = TimeLimits()

    # -- the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._tcp = cast(asyncio.Transport, transport)
        self._writer = ConnectionWriter(self._tcp, self.close)
        super().connection_made(cast(asyncio.Transport, self._writer))
        limit = self._limit
        if limit.served < limit.maximum:
            self._is_counted = True
            limit.served += 1
        else:
            limit.refused += 1
            self._refuse_connection()

    def data_received(self, data: bytes) -> None:
        if self._is_lingering:
            self._time_limits.received_while_lingering()
        elif self._unread:
            self._unread, self._at = self._unread[self._at :] + data, 0  # short: reading pauses when it is long
            self._writer.set_full(len(self._unread) > MAX_PIPELINED_BYTES)
        elif self._head_bytes == 0 and not self._is_busy and not self.flow.write_paused:
            self._read_usual(data)
        else:
            self._unread = data
            self._read()

    def eof_received(self) -> Any:  # bool, as asyncio declares it; uvicorn's never keeps the connection
        """Keep the connection while a request awaits its response, and check whether the client still reads."""
        if self._is_lingering or self._in_body or not (self._is_busy or self._unread):
            return False
        if not self._at_eof:
            self._at_eof = True
            self._check_presence()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        if self._is_counted:
            self._limit.served -= 1
        else:
            self._limit.refused -= 1
        self._unread = b""
        if self._presence_check is not None:
            self._presence_check.stop()
            self._presence_check = None
        super().connection_lost(exc)
        self.cycle = cast("RequestResponseCycle", None)  # the connection may outlive it

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread and not self._is_busy:
            self.loop.call_soon(self._read)

    def shutdown(self) -> None:
        if self._is_lingering:
            self._tcp.close()
        elif not self._in_head and not (self._unread and not self._is_busy):  # a request that has begun is served
            super().shutdown()

    def close(self) -> None:
        """Close the connection once all is sent, with a lingering close if the client may still send."""
        if self._tcp.is_closing() or self._is_lingering:
            return
        self._writer.flush()
        if self._in_head or self._in_body or self._at < len(self._unread):
            self._linger()
        else:
            self._tcp.close()

    def _linger(self) -> None:
        self._is_lingering = True
        self._time_limits.linger()
        self._unread, self._at = b"", 0
        self._writer.end()
        self._tcp.write_eof()
        self._writer.set_full(False)
        self.flow.resume_reading()

    def give_up(self) -> None:
        """Respond at once to a request that awaits its response. Here none does: tasks have been cancelled."""

    @property
    def waiting_bytes(self) -> int:
        """Received bytes that wait for the response to an earlier request."""
        return len(self._unread) - self._at

    @property
    def unsent_bytes(self) -> int:
        """Bytes of replies that the kernel has not taken yet."""
        return self._tcp.get_write_buffer_size()

    # -- from bytes to messages

    def _read_usual(self, data: bytes) -> None:
        """Feed the parser with data that begins with a head, fast if the data is exactly one request."""
        end = data.find(framing.BLANK_LINE) + len(framing.BLANK_LINE)
        if len(framing.BLANK_LINE) <= end <= framing.MAX_HEAD_BYTES:
            if end == len(data):
                self._head_bytes = end
                self._parse(data)
                return
            if framing.declares_length(data, end, len(data) - end):
                self._head_bytes, parser = end, self.parser
                self._parse(data)
                if self.parser is not parser and not self._is_lingering:  # it stopped behind the head
                    self._unread, self._at = data, end
                    self._read()
                return
        self._unread = data
        self._read()

    def _read(self) -> None:
        """Feed the parser with the received data, up to the end of the message that awaits its response."""
        has_begun = False
        while self._at < len(self._unread) and not self.transport.is_closing():
            start = self._at
            if self._in_body:
                self._read_body(start)
            elif not self._in_head and (has_begun or self._is_busy or self.flow.write_paused):
                # The end of the response, or `resume_writing`, continues here, in another turn of the loop.
                break
            else:
                before = self.cycle
                self._read_head(start)
                has_begun = self.cycle is not before
        if self._at == len(self._unread):
            self._unread, self._at = b"", 0
        if self._is_lingering:
            return
        self._time_limits.input_parsed(in_head=self._in_head)
        self._writer.set_full(self.waiting_bytes > MAX_PIPELINED_BYTES)
        if self._at_eof and not self._is_busy and not self._unread:
            self._tcp.close()  # the rest of the head will not arrive

    def _read_head(self, start: int) -> None:
        end = self._at = self._blank_lines.end_of_next(self._unread, start)
        self._blank_lines.passed(self._unread, start, end)
        self._head_bytes += end - start
        if self._head_bytes > framing.MAX_HEAD_BYTES:
            self._refuse(*framing.TOO_LONG_A_HEAD)
        else:
            self._parse(self._unread[start:end])

    def _read_body(self, start: int) -> None:
        if self._body_left is None:
            self._body_left = framing.body_length(self.headers)
            if self._body_left == framing.CHUNKED:
                self._stalled_bytes = 0
                self._trailers = framing.DiscardedTrailers(self._head_bytes, len(self.headers))
                self.headers = cast(Any, self._trailers)
        if self._body_left == framing.CHUNKED:
            end = self._at = self._blank_lines.end_of_next(self._unread, start)
            self._blank_lines.passed(self._unread, start, end)
            self._has_progressed = False
            self._parse(self._piece(start, end))
            if self._trailers and not self._in_body:
                # The parser follows trailers: after "connection: close" among them it reads no further request.
                self.parser = httptools.HttpRequestParser(self)
            self._stalled_bytes = 0 if self._has_progressed else self._stalled_bytes + end - start
            refusal = self._trailers.refusal(self._stalled_bytes) if self._in_body else None
            if refusal is not None and not self._is_lingering:
                self._refuse(*refusal)
        else:
            end = self._at = min(start + self._body_left, len(self._unread))
            self._body_left -= end - start
            self._parse(self._piece(start, end))

    def _piece(self, start: int, end: int) -> bytes | memoryview:
        if end - start < _COPIED_BYTES:
            return self._unread[start:end]
        return memoryview(self._unread)[start:end]

    def _parse(self, data: bytes | memoryview) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            if self._is_cut_short():
                self.parser = parser_for_body(self, self.headers)
        except httptools.HttpParserError as e:
            self._refuse_unparsable(e)

    def _is_cut_short(self) -> bool:
        """Return whether the parser stopped behind a head with a body, because the head asks for another protocol."""
        return self.parser.should_upgrade() and framing.has_framing(self.headers)

    # -- callbacks of the parser

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        scope, headers = self.scope, self.headers
        scope["method"] = self.parser.get_method().decode("ascii")
        version = self.parser.get_http_version()
        if version != "1.1":
            scope["http_version"] = version
            self.expect_100_continue = False  # RFC 9110, section 10.1.1
            if version != "1.0":
                raise framing.Refused(505, f"HTTP/{version} is not served; HTTP/1.1 and HTTP/1.0 are")
        if len(headers) > framing.MAX_HEADER_FIELDS:
            raise framing.Refused(*framing.TOO_MANY_FIELDS)
        if not self._app_checks_framing and (refusal := framing.refusal(headers, version)) is not None:
            raise framing.Refused(*refusal)
        if self.url != self._last_target:
            self._read_target(headers, version)
        scope["path"], scope["raw_path"], scope["query_string"] = self._last_path
        self._in_head, self._in_body, self._is_busy = False, True, True
        self._body_left = None
        self.cycle = RequestResponseCycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=self._message_event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=version != "1.0" and self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        self._start_asgi_task(self.cycle, self.app)

    def _read_target(self, headers: framing.RawHeaders, version: str) -> None:
        target = framing.parsed_target(self.url, headers, version)
        path = target.path.decode("ascii")
        if "%" in path:
            path = urllib.parse.unquote(path)
        self._last_path = self.root_path + path, self.root_path.encode("ascii") + target.path, target.query or b""
        # A target with an authority changes the headers as well, so it is parsed each time.
        self._last_target = self.url if self.url.startswith(b"/") else b""

    def on_chunk_header(self) -> None:
        self._has_progressed = True

    def on_body(self, body: bytes) -> None:
        self._has_progressed = True
        # A single piece is kept without a copy. uvicorn would copy it here, and again when the application receives it.
        received: bytearray | bytes = self.cycle.body
        if not received:
            self.cycle.body, body = cast("bytearray", body), b""
        elif isinstance(received, bytes):
            self.cycle.body = bytearray(received)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_cut_short():
            return
        self._in_body, self._head_bytes = False, 0
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        super()._start_asgi_task(cycle, _closing_when_cut_off(self, cycle, app))

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        self._is_busy = False
        self._time_limits.response_ended()
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self._at < len(self._unread):
            self.loop.call_soon(self._read)
        elif self._at_eof:
            self.close()

    # -- refusing

    def _refuse_unparsable(self, error: httptools.HttpParserError) -> None:
        cause = error.__context__
        if isinstance(cause, framing.Refused):
            self._refuse(*cause.refusal)
        elif isinstance(error, httptools.HttpParserCallbackError) and cause is not None:
            logger.error("a request failed in the proxy", exc_info=cause)
            self._refuse(500, f"the proxy failed with {type(cause).__name__}; see its log")
        else:
            self._refuse(400, f"the request is not valid HTTP: {error}")

    def _refuse(self, status: int, message: str) -> None:
        """Respond to the current message with an error, unless it has a response, and close the connection."""
        logger.warning("refused a request with %d: %s", status, message)
        has_response = self._in_body
        if self._in_body and self._is_busy:
            has_response = self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not has_response:
            self._write_refusal(status, message)
        self._linger()

    def _write_refusal(self, status: int, message: str, *extra: tuple[bytes, bytes]) -> None:
        _, headers, body, _, _ = responses.of_status(status, message, extra)
        length = b"%d" % len(body)
        pairs = [*self.server_state.default_headers, *headers, (b"content-length", length), (b"connection", b"close")]
        head = b"".join(b"%b: %b\r\n" % pair for pair in pairs)
        scope = cast("Scope | None", self.scope)  # None before the first request, unlike uvicorn's annotation
        if scope is not None and scope.get("method") == "HEAD":
            body = b""
        self._writer.write_response(STATUS_LINE[status] + head + b"\r\n", body)

    def _refuse_connection(self) -> None:
        limit = self._limit
        message = f"the server has {limit.maximum} connections and accepts no more"
        if limit.refused == 1:  # once, not for each one of many
            logger.warning("%s", message)
        self._write_refusal(503, message, (b"retry-after", b"1"))
        if limit.refused > _LINGERING_REFUSALS:
            self._tcp.close()
        else:
            self._linger()

    # -- limits of time

    def end_if_overdue(self, now_s: float) -> None:
        """End the connection if it has exceeded one of its `TimeLimits`."""
        unsent = self.unsent_bytes
        exceeded = self._time_limits.overdue(now_s, unsent_bytes=unsent, in_head=self._in_head, is_busy=self._is_busy)
        if exceeded is Overdue.HEAD:
            self._refuse(408, f"the head of the request was incomplete after {time_limits.HEAD_TIMEOUT_S:g} s")
        elif exceeded is Overdue.IDLE:
            self.transport.close()
        elif exceeded is not None:
            self._tcp.abort()
        elif self._writer.is_full and not unsent and is_at_eof(self._tcp.get_extra_info("socket")):
            self._check_presence()  # reading is paused, so `eof_received` is not called

    def _check_presence(self) -> None:
        if self._presence_check is None:
            self._presence_check = PresenceCheck(self._tcp, self._writer, lambda: self.cycle if self._is_busy else None)


def _closing_when_cut_off(protocol: Protocol, cycle: RequestResponseCycle, app: ASGIApp) -> Any:
    """Return ``app`` such that a response that breaks off closes the connection and is not logged as an exception."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except CutOff:
            # No end of the body is sent, so the client notices. "Disconnected" keeps uvicorn from logging its absence.
            cycle.disconnected = True
            protocol.transport.close()

    return run
