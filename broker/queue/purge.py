"""Purge of a deleted backend: its queued requests are refused and its keys deleted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ..errors import WireError
from ..transport.connection import RedisConnection
from ..wire.keys import Keys
from ..wire.replies import Reply
from ..wire.requests import Entry
from .consumer_group import ConsumerGroup

log = logging.getLogger(__name__)

_PAGE = 500


async def retire(connection: RedisConnection, keys: Keys, backend: str, status: int, error: Mapping[str, Any]) -> int:
    """Answer every request of ``backend`` with ``error``, and delete all that it has in the broker, dead letters too.

    No replica of it may run any more, and nobody may publish to it. Returns how many callers were told.
    """
    # Only its way to reply is used; it claims nothing.
    claims = ConsumerGroup(connection, connection, keys, backend, "")
    told = 0
    for stream in (keys.requests(backend), keys.batch(backend)):
        after = "-"
        while page := await connection.send("XRANGE", stream, after, "+", "COUNT", _PAGE, repeat=True):
            for _, fields in page:
                told += _refuse(claims, fields, status, error)
            after = f"({page[-1][0].decode()}"
    await _delete(connection, keys.of_backend(backend))
    return told


def _refuse(claims: ConsumerGroup, fields: list[bytes], status: int, error: Mapping[str, Any]) -> bool:
    try:
        entry = Entry.of(fields)
    except WireError as e:
        log.error("dropped a request that cannot be read: %s", e)
        return False
    if entry.caller:
        claims.reply(entry.caller, Reply(entry.id, status, error=dict(error)).fields())
    return bool(entry.caller)


async def _delete(connection: RedisConnection, pattern: str) -> None:
    cursor: bytes | int = 0
    while True:
        cursor, found = await connection.send("SCAN", cursor, "MATCH", pattern, "COUNT", 1000, repeat=True)
        if found:  # they share a hash tag
            await connection.send("UNLINK", *found, repeat=True)
        if int(cursor) == 0:
            return
