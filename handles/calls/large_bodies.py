"""Large bodies of requests and replies: each is stored in a key of its own, with an expiry (claim check).

A body in an entry passes through Lua, which copies it twice and hashes it, and through the stream, which copies it
twice more. A body in a key of its own is copied by the kernel alone, but costs three more commands, and the replica
one more round trip. So the size from which a request's body is large depends on how busy its caller is: under load the
work of the broker counts, without load the round trip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...broker.transport.connection import RedisConnection
from ...broker.wire._fields import LARGE, LARGEST
from ...broker.wire.keys import Keys
from ..errors import PayloadTooLarge

LEAST_LARGE = 112 * 1024
"""A busy caller keeps bodies of at most this many bytes in the entries of its requests."""
LEAST_LARGE_ALONE = 128 * 1024
"""So does a caller with few calls in flight."""
BUSY_CALLS = 4
"""With so many calls in flight a caller is busy."""
RESERVED = LARGE
"""A body of more bytes is stored only after room for it was reserved. A smaller one is sent together with its entry, as
those are that lie in it: if the entry is refused, the body is deleted.
"""


def is_large(size: int, calls_in_flight: int) -> bool:
    """Return whether a request's body of ``size`` bytes is stored in a key of its own.

    Args:
        size: the number of its bytes.
        calls_in_flight: how many other calls of the caller await their replies.
    """
    return size > (LEAST_LARGE if calls_in_flight >= BUSY_CALLS else LEAST_LARGE_ALONE)


def _ignore_result(result: Any) -> None:
    """Ignore the result of a command. A body that could not be deleted expires."""


def too_long(body: bytes, limit_bytes: int) -> PayloadTooLarge:
    """Return the error for a body of more bytes than this broker takes."""
    return PayloadTooLarge(len(body), limit_bytes, "the most that Redis may take by its proto-max-bulk-len")


def check_size(body: bytes, limit_bytes: int | None = None) -> None:
    """Check the length of a body.

    Args:
        body: the body.
        limit_bytes: the most bytes that the broker takes, as far as is known; None checks only the limit of Redis.

    Raises:
        PayloadTooLarge: the body is longer.
    """
    if limit_bytes is not None and limit_bytes < len(body) <= LARGEST:
        raise too_long(body, limit_bytes)
    if len(body) > LARGEST:
        raise PayloadTooLarge(len(body), LARGEST, "proto-max-bulk-len of Redis")


class LargeBodies:
    """Stores, fetches and deletes the large bodies of one caller's requests and replies."""

    def __init__(self, connection: RedisConnection, keys: Keys, caller: str) -> None:
        """``caller`` is the id of the caller whose replies are fetched."""
        self._connection, self._keys, self._caller = connection, keys, caller

    def store_request_body(
        self,
        backend: str,
        request: str,
        body: bytes,
        ttl_ms: int,
        on_result: Callable[[Any], None] = _ignore_result,
        *,
        patient: bool = False,
    ) -> None:
        """Store the body of a request. Stored before the entry is published, it is there when a replica claims it.

        Args:
            backend: tag of the backend.
            request: id of the request.
            body: the body.
            ttl_ms: milliseconds after which it expires.
            on_result: called with the reply of Redis, or with the exception.
            patient: wait for a broker that is away or refuses writes, instead of failing.
        """
        wait = {"patient": patient, "prompt": not patient}
        key = self._keys.body(backend, request)
        self._connection.post(on_result, "SET", key, body, "PX", ttl_ms, repeat=True, bulky=True, **wait)

    def drop_request_body(self, backend: str, request: str) -> None:
        """Delete the body of a request."""
        self._drop(self._keys.body(backend, request))

    async def fetch_reply_body(self, request: str) -> bytes | None:
        """Return the body of a reply, or None if it has expired.

        Raises:
            BrokerUnavailable: the client was closed before the broker answered.
            BrokerRefused: the broker answered with an error.
        """
        # Not GETDEL, which could not be repeated if the connection broke.
        body: bytes | None = await self._connection.send(
            "GET", self._keys.reply_body(self._caller, request), repeat=True, patient=True, bulky_reply=True
        )
        return body

    def drop_reply_body(self, request: str) -> None:
        """Delete the body of a reply."""
        self._drop(self._keys.reply_body(self._caller, request))

    def _drop(self, key: str) -> None:
        self._connection.post(_ignore_result, "UNLINK", key, repeat=True)
