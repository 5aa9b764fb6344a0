"""Requests that ask for another protocol, which a server may ignore (RFC 9110, section 7.8).

httptools stops behind the head of such a request, and would read the body as the next request. A client could smuggle a
request past an intermediary that way. So another parser reads the body. It gets a head with nothing but the framing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import httptools

from . import framing


class _Callbacks(Protocol):
    """The callbacks of httptools."""

    def on_message_begin(self) -> None: ...
    def on_url(self, url: bytes) -> None: ...
    def on_header(self, name: bytes, value: bytes) -> None: ...
    def on_headers_complete(self) -> None: ...
    def on_chunk_header(self) -> None: ...
    def on_body(self, body: bytes) -> None: ...
    def on_message_complete(self) -> None: ...


def parser_for_body(callbacks: _Callbacks, headers: Sequence[tuple[bytes, bytes]]) -> httptools.HttpRequestParser:
    """Return a parser that continues in HTTP/1.1 with the body of a request with ``headers``."""
    parser = httptools.HttpRequestParser(_WithoutFirstHead(callbacks))
    parser.feed_data(b"POST / HTTP/1.1\r\n" + framing.framing_fields(headers) + b"\r\n")
    return parser


class _WithoutFirstHead:
    """Passes all callbacks on, except those of the first head."""

    def __init__(self, callbacks: _Callbacks) -> None:
        self._callbacks, self._is_past_head = callbacks, False
        self.on_chunk_header = callbacks.on_chunk_header
        self.on_body, self.on_message_complete = callbacks.on_body, callbacks.on_message_complete

    def on_message_begin(self) -> None:
        if self._is_past_head:
            self._callbacks.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self._is_past_head:
            self._callbacks.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_past_head:
            self._callbacks.on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_past_head:
            self._callbacks.on_headers_complete()
        self._is_past_head = True
