"""Flow control of streamed replies: the reader grants how much may be in flight.

A replica sends up to a window's worth ahead of that, so what a slow reader leaves on its caller's stream is bounded.
The grant is a signal to all replicas of the backend (``broker/queue/signals.py``) with the total read since the
beginning, so a lost one does no harm. It is repeated every `REPEAT_S` seconds, which also shows that the reader lives.
"""

from __future__ import annotations

from ..transport.connection import RedisConnection
from ..wire.keys import Keys
from .signals import signal

WINDOW = 256 * 1024
"""What callers ask for; see ``wire.Header.window``."""
CHUNK = 64 * 1024
"""The body of a part has at most so many bytes: values that are larger are cut."""
REPEAT_S = 2.0
LAPSE_S = 20.0
"""A caller that has said nothing for so long is gone."""

TAKEN = b"+"
"""What such a signal begins with. The place of an entry begins with a digit or a letter."""


def tell_taken(connection: RedisConnection, keys: Keys, backend: str, request: str, taken: int) -> None:
    """Tell the replica that answers ``request`` how much of it was taken."""
    signal(connection, keys, backend, b"%b%b %d" % (TAKEN, request.encode(), taken))


def read_taken(word: bytes) -> tuple[str, int]:
    """Return the request and how much was taken. Raises ``ValueError`` for what `tell_taken` did not write.

    >>> read_taken(b"+c0ffee-7 4096")
    ('c0ffee-7', 4096)
    """
    request, _, taken = word.removeprefix(TAKEN).partition(b" ")
    return request.decode(), int(taken)
