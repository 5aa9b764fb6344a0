"""Check whether a client that shut down its sending direction still reads.

A client may shut down its sending direction after its request and then read the response. A client that closes its
socket sends the same end of data. Only its answer to further data differs: its system resets the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from .disconnects import is_reset
from .writer import ConnectionWriter

HALF_CLOSED_S = 0.05
"""Time from the client's end of data to the first check. It doubles with each check, up to `_LONGEST_S`."""

_LONGEST_S = 1.0


class PresenceCheck:
    """Checks repeatedly until `stop`, and aborts the connection if the client has reset it.

    To make the client's system answer, the response is begun with bytes that do not depend on its outcome: the first
    ones of a status line, or a leading zero of the next chunk's length.

    Args:
        tcp: the transport of the connection.
        writer: its writer.
        unanswered: returns the request that awaits its response, or None.
    """

    def __init__(
        self, tcp: asyncio.Transport, writer: ConnectionWriter, unanswered: Callable[[], RequestResponseCycle | None]
    ) -> None:
        self._tcp, self._writer, self._unanswered = tcp, writer, unanswered
        self._loop = asyncio.get_running_loop()
        self._begun_early: RequestResponseCycle | None = None
        self._timer = self._loop.call_later(HALF_CLOSED_S, self._check, HALF_CLOSED_S)

    def stop(self) -> None:
        """End the checks, and drop every reference to a request."""
        self._timer.cancel()
        self._begun_early = None

    def _check(self, delay_s: float) -> None:
        if is_reset(self._tcp.get_extra_info("socket")):
            self._tcp.abort()
            return
        cycle = self._unanswered()
        if cycle is not None and self._begun_early is not cycle:
            self._begun_early = cycle
            if not cycle.response_started:
                self._writer.begin_early()
            elif cycle.chunked_encoding and cycle.scope["method"] != "HEAD":
                self._writer.begin_chunk_early()
        delay_s = min(2 * delay_s, _LONGEST_S)
        self._timer = self._loop.call_later(delay_s, self._check, delay_s)
