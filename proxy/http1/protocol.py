"""HTTP/1.1 connections: uvicorn's protocol, strict about framing, with bounds on what one connection costs and holds.

A connection has one request at a time. The parser is fed up to the end of a message and no further: what a client
pipelines behind it waits as bytes, and reading stops when there are many of them. So answers leave in the order of
their requests, and a connection that is lost leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import logging
import time
import urllib.parse
from collections.abc import Callable
from typing import Any, cast

import httptools
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from .. import responses
from ..disconnects import is_at_eof, is_reset
from ..response_streaming import CutOff
from . import framing
from .connection_limit import ConnectionLimit
from .writer import ConnectionWriter

logger = logging.getLogger("penstock.proxy")

MAX_PIPELINED_BYTES = 64 * 1024
"""Reading stops while more than this waits behind a request that is not answered. One read may exceed it."""

KEEP_ALIVE_S = 65.0
"""Idle connections are closed after this long: above the 60 s of common load balancers, so that they close first."""

HEAD_TIMEOUT_S = 15.0
"""A client that has begun a request must have sent its head by then, and a new connection its first request."""

STALL_TIMEOUT_S = 60.0
"""A client that takes nothing of its answer for so long is cut off."""

HALF_CLOSED_S = 0.05
"""How long after a client's end of data it is looked whether the client is still there. Doubles up to a second."""

# After nginx's lingering_timeout and lingering_time.
_LINGER_IDLE_S = 5.0
_LINGER_S = 30.0

_COPIED_BYTES = 4 * 1024
"""Copying a piece of less than this costs less than a memoryview of it."""

_LINGERING_REFUSALS = 1_000
"""Connections beyond `ConnectionLimit.maximum` that are closed with care at a time. Others are closed at once."""


