"""Dead letters: entries that were given up, kept with the history of their deliveries.

An entry becomes a dead letter if it cannot be read, or if it is a poison request. An operator inspects it, and replays
or drops it. A replayed request goes onto the batch stream, behind all interactive requests.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, cast

import orjson

from ...runtime.notebooks import NotebookTable
from ..errors import PenstockError, WireError
from ..transport.commands import Arg, Script
from ..transport.connection import RedisConnection
from ..wire._fields import BODY_FIELD, KEEP_FIELD, SIZE_FIELD
from ..wire.kept import PENDING_S, QUEUED, RUNNING
from ..wire.keys import Keys
from ..wire.requests import Entry
from .dead_letter_limits import BODY_TTL_MS
from .group.dead_letter_writer import HISTORY
from .publisher import QueueFull, refusal
from .queued_bytes import NO_LIMIT, RECOUNT, SET_ASIDE, SMALL

_PAGE = 100

# Moves a dead letter to the batch stream, if the queue has room. KEYS: the dead letters, the interactive stream, the
# batch stream, the records of sizes, and of a kept request its record, its result, the body of that, and the counts of
# kept requests. ARGV: the
# letter's id, the limit of requests, the limit of bytes, the request's bytes; 1 for a kept request, its endpoint, its
# X-Request-Id, milliseconds until its record expires, the beginning of idempotency keys; then the fields of the entry.
# Returns the id of the new entry, and the digest of the idempotency key or nothing; or for a refused request the number
# that _PUBLISH of broker/queue/publisher.py returns; or nothing if the letter is gone. The error that is the result of
# a kept request is deleted: the run of the replay will have another one.
_REPLAY = Script(f"""#!lua
{RECOUNT}
if #redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1]) == 0 then return false end
local depth = redis.call('XLEN', KEYS[2]) + redis.call('XLEN', KEYS[3])
if depth >= tonumber(ARGV[2]) then return depth end
local bytes = math.max({SMALL}, ARGV[4])
local used = {SMALL} * math.max(depth, {SET_ASIDE - 1}) + (redis.call('HGET', KEYS[4], 'total') or 0)
if used + bytes > tonumber(ARGV[3]) then
  local total = recount(KEYS[4], KEYS[2], KEYS[3])
  if total then used = {SMALL} * math.max(depth, {SET_ASIDE - 1}) + total end
  if used + bytes > tonumber(ARGV[3]) then return -1 - used end
end
local id = redis.call('XADD', KEYS[3], '*', unpack(ARGV, 10))
if bytes > {SMALL} then
  redis.call('HSET', KEYS[4], 'b' .. id, bytes - {SMALL})
  redis.call('HINCRBY', KEYS[4], 'total', bytes - {SMALL})
end
redis.call('XDEL', KEYS[1], ARGV[1])
if ARGV[5] == '0' then return {{id}} end
local time = redis.call('TIME')
redis.call('DEL', KEYS[6], KEYS[7])
redis.call('HDEL', KEYS[5], 'finished', 'error', 'progress')
local before = redis.call('HGET', KEYS[5], 'status')
if before == '{RUNNING}' then redis.call('HINCRBY', KEYS[8], '{RUNNING}:' .. ARGV[6], -1) end
if before ~= '{QUEUED}' then redis.call('HINCRBY', KEYS[8], '{QUEUED}:' .. ARGV[6], 1) end
redis.call('HSET', KEYS[5], 'status', '{QUEUED}', 'endpoint', ARGV[6], 'request_id', ARGV[7], 'entry', 'b' .. id)
if redis.call('HEXISTS', KEYS[5], 'created') == 0 then
  redis.call('HSET', KEYS[5], 'created', time[1] .. string.sub('000000' .. time[2], -6, -4))
