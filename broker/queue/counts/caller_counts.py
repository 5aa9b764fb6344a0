"""Caller counts: how many requests of a backend its callers saw refused, expired and cancelled.

Each process adds its counts to sums at the broker once a second, and only while there are any: the replies of accepted
requests cost nothing. The sums are kept for `KEPT_S` after the last of them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, Literal, cast

from ...transport.commands import Arg, Script
from ...transport.connection import RedisConnection
from ...wire.keys import Keys

CallerCount = Literal["refused", "expired", "cancelled"]
"""The end of a request without a reply: refused by admission; expired at its deadline; cancelled by its caller."""

KEPT_S = 30 * 24 * 3600

_EVERY_S = 1.0

# KEYS: the sums. ARGV: their expiry in seconds, then names of counts, each followed by the number to add.
_ADD = Script("""#!lua
for i = 2, #ARGV, 2 do redis.call('HINCRBY', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('EXPIRE', KEYS[1], ARGV[1])
""")


class CallerCounts:
    """The counts of one process and event loop. A count that the broker does not take is lost."""

    def __init__(self, connection: RedisConnection, keys: Keys) -> None:
        self._connection, self._keys = connection, keys
        self._counts: dict[str, Counter[str]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, backend: str, name: CallerCount) -> None:
        """Count one request of ``backend``."""
        self._counts.setdefault(backend, Counter())[name] += 1
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_EVERY_S, self.send)

    def send(self) -> None:
        """Send the counts now."""
        self.close()
        counts, self._counts = self._counts, {}
        for backend, counted in counts.items():
            args: list[Arg] = [KEPT_S, *(item for pair in counted.items() for item in pair)]
            self._connection.post_script(_ignore, _ADD, [self._keys.calls(backend)], args, prompt=True)

    def close(self) -> None:
        """Send nothing more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


async def read_caller_counts(connection: RedisConnection, keys: Keys, backend: str) -> dict[str, int]:
    """Return the sums of ``backend`` by the names of `CallerCount`. Raises `BrokerUnavailable`."""
    flat = cast("list[bytes]", await connection.send("HGETALL", keys.calls(backend), repeat=True))
    return {name.decode(errors="replace"): int(count) for name, count in zip(flat[::2], flat[1::2], strict=True)}


def _ignore(reply: Any) -> None:
    """Ignore an error: counting must not disturb calls."""