class Protocol(HttpToolsProtocol):
    """One connection: feeds the parser, runs the application, and ends what would last for ever.

    It ends slow and long heads, answers that are not read, and idle connections. It closes with a delay (a lingering
    close): to close a connection on which the client still sends resets it, and the client may lose the answer before
    it is read. So only the sending direction is shut down, and what still arrives is dropped for a while.
    """

    _app_checks_framing = False
    """Set by a subclass whose application calls `framing.refusal` itself, where it costs less."""

    _is_counted = False
    _in_head = False
    """A head has begun and is not complete."""
    _in_body = False
    """A head is complete, its message is not."""
    _is_busy = False
    """A request is not answered yet."""
    _head_bytes = 0
    """Bytes of the head that is being read; of blank lines before it, too."""
    _head_since = 0.0
    _body_left: int | None = None
    """Bytes of the body that is being read, or `framing.CHUNKED`; None before its first one."""
    _trailers: framing.DiscardedTrailers
    """Those of the last chunked body."""
    _has_progressed = False
    """The chunked body that is being read had a new chunk, or bytes of one, in the last piece."""
    _stalled_bytes = 0
    """Bytes since it had."""
    _unread = b""
    """What was received and not parsed, from `_at` on."""
    _at = 0
    _last_target = b""
    """The target of the previous request, as most clients of a connection repeat it."""
    _last_path: tuple[str, bytes, bytes]
    """Path, raw path and query string of that."""
    _message_event: Callable[[], asyncio.Event] = asyncio.Event
    """Makes the event by which a cycle waits for more of its body."""
    _idle_since = 0.0
    _has_answered = False
    _unsent = 0
    _unsent_since = 0.0
    _lingering_since = 0.0
    _heard_at = 0.0
    _at_eof = False
    """The client has shut down its sending direction."""
    _presence_check: asyncio.TimerHandle | None = None
    _begun_early: RequestResponseCycle | None = None
    """The request whose answer was begun early, to see whether its client is still there."""

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

    # -- the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._tcp = cast(asyncio.Transport, transport)
        self._writer = ConnectionWriter(self._tcp, self.close)
        super().connection_made(cast(asyncio.Transport, self._writer))
        self._idle_since = time.monotonic()
        limit = self._limit
        if limit.served < limit.maximum:
            self._is_counted = True
            limit.served += 1
        else:
            limit.refused += 1
            self._refuse_connection()

    def data_received(self, data: bytes) -> None:
        if self._lingering_since:
            self._heard_at = time.monotonic()
        elif self._unread:
            self._unread, self._at = self._unread[self._at :] + data, 0  # reading stops when it is long
            self._writer.set_full(len(self._unread) > MAX_PIPELINED_BYTES)
        elif self._head_bytes == 0 and not self._is_busy and not self.flow.write_paused:
            self._read_usual(data)
        else:
            self._unread = data
            self._read()

    def eof_received(self) -> Any:  # a bool, as asyncio has it; uvicorn's never keeps the connection
        """Keep the connection while an answer is due: a client may shut down its sending direction after its request.

        One that closes its connection sends the same. See `_check_presence`.
        """
        if self._lingering_since or self._in_body or not (self._is_busy or self._unread):
            return False
        if not self._at_eof:
            self._at_eof = True
            if self._presence_check is None:
                self._check_presence_in(HALF_CLOSED_S)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        if self._is_counted:
            self._limit.served -= 1
        else:
            self._limit.refused -= 1
        self._unread = b""
        if self._presence_check is not None:
            self._presence_check.cancel()
            self._presence_check = None
        super().connection_lost(exc)
        self.cycle, self._begun_early = cast("RequestResponseCycle", None), None  # the connection may outlive it

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread and not self._is_busy:
            self.loop.call_soon(self._read)

    def shutdown(self) -> None:
        if self._lingering_since:
            self._tcp.close()
        elif not self._in_head and not (self._unread and not self._is_busy):  # a request on its way is still served
            super().shutdown()

    def close(self) -> None:
        """Close the connection once what was written is sent; with a client in the middle of a message, linger."""
        if self._tcp.is_closing() or self._lingering_since:
            return
        self._writer.flush()
        if self._in_head or self._in_body or self._at < len(self._unread):
            self._linger()
        else:
            self._tcp.close()

    def _linger(self) -> None:
        self._lingering_since = self._heard_at = time.monotonic()
        self._unread, self._at = b"", 0
        self._writer.end()
        self._tcp.write_eof()
        self._writer.set_full(False)
        self.flow.resume_reading()

    def give_up(self) -> None:
        """Answer at once what is still waited for. Here nothing is: the tasks of requests have been cancelled."""

    @property
    def waiting_bytes(self) -> int:
        """Bytes that were received and wait for the answer to an earlier request."""
        return len(self._unread) - self._at

    @property
    def unsent_bytes(self) -> int:
        """Bytes of replies that the kernel has not taken yet."""
        return self._tcp.get_write_buffer_size()

    # -- from bytes to messages

    def _read_usual(self, data: bytes) -> None:
        """Feed the parser with what begins with a head: fast where that is one request, and there is nothing else."""
        end = data.find(framing.BLANK_LINE) + len(framing.BLANK_LINE)
        if len(framing.BLANK_LINE) <= end <= framing.MAX_HEAD_BYTES:
            if end == len(data):
                self._head_bytes = end
                self._parse(data)
                return
            if framing.declares_length(data, end, len(data) - end):
                self._head_bytes, parser = end, self.parser
                self._parse(data)
                if self.parser is not parser and not self._lingering_since:  # it stopped behind the head
                    self._unread, self._at = data, end
                    self._read()
                return
        self._unread = data
        self._read()

    def _read(self) -> None:
        """Feed the parser with what was received, up to the end of the message whose answer is awaited."""
        has_begun = False
        while self._at < len(self._unread) and not self.transport.is_closing():
            start = self._at
            if self._in_body:
                self._read_body(start)
            elif not self._in_head and (has_begun or self._is_busy or self.flow.write_paused):
                # The end of the answer, or `resume_writing`, goes on from here, in another turn of the loop.
                break
            else:
                before = self.cycle
                self._read_head(start)
                has_begun = self.cycle is not before
        if self._at == len(self._unread):
            self._unread, self._at = b"", 0
        if self._lingering_since:
            return
        if self._in_head and self._head_since == 0.0:
            self._head_since = time.monotonic()
        self._writer.set_full(self.waiting_bytes > MAX_PIPELINED_BYTES)
        if self._at_eof and not self._is_busy and not self._unread:
            self._tcp.close()  # the rest of a head will not come

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
                # The parser obeys them: after "connection: close" among them it reads no other request.
                self.parser = httptools.HttpRequestParser(self)
            self._stalled_bytes = 0 if self._has_progressed else self._stalled_bytes + end - start
            refusal = self._trailers.refusal(self._stalled_bytes) if self._in_body else None
            if refusal is not None and not self._lingering_since:
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
            self._stay_in_http()
        except httptools.HttpParserError as e:
            self._refuse_unparsable(e)

    def _stay_in_http(self) -> None:
        """Go on in HTTP/1.1 behind a head that asks for another protocol (RFC 9110, section 7.8).

        The parser takes what follows such a head for the other protocol, so it would read a body as the next request:
        one that a client smuggles past an intermediary. Another parser reads the body, and is given only its framing.
        """
        if self._is_cut_short():
            self.parser = httptools.HttpRequestParser(_BehindHead(self))
            self.parser.feed_data(b"POST / HTTP/1.1\r\n" + framing.framing_fields(self.headers) + b"\r\n")

    def _is_cut_short(self) -> bool:
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
        self._head_since, self._body_left = 0.0, None
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
        # A target with an authority has changed the headers as well, so it is read again each time.
        self._last_target = self.url if self.url.startswith(b"/") else b""

    def on_chunk_header(self) -> None:
        self._has_progressed = True

    def on_body(self, body: bytes) -> None:
        self._has_progressed = True
        # A piece that comes alone is kept as it is: uvicorn copies each, and again when the application receives it.
        here: bytearray | bytes = self.cycle.body
        if not here:
            self.cycle.body, body = cast("bytearray", body), b""
        elif isinstance(here, bytes):
            self.cycle.body = bytearray(here)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_cut_short():
            return
        self._in_body, self._head_bytes = False, 0
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        super()._start_asgi_task(cycle, _cutting_off(self, cycle, app))

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        self._is_busy, self._has_answered = False, True
        self._idle_since = time.monotonic()
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
            self._refuse(500, f"the proxy failed with {type(cause).__name__}; its log says more")
        else:
            self._refuse(400, f"the request is not valid HTTP: {error}")

    def _refuse(self, status: int, message: str) -> None:
        """Answer the message that is being read with an error, if it has no answer, and end the connection."""
        logger.warning("refused a request with %d: %s", status, message)
        is_answered = self._in_body
        if self._in_body and self._is_busy:
            is_answered = self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not is_answered:
            self._write_refusal(status, message)
        self._linger()

    def _write_refusal(self, status: int, message: str, *extra: tuple[bytes, bytes]) -> None:
        _, headers, body, _, _ = responses.of_status(status, message, extra)
        length = b"%d" % len(body)
        pairs = [*self.server_state.default_headers, *headers, (b"content-length", length), (b"connection", b"close")]
        head = b"".join(b"%b: %b\r\n" % pair for pair in pairs)
        scope = cast("Scope | None", self.scope)  # None before the first request, whatever uvicorn's annotation says
        if scope is not None and scope.get("method") == "HEAD":
            body = b""
        self._writer.write_response(STATUS_LINE[status] + head + b"\r\n", body)

    def _refuse_connection(self) -> None:
        limit = self._limit
        message = f"the server has {limit.maximum} connections, and takes no more"
        if limit.refused == 1:  # not for each of a flood
            logger.warning("%s", message)
        self._write_refusal(503, message, (b"retry-after", b"1"))
        if limit.refused > _LINGERING_REFUSALS:
            self._tcp.close()
        else:
            self._linger()

    # -- what would last for ever

    def end_if_overdue(self, now: float) -> None:
        """End the connection if its client takes too long over what it is to send or to read."""
        unsent = self._tcp.get_write_buffer_size()
        if unsent == 0 or unsent != self._unsent:
            self._unsent, self._unsent_since = unsent, now
        elif now - self._unsent_since > STALL_TIMEOUT_S:
            self._tcp.abort()
            return
        if self._lingering_since:
            if unsent:
                self._lingering_since = self._heard_at = now
            elif now - self._heard_at > _LINGER_IDLE_S or now - self._lingering_since > _LINGER_S:
                self._tcp.abort()
        elif self._in_head:
            if now - self._head_since > HEAD_TIMEOUT_S:
                self._refuse(408, f"the head of the request did not come within {HEAD_TIMEOUT_S:g} s")
        elif unsent:
            self._idle_since = now
        elif self._writer.is_full and self._presence_check is None and is_at_eof(self._tcp.get_extra_info("socket")):
            self._check_presence_in(HALF_CLOSED_S)  # nothing is read, so `eof_received` is not called
        elif not self._is_busy and now - self._idle_since > (KEEP_ALIVE_S if self._has_answered else HEAD_TIMEOUT_S):
            self.transport.close()

    def _check_presence_in(self, delay_s: float) -> None:
        self._presence_check = self.loop.call_later(delay_s, self._check_presence, delay_s)

    def _check_presence(self, delay_s: float) -> None:
        """Find out whether a client that shut down its sending direction still reads.

        Its system answers what it is sent with a reset if it does not. So the answer is begun with the bytes that are
        the same whatever it becomes: the first ones of a status line, or a leading zero of the next chunk's length.
        """
        if is_reset(self._tcp.get_extra_info("socket")):
            self._tcp.abort()
            return
        cycle = self.cycle
        if self._is_busy and self._begun_early is not cycle:
            self._begun_early = cycle
            if not cycle.response_started:
                self._writer.begin_early()
            elif cycle.chunked_encoding and cycle.scope["method"] != "HEAD":
                self._writer.begin_chunk_early()
        self._check_presence_in(min(2 * delay_s, 1.0))


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
    """The callbacks of a parser that is given a short head in place of one that another parser has read."""

    def __init__(self, protocol: Protocol) -> None:
        self._protocol, self._is_behind = protocol, False
        self.on_chunk_header = protocol.on_chunk_header
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
