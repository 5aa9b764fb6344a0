"""Large bodies: each lies in a key of its own, with an expiry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...broker.transport.connection import RedisConnection
from ...broker.wire._fields import LARGEST
from ..errors import PayloadTooLarge


def _ignore(result: Any) -> None:
    """Nobody waits for this."""


def too_long(body: bytes, longest: int) -> PayloadTooLarge:
    """Return what is said of a body if a broker takes ``longest`` bytes at the most, as far as is known."""
    return PayloadTooLarge(len(body), longest, "the most that Redis may take by its proto-max-bulk-len")


def check_size(body: bytes, longest: int | None = None) -> None:
    """Raise `PayloadTooLarge` if no broker would take it, or not the one that takes ``longest`` bytes at the most."""
    if longest is not None and longest < len(body) <= LARGEST:
        raise too_long(body, longest)
    if len(body) > LARGEST:
        raise PayloadTooLarge(len(body), LARGEST, "proto-max-bulk-len of Redis")


class LargeBodies:
    """The large bodies that one caller sends and receives, over its connection."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection

    def put(
        self, key: str, body: bytes, ttl_ms: int, then: Callable[[Any], None] = _ignore, *, patient: bool = False
    ) -> None:
        """Write one. Put before its entry is published, it is there before any replica can look for it.

        A broker that refuses writes is `BrokerUnavailable`, at once, unless ``patient``.
        """
        wait = {"patient": patient, "prompt": not patient}
        self._connection.post(then, "SET", key, body, "PX", ttl_ms, repeat=True, bulky=True, **wait)

    async def get(self, key: str) -> bytes | None:
        """Return one, or None if it is gone. Raises `BrokerUnavailable` or `BrokerRefused`."""
        # Not GETDEL: it could not be repeated if the connection broke.
        body: bytes | None = await self._connection.send("GET", key, repeat=True, patient=True, bulky_reply=True)
        return body

    def drop(self, key: str) -> None:
        self._connection.post(_ignore, "UNLINK", key, repeat=True)
