"""Requests onto their streams: admission and append in one script, all of a tick's in one call.

Admission counts what is unsettled, waiting and running, over all callers, at the broker: ``XLEN`` has every entry until
it is settled (acknowledged and deleted). So the limit holds exactly at any number of callers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Union

from .commands import COPIED_BYTES, Arg, Script
from .connection import Connection
from .keys import Keys
from .places import place_of
from .signals import signal
from .wire import CALLER_FIELD, HEADER_FIELD, ID_FIELD, VERSION, VERSION_FIELD, RawEntry

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Refused:
    """The queue was full."""

    depth: int
    """How many unsettled entries stood in the way."""
    retry_after_s: float


Published = Union[bytes, Refused, Exception]  # noqa: UP007 - it is evaluated, also on Python 3.10
"""The entry's id on its stream; or that there was no room; or what went wrong."""

_RETRY_S = (1.0, 60.0)


def retry_after_s(oldest_ms: float) -> float:
    """Return when to come back to a full queue whose oldest unsettled entry was accepted ``oldest_ms`` ago.

    While that one waited, all before it were worked off, and the queue filled up behind it. So that is how long the
    queue takes to drain at the rate at which it has drained lately. Where the oldest runs for much longer than the
    others, it is less; at most a minute is asked for in any case, and at least a second.
    """
    at_least, at_most = _RETRY_S
    return min(max(at_least, oldest_ms / 1000), at_most)


# KEYS: the stream to append to, then every stream that counts. ARGV: the limit, then what some entries in a row have in
# common, which is their number, caller and header, and for each of these its id and the name and value of its body's
# field. (As whole entries, five arguments of six were the same for all the calls of a handle.) Answers for each entry
# its id, or the depth that refused it; then, if any was refused, how many milliseconds ago the oldest on the streams
# was accepted. A server out of memory refuses the whole call before it starts, so that nothing is half done.
_PUBLISH = Script(f"""#!lua
local depth = 0
for k = 2, #KEYS do depth = depth + redis.call('XLEN', KEYS[k]) end
local limit = tonumber(ARGV[1])
local out, refused = {{}}, false
local i = 2
while i <= #ARGV do
  local alike, caller, header = tonumber(ARGV[i]), ARGV[i + 1], ARGV[i + 2]
  i = i + 3
  for _ = 1, alike do
    if depth >= limit then
      out[#out + 1], refused = depth, true
    else
      out[#out + 1] = redis.call('XADD', KEYS[1], '*', '{VERSION_FIELD.decode()}', '{VERSION.decode()}',
        '{ID_FIELD.decode()}', ARGV[i], '{CALLER_FIELD.decode()}', caller, '{HEADER_FIELD.decode()}', header,
        ARGV[i + 1], ARGV[i + 2])
      depth = depth + 1
    end
    i = i + 3
  end
end
if refused then
  local now = redis.call('TIME')
  now = now[1] * 1000 + math.floor(now[2] / 1000)
  local oldest = 0
  for k = 2, #KEYS do
    local first = redis.call('XRANGE', KEYS[k], '-', '+', 'COUNT', 1)[1]
    if first then oldest = math.max(oldest, now - string.match(first[1], '^%d+')) end
  end
  out[#out + 1] = oldest
end
return out
""")

# Which of these requests are on the stream? KEYS: the stream. ARGV: the entry id to search from, the name of the field
# that has the request's id, then for each request its id and its entry's, or '' if that is to be searched for. Answers
# with the entry id of each, or ''.
_FIND = Script("""#!lua flags=no-writes
local wanted, out, searching = {}, {}, false
local function match(page)
  for _, entry in ipairs(page) do
    local fields = entry[2]
    for f = 1, #fields, 2 do
      if fields[f] == ARGV[2] then
        local at = wanted[fields[f + 1]]
        if at then out[at] = entry[1] end
      end
    end
  end
end
for i = 3, #ARGV, 2 do
  local at = (i - 1) / 2
  wanted[ARGV[i]], out[at] = at, ''
  if ARGV[i + 1] == '' then
    searching = true
  else
    match(redis.call('XRANGE', KEYS[1], ARGV[i + 1], ARGV[i + 1]))
  end
end
local from = ARGV[1]
while searching do
  local page = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', 500)
  match(page)
  searching = #page == 500
  if searching then from = '(' .. page[#page][1] end
end
return out
""")

# What of one caller is on the stream? KEYS: the stream. ARGV: the names of the fields that have the caller and the
# request's id, then the caller. Answers with the id of each request and that of its entry in turn.
_FIND_OF = Script("""#!lua flags=no-writes
local out, from = {}, '-'
while from do
  local page = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', 500)
  for _, entry in ipairs(page) do
    local fields, named = entry[2], {}
    for f = 1, #fields, 2 do named[fields[f]] = fields[f + 1] end
    if named[ARGV[1]] == ARGV[3] and named[ARGV[2]] then
      out[#out + 1] = named[ARGV[2]]
      out[#out + 1] = entry[1]
    end
  end
  from = #page == 500 and '(' .. page[#page][1] or nil
end
return out
""")

