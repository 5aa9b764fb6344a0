"""Signals to all replicas of a backend: a request was withdrawn, entries were given back, credit was granted, the
record of the backend was changed, a replica has died.

A signal saves work or time; correctness does not depend on its arrival. Signals lie on a short stream of their own that
expires, and each replica reads all of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

from ..transport.commands import Arg, Script
from ..transport.connection import RedisConnection
from ..transport.session import IDLE_BLOCK_MS, IDLE_STALL_S
from ..wire.keys import Keys

log = logging.getLogger(__name__)

ENTRIES_RETURNED = b"look"
"""The signal that entries were given back. A signal that begins with ``CREDIT`` of ``broker/queue/flow_control.py``
grants credit; any other is the ref of an entry that its caller withdrew.
"""
RECORD_CHANGED = b"record"
"""The signal that the record of the backend was changed."""
_DIED = b"died:"
_SEPARATOR = b"\0"


def died(replicas: Iterable[bytes]) -> bytes:
    """Return the signal that replicas have died and left entries."""
    return _DIED + _SEPARATOR.join(replicas)


def read_died(message: bytes) -> list[bytes] | None:
    """Return the replicas of a signal of `died`; None if it is another one."""
    return message[len(_DIED) :].split(_SEPARATOR) if message.startswith(_DIED) else None


_KEPT = 1_000
"""Most signals on the stream."""
_TTL_MS = 60_000
_FIELD = b"s"
_RETRY_S = 0.2
_RECENT_MS = 1_000
"""Signals of this time before the first reading are received as well; they do no harm."""

# Appends a signal. KEYS: the stream. ARGV: the most signals to keep, the name of the field, the signal, milliseconds
# until the stream expires. With the flag allow-oom, as signals concern accepted requests: a streamed reply waits for
# credit.
_SIGNAL = Script("""#!lua flags=allow-oom
redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', ARGV[2], ARGV[3])
return redis.call('PEXPIRE', KEYS[1], ARGV[4])
""")


def signal(connection: RedisConnection, keys: Keys, backend: str, message: bytes) -> None:
    """Send a signal to all replicas of ``backend``. Errors are ignored."""
    args: list[Arg] = [_KEPT, _FIELD, message, _TTL_MS]
    connection.post_script(_ignore_result, _SIGNAL, [keys.signals(backend)], args, repeat=True)


class Signals:
    """Receives the signals to one backend, on a connection of its own, from `open` to `close`.

    It does not notice by itself that its server is no longer the primary: its owner, which writes, calls `reconnect`.

    Args:
        url: of the broker.
        keys: the keys of the instance.
        backend: tag of the backend.
        on_signal: called with each signal.
    """

    def __init__(self, url: str, keys: Keys, backend: str, on_signal: Callable[[bytes], None]) -> None:
        self._key, self._on_signal = keys.signals(backend), on_signal
        self._reads = RedisConnection(url, name="penstock-signals", probes=False, stall_s=IDLE_STALL_S)
        self._last: bytes | str = "0"
        self._closed = False

    async def open(self) -> None:
        """Receive the signals that are sent from now on, and those of the last moment. Raises `BrokerUnavailable`."""
        await self._reads.open()
        # Not "$", the end of the stream: a signal between two readings that found none would be lost.
        self._last = f"{int(self._reads.now_ms()) - _RECENT_MS}-0"
        self._read()

    def reconnect(self) -> None:
        """Connect again: the address may lead to another server by now."""
        self._reads.reconnect("another connection to the broker was lost")

    async def close(self) -> None:
        self._closed = True
        await self._reads.close()

    def _read(self) -> None:
        if not self._closed:
            self._reads.post(
                self._on_read,
                *("XREAD", "COUNT", 100, "BLOCK", IDLE_BLOCK_MS, "STREAMS", self._key, self._last),
                repeat=True,
            )

    def _on_read(self, reply: Any) -> None:
        if isinstance(reply, Exception):
            if not self._closed:
                log.debug("cannot read signals from %s: %s", self._key, reply)
                asyncio.get_running_loop().call_later(_RETRY_S, self._read)
            return
        entries: list[tuple[bytes, list[bytes]]] = reply[0][1] if reply else []
        if entries:
            self._last = entries[-1][0]
        self._read()
        for _, fields in entries:
            self._on_signal(fields[1])


def _ignore_result(reply: Any) -> None:
    """Ignore a failed signal: correctness does not depend on it."""
