"""Flow control of streamed replies: the reader grants credit, which limits the bytes in flight.

A replica sends at most one window more than the reader has read, so that a slow reader leaves a bounded number of bytes
on the caller's reply stream. The reader reports the total that it has read since the beginning, in a signal to all
replicas of the backend (``broker/queue/signals.py``), so a lost signal does no harm. It repeats the signal every
`REPEAT_S` seconds, which also proves that it is alive.
"""

from __future__ import annotations

from ..transport.connection import RedisConnection
from ..wire.keys import Keys
from .signals import signal

WINDOW = 256 * 1024
"""Window that callers request, in bytes; see ``wire.Header.window``."""
CHUNK = 64 * 1024
"""Most bytes in the body of one part. A larger value is split."""
REPEAT_S = 2.0
"""Seconds between two signals of a reader."""
LAPSE_S = 20.0
"""Seconds without a signal after which the reader counts as dead."""

CREDIT = b"+"
"""First byte of such a signal. A signal that names an entry ref begins with a digit or a letter."""


def grant_credit(connection: RedisConnection, keys: Keys, backend: str, request: str, read_bytes: int) -> None:
    """Report to the replica that runs ``request`` how many bytes of the reply the reader has read in total."""
    signal(connection, keys, backend, b"%b%b %d" % (CREDIT, request.encode(), read_bytes))


def read_credit(message: bytes) -> tuple[str, int]:
    """Return the request's id and the bytes read, from a signal of `grant_credit`. Raises ``ValueError`` for another.

    >>> read_credit(b"+c0ffee-7 4096")
    ('c0ffee-7', 4096)
    """
    request, _, read_bytes = message.removeprefix(CREDIT).partition(b" ")
    return request.decode(), int(read_bytes)
