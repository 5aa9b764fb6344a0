"""Signals to all replicas of a backend: a caller withdrew a request, or work was given back.

Nothing rests on a signal's arrival. It saves work or time; what must hold is written on the request stream. Signals lie
on a short stream of their own that expires, and each replica reads all of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from ..transport.commands import Script
from ..transport.connection import RedisConnection
from ..transport.session import BLOCK_MS
from ..wire.keys import Keys

log = logging.getLogger(__name__)

LOOK = b"look"
"""Work was given back. Any other signal is the place of an entry that its caller gave up."""

_KEPT = 1_000
_TTL_MS = 60_000
_FIELD = b"s"
_RETRY_S = 0.2

# KEYS: the stream. ARGV: how many to keep, the name of the field, the word, milliseconds. What is said is about work
# that was accepted: an answer that streams waits for its reader's word.
_SIGNAL = Script("""#!lua flags=allow-oom
redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', ARGV[2], ARGV[3])
return redis.call('PEXPIRE', KEYS[1], ARGV[4])
""")


def signal(connection: RedisConnection, keys: Keys, backend: str, word: bytes) -> None:
    """Tell all replicas of ``backend``."""
    connection.post_script(_ignore, _SIGNAL, [keys.signals(backend)], [_KEPT, _FIELD, word, _TTL_MS], repeat=True)


class Signals:
    """Hears the signals to one backend, on a connection of its own, from `open` to `close`."""

    def __init__(self, url: str, keys: Keys, backend: str, on_signal: Callable[[bytes], None]) -> None:
        self._key, self._on_signal = keys.signals(backend), on_signal
        self._reads = RedisConnection(url, name="penstock-signals")
        self._last: bytes | str = "$"
        self._closed = False

    async def open(self) -> None:
        """Hear what is said from now on. Raises `BrokerUnavailable`."""
        await self._reads.open()
        self._read()

    async def close(self) -> None:
        self._closed = True
        await self._reads.close()

    def _read(self) -> None:
        if not self._closed:
            self._reads.post(
                self._on_read, "XREAD", "COUNT", 100, "BLOCK", BLOCK_MS, "STREAMS", self._key, self._last, repeat=True
            )

    def _on_read(self, reply: Any) -> None:
        if isinstance(reply, Exception):
            if not self._closed:
                log.debug("cannot hear %s: %s", self._key, reply)
                asyncio.get_running_loop().call_later(_RETRY_S, self._read)
            return
        entries: list[tuple[bytes, list[bytes]]] = reply[0][1] if reply else []
        if entries:
            self._last = entries[-1][0]
        self._read()
        for _, fields in entries:
            self._on_signal(fields[1])


def _ignore(reply: Any) -> None:
    """A signal is a courtesy."""
