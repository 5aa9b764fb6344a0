"""Moves entries that were given up to the dead letters of their backend, and drops the oldest dead letters."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import orjson

from ...transport.commands import Arg, Script
from ...wire._fields import ID_FIELD, LARGE_FIELD
from ...wire.entry_ref import id_of, is_batch
from ..dead_letter_limits import BODY_TTL_MS, DEAD_FIELD, DROP, DROP_OLDEST, DeadLetterReason
from ..queued_bytes import RELEASE
from .member import GROUP, Member
from .pending_entries import RedeliveredEntry

HISTORY = b"history"
"""The field of a dead letter with its error and its deliveries (JSON); the other fields are those of the entry."""

_MOST_FIELDS = 2_000
"""Most field names and values of a dead letter, the rest is cut off: Lua's ``unpack`` has a limit."""
_MOST_BYTES = 1024 * 1024
"""Most bytes of its names and values. Requests of Penstock's callers have fewer, except for a very long query."""

# Settles an entry and appends it to the dead letters. KEYS: the stream, the dead letters, the entry's history, the
# records of sizes, the backend's sums. ARGV: group, the entry's id, its ref, the most dead letters to keep, the
# beginning of the keys of bodies, the name of the field for the history, the name of the sum to count it in, the id of
# a request with a large body or nothing, then the history and the fields. Does nothing if the entry is settled already.
# A large body is kept for as long as its letter, unless the user's ACL rules do not allow PEXPIRE.
_ADD = Script(f"""#!lua flags=allow-oom
{RELEASE}
{DROP_OLDEST}
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
redis.call('XDEL', KEYS[1], ARGV[2])
redis.call('XADD', KEYS[2], '*', ARGV[6], unpack(ARGV, 9))
if ARGV[8] ~= '' then redis.pcall('PEXPIRE', ARGV[5] .. ARGV[8], {BODY_TTL_MS}) end
redis.call('HINCRBY', KEYS[5], ARGV[7], 1)
drop_oldest(KEYS[2], KEYS[5], tonumber(ARGV[4]), ARGV[5])
redis.call('DEL', KEYS[3])
release(KEYS[4], {{ARGV[3]}})
return 1
""")


class DeadLetterWriter:
    """Adds dead letters of one backend."""

    def __init__(self, member: Member) -> None:
        self._member = member
        keys, backend = member.keys, member.backend
        self._history_prefix, self._body_prefix = keys.history(backend, ""), keys.body(backend, "")
        self._dead, self._sizes, self._sums = keys.dead(backend), keys.sizes(backend), keys.done(backend)

    async def add(
        self,
        entry: RedeliveredEntry,
        error: str,
        refuse: Callable[[], None] | None = None,
        *,
        reason: DeadLetterReason = "unreadable",
        max_dead_letters: int,
    ) -> None:
        """Move an entry to the dead letters, with the history of its deliveries.

        Args:
            entry: claimed by this replica.
            error: why the entry was given up.
            refuse: posts the reply to the caller. It is called so that both are in one write, the reply first: a caller
                that has the reply finds the dead letter.
            reason: the kind of that, for the stats of the backend.
            max_dead_letters: of more than these the oldest are dropped, and counted.
        """
        commands, ref = self._member.commands, entry.ref
        history_key = self._history_prefix + ref.decode()
        flat = cast("list[bytes]", await commands.send("LRANGE", history_key, 0, -1, repeat=True, patient=True))
        deliveries = [
            {"replica": replica.decode(errors="replace"), "died_ms": int(died)}
            for replica, died in zip(flat[::2], flat[1::2], strict=True)
        ]
        history = orjson.dumps({"error": error, "deliveries": deliveries})
        if refuse is not None:
            refuse()
        await commands.run_script(
            _ADD,
            [self._member.streams[is_batch(ref)], self._dead, history_key, self._sizes, self._sums],
            [
                *(GROUP, id_of(ref), ref, max_dead_letters, self._body_prefix),
                *(HISTORY, DEAD_FIELD + reason.encode(), _id_of_large(entry.fields), history, *_cut(entry.fields)),
            ],
            repeat=True,
            patient=True,
        )

    async def drop_oldest(self, max_dead_letters: int) -> None:
        """Drop dead letters that are too many or too old."""
        args: list[Arg] = [max_dead_letters, self._body_prefix]
        await self._member.commands.run_script(DROP, [self._dead, self._sums], args, repeat=True)


def _id_of_large(fields: list[bytes]) -> bytes:
    """Return the id of a request with a large body; empty for another one."""
    named = dict(zip(fields[::2], fields[1::2], strict=False))
    return named.get(ID_FIELD, b"") if named.get(LARGE_FIELD) == b"1" else b""


def _cut(fields: list[bytes]) -> list[bytes]:
    """Return the fields of an entry as its dead letter keeps them."""
    fields = fields[:_MOST_FIELDS]
    if sum(map(len, fields)) <= _MOST_BYTES:
        return fields
    kept: list[bytes] = []
    left = _MOST_BYTES
    for field in fields:
        kept.append(field[:left])
        left -= len(kept[-1])
    return kept
