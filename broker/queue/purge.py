"""Purge of a deleted backend: refuses its queued requests and deletes its keys."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ..errors import WireError
from ..transport.connection import RedisConnection
from ..wire.keys import Keys
from ..wire.replies import Reply
from ..wire.requests import Entry
from .group.reply_sender import ReplySender

log = logging.getLogger(__name__)

_PAGE = 500


async def purge_backend(
    connection: RedisConnection, keys: Keys, backend: str, status: int, error: Mapping[str, Any]
) -> int:
    """Refuse every request of ``backend`` with ``error``, and delete all of its keys, those of dead letters too.

    Its replicas must have ended, and no endpoint may route to it. Returns the number of refused requests with a caller.
    """
    replies = ReplySender(connection, keys, backend)
    refused = 0
    for stream in (keys.requests(backend), keys.batch(backend)):
        after = "-"
        while page := await connection.send("XRANGE", stream, after, "+", "COUNT", _PAGE, repeat=True):
            for _, fields in page:
                refused += _refuse(replies, fields, status, error)
            after = f"({page[-1][0].decode()}"
    await _delete(connection, keys.of_backend(backend))
    return refused


def _refuse(replies: ReplySender, fields: list[bytes], status: int, error: Mapping[str, Any]) -> bool:
    try:
        entry = Entry.of(fields)
    except WireError as e:
        log.error("dropped a request that cannot be read: %s", e)
        return False
    if entry.caller:
        replies.send(entry.caller, Reply(entry.id, status, error=dict(error)).fields())
    return bool(entry.caller)


async def _delete(connection: RedisConnection, pattern: str) -> None:
    cursor: bytes | int = 0
    while True:
        cursor, found = await connection.send("SCAN", cursor, "MATCH", pattern, "COUNT", 1000, repeat=True)
        if found:  # one command, as the keys of a backend share a hash tag
            await connection.send("UNLINK", *found, repeat=True)
        if int(cursor) == 0:
            return
