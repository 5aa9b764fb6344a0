"""Dead letters: requests that nobody could serve, kept with the history of how that came about.

An entry that cannot be read is one, and so is one whose every replica died. They stay until somebody looks: what they
are is for a person to say. Replayed, they go onto the batch stream, behind everything interactive.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import orjson

from .claims import HISTORY
from .commands import Arg, Script
from .connection import Connection
from .errors import PenstockError, WireError
from .keys import Keys
from .wire import Entry

_PAGE = 100

# KEYS: the dead letters, the stream to append to, and every stream that counts. ARGV: the letter's id, the limit, then
# the fields. Answers the entry's id; the depth that refused it; or nothing if the letter is gone.
_REPLAY = Script("""#!lua
if #redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1]) == 0 then return false end
local depth = 0
for k = 3, #KEYS do depth = depth + redis.call('XLEN', KEYS[k]) end
if depth >= tonumber(ARGV[2]) then return depth end
local id = redis.call('XADD', KEYS[2], '*', unpack(ARGV, 3))
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
    fields: tuple[bytes, ...]
    """All that lay on the stream: names and values in turn."""

    @property
    def died_ms(self) -> int:
        return int(self.id.partition("-")[0])


class DeadQueue:
    """The dead letters of one backend."""

    def __init__(self, connection: Connection, keys: Keys, backend: str) -> None:
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

    async def replay(self, letter: DeadLetter, limit: int) -> str | int | None:
        """Put the request onto the batch stream again, without its deadline, and out of the dead letters.

        Returns the id of the new entry; or the number of unsettled requests that refused it, as they are ``limit`` or
        more; or None if the letter is gone.

        Raises:
            WireError: it cannot be read, so no replica could.
            PenstockError: its body has expired.
        """
        if letter.entry is None:
            raise WireError(f"the dead letter {letter.id} cannot be read, so no replica could serve it: {letter.error}")
        if letter.entry.large and await self.body(letter) is None:
            raise PenstockError(f"the body of the dead letter {letter.id} has expired")
        entry = replace(letter.entry, header=replace(letter.entry.header, deadline_ms=0))
        requests, batch = self._keys.requests(self._backend), self._keys.batch(self._backend)
        args: list[Arg] = [letter.id, limit, *entry.fields()]
        answer = await self._connection.run_script(_REPLAY, [self._key, batch, requests, batch], args)
        return answer.decode() if isinstance(answer, bytes) else cast("int | None", answer)


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