_BATCH_BYTES = 512 * 1024
_BATCH = 64
"""More than either in one script call would hold up the broker's other clients: 500 entries took 4 to 7 ms, and with
128 the web's 99th percentile beside 100,000 items was 4.3 ms and not 3.6, for no more items a second.
"""


class Publisher:
    """Publishes the requests of one process and loop."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection, self._keys = connection, keys
        self._tick: dict[tuple[str, int, bool], list[tuple[RawEntry, Callable[[Published], None]]]] = {}

    def publish(
        self,
        backend: str,
        entry: RawEntry,
        limit: int,
        then: Callable[[Published], None],
        *,
        batch: bool = False,
    ) -> None:
        """Append an entry unless the backend has ``limit`` unsettled ones.

        ``then`` hears what became of it, in the reader of the connection.
        Nothing here is repeated by itself: after `FateUnknown` the entry may be on its stream; `find` tells.
        """
        if not self._tick:
            self._connection.join_write(self._flush)
        self._tick.setdefault((backend, limit, batch), []).append((entry, then))

    def _flush(self) -> None:
        tick, self._tick = self._tick, {}
        for (backend, limit, batch), entries in tick.items():
            requests, batches = self._keys.requests(backend), self._keys.batch(backend)
            keys = [batches if batch else requests, requests, batches]
            args: list[Any] = [limit]
            thens: list[Callable[[Published], None]] = []
            alike, caller, header = 0, b"", b""
            size, bulky = 0, False
            for entry, then in entries:
                if entry.header != header or entry.caller != caller or not thens:
                    alike, caller, header = len(args), entry.caller, entry.header
                    args += (0, caller, header)
                    size += len(header)
                args[alike] += 1
                args.append(entry.id)
                args += (name_and_value := entry.body_field())
                thens.append(then)
                length = len(name_and_value[1])
                size += length
                if length > COPIED_BYTES:
                    bulky = True
                if size >= _BATCH_BYTES or len(thens) >= _BATCH:
                    self._connection.post_script(_hand_out(thens), _PUBLISH, keys, args, bulky=bulky)
                    args, thens, size, bulky = [limit], [], 0, False
            if thens:
                self._connection.post_script(_hand_out(thens), _PUBLISH, keys, args, bulky=bulky)

    async def find(
        self,
        backend: str,
        requests: Sequence[tuple[str, bytes | None]],
        since_ms: float,
        *,
        batch: bool = False,
    ) -> list[bytes | None]:
        """Return the entry id of each request that is still on its stream; None for one that is settled or never came.

        ``requests`` are their ids and, where they are known, those of their entries; for the others the stream is
        searched from ``since_ms`` on, Unix time by the broker's clock.
        """
        stream = self._keys.batch(backend) if batch else self._keys.requests(backend)
        args: list[Arg] = [f"{max(0, int(since_ms))}-0", ID_FIELD]
        for id_, entry in requests:
            args += (id_, entry or b"")
        found = await self._connection.run_script(_FIND, [stream], args, repeat=True)
        return [entry or None for entry in found]

    async def find_of(self, backend: str, caller: str) -> dict[bytes, bytes]:
        """Return what of a caller lies on a backend's batch stream: the entry's id by that of the request."""
        found = await self._connection.run_script(
            _FIND_OF, [self._keys.batch(backend)], [CALLER_FIELD, ID_FIELD, caller], repeat=True
        )
        return dict(zip(found[::2], found[1::2], strict=True))

    def withdraw(self, backend: str, entry: bytes, *, batch: bool = False) -> None:
        """Take a request back: never started if it is still waiting, cancelled if a replica holds it and can.

        Deleting it is the mark that lasts: whoever takes it over finds it gone. The signal is for who holds it now.
        """
        stream = self._keys.batch(backend) if batch else self._keys.requests(backend)
        self._connection.post(_ignore, "XDEL", stream, entry, repeat=True)
        signal(self._connection, self._keys, backend, place_of(entry, batch=batch))


def _hand_out(thens: list[Callable[[Published], None]]) -> Callable[[Any], None]:
    def hand_out(reply: Any) -> None:
        results: list[Published] = [reply] * len(thens) if isinstance(reply, Exception) else _read(reply, len(thens))
        for then, result in zip(thens, results, strict=True):
            try:
                then(result)
            except Exception:
                log.exception("a publication's continuation failed")

    return hand_out


def _read(reply: list[Any], count: int) -> list[Published]:
    if len(reply) == count:
        return reply
    after_s = retry_after_s(reply[-1])
    return [one if isinstance(one, bytes) else Refused(one, after_s) for one in reply[:-1]]


def _ignore(reply: Any) -> None:
    """A withdrawal is a courtesy: if it fails, the request runs and its reply is dropped."""
