"""Dead letters: requests that were given up, kept with the history of their deliveries.

An entry that cannot be read is one, and so is one whose every replica died. They stay until somebody looks: what they
are is for a person to say. Replayed, they go onto the batch stream, behind everything interactive.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import orjson

from ..errors import PenstockError, WireError
from ..transport.commands import Arg, Script
from ..transport.connection import RedisConnection
from ..wire._fields import SIZE_FIELD
from ..wire.keys import Keys
from ..wire.requests import Entry
from .group.dead_letter_writer import HISTORY
from .publisher import QueueFull, refusal
from .queued_bytes import NO_LIMIT, RECOUNT, SET_ASIDE, SMALL

_PAGE = 100

# KEYS: the dead letters, the interactive stream, the batch stream, the records of sizes. ARGV: the letter's id, the
# limit of requests, the limit of bytes, the request's bytes, then its fields. Answers the entry's id; what _PUBLISH of
# broker/queue/publisher.py answers for a refused request; or nothing if the letter is gone.
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
local id = redis.call('XADD', KEYS[3], '*', unpack(ARGV, 5))
if bytes > {SMALL} then
  redis.call('HSET', KEYS[4], 'b' .. id, bytes - {SMALL})
  redis.call('HINCRBY', KEYS[4], 'total', bytes - {SMALL})
end
redis.call('XDEL', KEYS[1], ARGV[1])
return id
""")


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One of them."""

    id: str
    """Its place among the dead letters; it begins with when it died, in milliseconds of Unix time."""
    error: str
    """What ended it."""
    deliveries: tuple[Mapping[str, Any], ...]
    """``{"replica", "died_ms"}`` of each replica that died with it."""
    entry: Entry | None
    """The request, or None if it cannot be read. Its body is not here if it is large."""
    fields: tuple[bytes, ...] = field(repr=False)
    """All that lay on the stream: names and values in turn."""

    @property
    def died_ms(self) -> int:
        return int(self.id.partition("-")[0])


class DeadLetterStream:
    """The dead letters of one backend."""

    def __init__(self, connection: RedisConnection, keys: Keys, backend: str) -> None:
        self._connection, self._keys, self._backend = connection, keys, backend
        self._key = keys.dead(backend)

    async def count(self) -> int:
        return int(await self._connection.send("XLEN", self._key, repeat=True))

    async def letters(self) -> AsyncIterator[DeadLetter]:
        """Yield them, oldest first."""
        after = "-"
        while page := await self._connection.send("XRANGE", self._key, after, "+", "COUNT", _PAGE, repeat=True):
            for id_, fields in page:
                yield _read(id_, fields)
            after = f"({page[-1][0].decode()}"

    async def get(self, id_: str) -> DeadLetter | None:
        found = await self._connection.send("XRANGE", self._key, id_, id_, repeat=True)
        return _read(*found[0]) if found else None

    async def body(self, letter: DeadLetter) -> bytes | None:
        """Return the body of the request; None if it was large and has expired, or there is none to be read."""
        if letter.entry is None:
            return None
        if not letter.entry.large:
            return letter.entry.body
        key = self._keys.body(self._backend, letter.entry.id)
        return cast("bytes | None", await self._connection.send("GET", key, repeat=True))

    async def drop(self, id_: str) -> bool:
        """Delete one, with its body; False if it was gone already."""
        letter = await self.get(id_)
        if letter is None:
            return False
        if letter.entry is not None and letter.entry.large:
            await self._connection.send("UNLINK", self._keys.body(self._backend, letter.entry.id), repeat=True)
        return bool(await self._connection.send("XDEL", self._key, id_, repeat=True))

    async def replay(self, letter: DeadLetter, limit: int, limit_bytes: int = NO_LIMIT) -> str | QueueFull | None:
        """Put the request onto the batch stream again, without its deadline, and out of the dead letters.

        Returns the id of the new entry; or what refused it, by the limits that `Publisher.publish` has; or None if the
        letter is gone.

        Raises:
            WireError: it cannot be read, so no replica could.
            PenstockError: its body has expired.
        """
        if letter.entry is None:
            raise WireError(f"the dead letter {letter.id} cannot be read, so no replica could serve it: {letter.error}")
        large = await self.body(letter) if letter.entry.large else b""
        if large is None:
            raise PenstockError(f"the body of the dead letter {letter.id} has expired")
        entry = replace(letter.entry, header=replace(letter.entry.header, deadline_ms=0))
        raw = entry.raw()._replace(large_bytes=len(large))
        fields = raw.fields()
        if raw.size_bytes > SMALL:
            fields += (SIZE_FIELD, b"%d" % raw.size_bytes)
        keys = [self._keys.requests(self._backend), self._keys.batch(self._backend), self._keys.sizes(self._backend)]
        args: list[Arg] = [letter.id, limit, limit_bytes, raw.size_bytes, *fields]
        answer = await self._connection.run_script(_REPLAY, [self._key, *keys], args)
        return refusal(answer) if isinstance(answer, int) else None if answer is None else answer.decode()


def _read(id_: bytes, fields: list[bytes]) -> DeadLetter:
    named = dict(zip(fields[::2], fields[1::2], strict=False))
    history: Any = None
    try:
        history = orjson.loads(named.get(HISTORY, b""))
    except ValueError:
        pass  # whatever lies there is shown
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