end
redis.call('PEXPIRE', KEYS[5], ARGV[8])
local key = redis.call('HGET', KEYS[5], 'key')
if not key or key == '' then return {{id}} end
redis.call('PEXPIRE', ARGV[9] .. key, ARGV[8])
return {{id, key}}
""")


# Returns the newest dead letters without their bodies, which may be large. KEYS: the dead letters. ARGV: their number.
_NEWEST = Script(f"""#!lua flags=no-writes
local out = {{}}
for i, letter in ipairs(redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', ARGV[1])) do
  local fields = letter[2]
  for at = 1, #fields, 2 do
    if fields[at] == '{BODY_FIELD.decode()}' then fields[at + 1] = '' end
  end
  out[i] = {{letter[1], fields}}
end
return out
""")


@dataclass(frozen=True, slots=True)
class DeadLetter(NotebookTable):
    """An entry that was given up."""

    id: str
    """Its id on the stream of dead letters. It begins with `died_ms`."""
    error: str
    """Why the entry was given up."""
    deliveries: tuple[Mapping[str, Any], ...]
    """``{"replica", "died_ms"}`` of each replica that died while it held the entry."""
    entry: Entry | None
    """The request; None if it cannot be read. A large body is not included, see `DeadLetterStream.body`."""
    fields: tuple[bytes, ...] = field(repr=False)
    """The fields of the entry and its history: names and values in turn."""

    @property
    def died_ms(self) -> int:
        """When the entry was given up, in milliseconds of Unix time by the broker's clock."""
        return int(self.id.partition("-")[0])

    def __repr__(self) -> str:
        request = "unreadable" if self.entry is None else f"request={self.entry.shown_id!r}"
        return f"DeadLetter({self.id!r}, {request}, error={self.error!r}, deliveries={len(self.deliveries)})"

    def _notebook_fields(self) -> Mapping[str, object]:
        return {
            "id": self.id,
            "died": show_time(self.died_ms),
            "request": "unreadable" if self.entry is None else self.entry.shown_id,
            "error": self.error,
            "died with": "\n".join(self.deaths()),
        }

    def deaths(self) -> list[str]:
        """Return which replica died with it and when, as text, for each delivery."""
        return [f"{death.get('replica')} at {show_time(int(death.get('died_ms') or 0))}" for death in self.deliveries]


def show_time(ms: int) -> str:
    """Return a Unix time in milliseconds as text.

    >>> show_time(1_700_000_000_000)
    '2023-11-14 22:13:20Z'
    """
    return datetime.fromtimestamp(ms / 1000, timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")


class DeadLetterStream:
    """The dead letters of one backend."""

    def __init__(self, connection: RedisConnection, keys: Keys, backend: str) -> None:
        self._connection, self._keys, self._backend = connection, keys, backend
        self._key = keys.dead(backend)

    async def count(self) -> int:
        return int(await self._connection.send("XLEN", self._key, repeat=True))

    async def letters(self) -> AsyncIterator[DeadLetter]:
        """Yield all dead letters, oldest first."""
        after = "-"
        while page := await self._connection.send("XRANGE", self._key, after, "+", "COUNT", _PAGE, repeat=True):
            for id_, fields in page:
                yield _read(id_, fields)
            after = f"({page[-1][0].decode()}"

    async def newest(self, count: int) -> list[DeadLetter]:
        """Return at most ``count`` dead letters without their bodies, the newest first."""
        found = await self._connection.run_script(_NEWEST, [self._key], [count], repeat=True)
        return [_read(id_, fields) for id_, fields in found]

    async def get(self, id_: str) -> DeadLetter | None:
        """Return the dead letter of an id; None if there is none."""
        found = await self._connection.send("XRANGE", self._key, id_, id_, repeat=True)
        return _read(*found[0]) if found else None

    async def body(self, letter: DeadLetter) -> bytes | None:
        """Return the body of the request; None if it was large and has expired, or if the request cannot be read."""
        if letter.entry is None:
            return None
        if not letter.entry.large:
            return letter.entry.body
        key = self._keys.body(self._backend, letter.entry.id)
        return cast("bytes | None", await self._connection.send("GET", key, repeat=True))

    async def drop(self, id_: str) -> bool:
        """Delete a dead letter and its large body; return False if there is none of this id."""
        letter = await self.get(id_)
        if letter is None:
            return False
        if letter.entry is not None and letter.entry.large:
            await self._connection.send("UNLINK", self._keys.body(self._backend, letter.entry.id), repeat=True)
        return bool(await self._connection.send("XDEL", self._key, id_, repeat=True))

    async def replay(self, letter: DeadLetter, limit: int, limit_bytes: int = NO_LIMIT) -> str | QueueFull | None:
        """Move the request back onto the batch stream, without its deadline. A kept one will have another result.

        Returns the id of the new entry; the refusal if the queue has reached one of the limits, which are those of
        `Publisher.publish`; or None if the letter is gone.

        Raises:
            WireError: the entry cannot be read, so no replica could serve it.
            PenstockError: the request's body has expired.
        """
        if letter.entry is None:
            raise WireError(f"the dead letter {letter.id} cannot be read, so no replica could serve it: {letter.error}")
        large = await self.body(letter) if letter.entry.large else b""
        if large is None:
            raise PenstockError(f"the body of the dead letter {letter.id} has expired")
        if letter.entry.large:
            key = self._keys.body(self._backend, letter.entry.id)
            self._connection.post(_ignore_result, "PEXPIRE", key, BODY_TTL_MS, repeat=True)
        entry = replace(letter.entry, header=replace(letter.entry.header, deadline_ms=0))
        raw = entry.raw()._replace(large_bytes=len(large))
        fields = raw.fields()
        is_kept = entry.keep_bytes is not None
        if is_kept:
            fields += (KEEP_FIELD, b"%d" % (entry.keep_bytes or 0))
        if raw.size_bytes > SMALL:
            fields += (SIZE_FIELD, b"%d" % raw.size_bytes)
        keys, backend = self._keys, self._backend
        names = [self._key, keys.requests(backend), keys.batch(backend), keys.sizes(backend)]
        names += [keys.kept(backend, entry.id), keys.result(backend, entry.id), keys.result_body(backend, entry.id)]
        names.append(keys.submitted(backend))
        args: list[Arg] = [letter.id, limit, limit_bytes, raw.size_bytes]
        args += [int(is_kept), entry.header.endpoint, entry.header.request_id, PENDING_S * 1000]
        args += [keys.idempotency_key(backend, ""), *fields]
        result = await self._connection.run_script(_REPLAY, names, args)
        if result is None:
            return None
        if isinstance(result, int):
            return refusal(result)
        id_, *key = result
        if key:  # in another slot of a cluster
            choice = keys.key_backend(key[0].decode())
            await self._connection.send("PEXPIRE", choice, PENDING_S * 1000, repeat=True)
        return str(id_.decode())


def _ignore_result(result: Any) -> None:
    """Ignore an error, such as that of a user whose ACL rules do not allow it: the body expires earlier."""


def _read(id_: bytes, fields: list[bytes]) -> DeadLetter:
    named = dict(zip(fields[::2], fields[1::2], strict=False))
    history: Any = None
    try:
        history = orjson.loads(named.get(HISTORY, b""))
    except ValueError:
        pass  # the other fields are shown nevertheless
    known = cast("dict[str, Any]", history) if isinstance(history, dict) else {}
    deliveries = known.get("deliveries")
    try:
        entry = Entry.of(fields)
    except WireError:
        entry = None
    return DeadLetter(
        id_.decode(),
        str(known.get("error", "")),
        tuple(cast("list[dict[str, Any]]", deliveries)) if isinstance(deliveries, list) else (),
        entry,
        tuple(fields),
    )
