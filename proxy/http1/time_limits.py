"""Time limits of one HTTP connection, so that none stays open for a client that neither sends nor reads."""

from __future__ import annotations

import time
from enum import Enum, auto

KEEP_ALIVE_S = 65.0
"""Idle connections are closed after this long: above the 60 s of common load balancers, so that they close first."""

HEAD_TIMEOUT_S = 15.0
"""A client that has begun a request must have sent its head by then, and a new connection its first request."""

STALL_TIMEOUT_S = 60.0
"""A connection whose client reads no byte of a response for this long is aborted."""

# As nginx's lingering_timeout and lingering_time.
_LINGER_IDLE_S = 5.0
_LINGER_S = 30.0


class Overdue(Enum):
    """The limit that a connection has exceeded."""

    IDLE = auto()
    """It has no request for too long."""
    HEAD = auto()
    """The head of a request is incomplete for too long."""
    UNREAD = auto()
    """The client reads nothing of a response for too long."""
    LINGERING = auto()
    """A lingering close takes too long."""


class TimeLimits:
    """Decides when a connection has to end. The connection reports its events, and calls `overdue` every second."""

    __slots__ = (
        "_has_answered",
        "_head_since",
        "_idle_since",
        "_lingering_since",
        "_received_at",
        "_unsent",
        "_unsent_at",
    )

    def __init__(self) -> None:
        self._idle_since = time.monotonic()
        self._has_answered = False
        self._head_since: float | None = None
        self._lingering_since: float | None = None
        self._received_at = 0.0
        self._unsent = 0
        self._unsent_at = 0.0

    def response_ended(self) -> None:
        """Record the end of a response. From here on the connection is idle."""
        self._idle_since, self._has_answered = time.monotonic(), True

    def input_parsed(self, *, in_head: bool) -> None:
        """Record whether all that was received ended inside a head."""
        if not in_head:
            self._head_since = None
        elif self._head_since is None:
            self._head_since = time.monotonic()

    def linger(self) -> None:
        """Record the beginning of a lingering close."""
        self._lingering_since = self._received_at = time.monotonic()

    def received_while_lingering(self) -> None:
        """Record that data arrived during a lingering close."""
        self._received_at = time.monotonic()

    def overdue(self, now_s: float, *, unsent_bytes: int, in_head: bool, is_busy: bool) -> Overdue | None:
        """Return the limit that the connection has exceeded, or None.

        Args:
            now_s: the time of ``time.monotonic``.
            unsent_bytes: bytes of responses that the kernel has not taken.
            in_head: whether a head has begun and is incomplete.
            is_busy: whether a request awaits its response.
        """
        if unsent_bytes == 0 or unsent_bytes != self._unsent:
            self._unsent, self._unsent_at = unsent_bytes, now_s
        elif now_s - self._unsent_at > STALL_TIMEOUT_S:
            return Overdue.UNREAD
        if self._lingering_since is not None:
            if unsent_bytes:
                self._lingering_since = self._received_at = now_s
            elif now_s - self._received_at > _LINGER_IDLE_S or now_s - self._lingering_since > _LINGER_S:
                return Overdue.LINGERING
        elif in_head:
            if self._head_since is not None and now_s - self._head_since > HEAD_TIMEOUT_S:
                return Overdue.HEAD
        elif unsent_bytes:
            self._idle_since = now_s
        elif not is_busy and now_s - self._idle_since > (KEEP_ALIVE_S if self._has_answered else HEAD_TIMEOUT_S):
            return Overdue.IDLE
        return None
