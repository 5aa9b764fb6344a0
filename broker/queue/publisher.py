"""Publisher: admission and append in one script, all requests of a loop tick in one call.

Admission counts what is unsettled, waiting and running, over all callers, at the broker: ``XLEN`` has every entry until
it is settled (acknowledged and deleted), and ``broker/queue/queued_bytes.py`` its bytes. So both limits hold exactly at
any number of callers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Union

from ..transport.commands import COPIED_BYTES, Arg, Script
from ..transport.connection import RedisConnection
from ..wire._fields import CALLER_FIELD, HEADER_FIELD, ID_FIELD, SIZE_FIELD, VERSION, VERSION_FIELD
from ..wire.entry_ref import ref_of
from ..wire.keys import Keys
from ..wire.replies import LARGE_FIELD
from ..wire.requests import RawEntry
from .queued_bytes import FORGET, NO_LIMIT, OLDEST, RECOUNT, RESERVE, SET_ASIDE, SMALL, WITHDRAW, reservation_of
from .signals import signal

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class QueueFull:
    """The queue was full."""

    depth: int
    """How many unsettled entries stood in the way; where ``in_bytes``, how many bytes they are charged for."""
    retry_after_s: float
    in_bytes: bool = False
    """It was the limit of bytes that refused the request."""


Published = Union[bytes, QueueFull, Exception]  # noqa: UP007 - it is evaluated, also on Python 3.10
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


# Both scripts that publish take and answer the same. KEYS: the stream to append to, the interactive stream, the batch
# stream, the records of sizes. ARGV: the limit of requests, the limit of bytes, then what some entries in a row have in
# common, which is their number, caller and header, and for each of these its id and the name and value of its body's
# field; of a large body, the value is its length. (As whole entries, five arguments of six were the same for all the
# calls of a handle.) They answer for each entry its id; the depth that refused it; or -1 less the bytes that refused
# it. Then, if any was refused, how many milliseconds ago the oldest on the streams was accepted. A server out of memory
# refuses the whole call before it starts, so that nothing is half done.
_FIELDS = f"""'{VERSION_FIELD.decode()}', '{VERSION.decode()}',
        '{ID_FIELD.decode()}', ARGV[i], '{CALLER_FIELD.decode()}', caller, '{HEADER_FIELD.decode()}', header"""

# For small entries, each of which is charged the same: the limit of bytes is one of requests, and the records need no
# look while the queue is short. A look costs the broker a microsecond, as much as a twelfth of the call.
_PUBLISH = Script(f"""#!lua
local depth = redis.call('XLEN', KEYS[2]) + redis.call('XLEN', KEYS[3])
local limit = tonumber(ARGV[1])
local last, total = math.min(limit, {SET_ASIDE}) - 1, nil
local out, refused = {{}}, false
local i = 3
while i <= #ARGV do
  local alike, caller, header = tonumber(ARGV[i]), ARGV[i + 1], ARGV[i + 2]
  i = i + 3
  for _ = 1, alike do
    if depth > last and not total and depth < limit then
      total = redis.call('HGET', KEYS[4], 'total') or 0
      local most = (ARGV[2] - total) / {SMALL}
      if depth + 1 > most then
        {RECOUNT}
        total = recount(KEYS[4], KEYS[2], KEYS[3]) or total
        most = (ARGV[2] - total) / {SMALL}
      end
      last = math.min(limit, most) - 1
    end
    if depth > last then
      out[#out + 1], refused = depth < limit and -1 - {SMALL} * depth - total or depth, true
    else
      out[#out + 1] = redis.call('XADD', KEYS[1], '*', {_FIELDS}, ARGV[i + 1], ARGV[i + 2])
      depth = depth + 1
    end
    i = i + 3
  end
end
if refused then
  {OLDEST}
  out[#out + 1] = oldest_ms(KEYS[2], KEYS[3])
end
return out
""")

# For entries of any size.
_PUBLISH_ANY = Script(f"""#!lua
{RECOUNT}
{OLDEST}
local depth = redis.call('XLEN', KEYS[2]) + redis.call('XLEN', KEYS[3])
local limit, limit_bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
local total, added = tonumber(redis.call('HGET', KEYS[4], 'total') or 0), 0
local on_batch = KEYS[1] == KEYS[3] and 'b' or ''
local out, refused = {{}}, false
local i = 3
while i <= #ARGV do
  local alike, caller, header = tonumber(ARGV[i]), ARGV[i + 1], ARGV[i + 2]
  i = i + 3
  for _ = 1, alike do
    local name, value, reserved = ARGV[i + 1], ARGV[i + 2], false
    local bytes = #header + #value
    if name == '{LARGE_FIELD.decode()}' then
      bytes, value = #header + value, '1'
      local reservation = 'r:' .. redis.sha1hex(ARGV[i])
      local held = redis.call('HGET', KEYS[4], reservation)
      if held then
        redis.call('HDEL', KEYS[4], reservation)
        held, reserved = string.match(held, '^%d+'), true
        total, added = total - held, added - held
      end
    end
    bytes = math.max(bytes, {SMALL})
    if not reserved and {SMALL} * math.max(depth, {SET_ASIDE - 1}) + total + bytes > limit_bytes and depth < limit then
      local counted = recount(KEYS[4], KEYS[2], KEYS[3])
      if counted then total, added = counted, 0 end
    end
    if depth >= limit then
      out[#out + 1], refused = depth, true
    elseif not reserved and {SMALL} * math.max(depth, {SET_ASIDE - 1}) + total + bytes > limit_bytes then
      out[#out + 1], refused = -1 - {SMALL} * math.max(depth, {SET_ASIDE - 1}) - total, true
    else
      local beyond = bytes - {SMALL}
      local entry
      if beyond == 0 then
        entry = redis.call('XADD', KEYS[1], '*', {_FIELDS}, name, value)
      else
        entry = redis.call('XADD', KEYS[1], '*', {_FIELDS}, name, value, '{SIZE_FIELD.decode()}', bytes)
        redis.call('HSET', KEYS[4], on_batch .. entry, beyond)
      end
      out[#out + 1], depth, total, added = entry, depth + 1, total + beyond, added + beyond
    end
    i = i + 3
  end
end
if added ~= 0 then redis.call('HINCRBY', KEYS[4], 'total', added) end
if refused then out[#out + 1] = oldest_ms(KEYS[2], KEYS[3]) end
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

    def __init__(self, connection: RedisConnection, keys: Keys) -> None:
        self._connection, self._keys = connection, keys
        self._tick: dict[tuple[str, int, int, bool], list[tuple[RawEntry, Callable[[Published], None]]]] = {}

    def publish(
        self,
        backend: str,
        entry: RawEntry,
        limit: int,
        then: Callable[[Published], None],
        *,
        batch: bool = False,
        limit_bytes: int = NO_LIMIT,
    ) -> None:
        """Append an entry unless the backend has ``limit`` unsettled ones, or they and it take over ``limit_bytes``.

        ``then`` hears what became of it, in the reader of the connection.
        Nothing here is repeated by itself: after `FateUnknown` the entry may be on its stream; `find` tells. While the
        broker refuses writes it is `BrokerUnavailable`, at once.
        """
        if not self._tick:
            self._connection.join_write(self._flush)
        self._tick.setdefault((backend, limit, limit_bytes, batch), []).append((entry, then))

    def _flush(self) -> None:
        tick, self._tick = self._tick, {}
        for (backend, limit, limit_bytes, batch), entries in tick.items():
            # Without a limit: it was accepted before, and the broker has lost it. It waits while the broker refuses it.
            was_accepted = limit == NO_LIMIT
            wait = {"patient": was_accepted, "prompt": not was_accepted}
            requests, batches = self._keys.requests(backend), self._keys.batch(backend)
            keys = [batches if batch else requests, requests, batches, self._keys.sizes(backend)]
            args: list[Any] = [limit, limit_bytes]
            thens: list[Callable[[Published], None]] = []
            alike, caller, header = 0, b"", b""
            size, bulky, script = 0, False, _PUBLISH
            for entry, then in entries:
                if entry.header != header or entry.caller != caller or not thens:
                    alike, caller, header = len(args), entry.caller, entry.header
                    args += (0, caller, header)
                    size += len(header)
                args[alike] += 1
                args.append(entry.id)
                if entry.body is None:
                    args += (LARGE_FIELD, entry.large_bytes)
                    script = _PUBLISH_ANY
                else:
                    args += entry.body_field()
                    length = len(entry.body)
                    size += length
                    if length + len(header) > SMALL:
                        script = _PUBLISH_ANY
                        if length > COPIED_BYTES:
                            bulky = True
                thens.append(then)
                if size >= _BATCH_BYTES or len(thens) >= _BATCH:
                    self._connection.post_script(_hand_out(thens), script, keys, args, bulky=bulky, **wait)
                    args, thens, size, bulky, script = [limit, limit_bytes], [], 0, False, _PUBLISH
            if thens:
                self._connection.post_script(_hand_out(thens), script, keys, args, bulky=bulky, **wait)

    def reserve(
        self,
        backend: str,
        entry: RawEntry,
        limit: int,
        then: Callable[[QueueFull | Exception | None], None],
        *,
        batch: bool = False,
        limit_bytes: int = NO_LIMIT,
    ) -> None:
        """Ask for room for an entry with a large body, before that is stored; `publish` then uses what was reserved.

        ``then`` gets None if there is room; else what it gets from `publish`.
        """

        def read(reply: Any) -> None:
            if not isinstance(reply, Exception):
                reply = refusal(reply[0], retry_after_s(reply[1])) if reply else None
            try:
                then(reply)
            except Exception:
                log.exception("a reservation's continuation failed")

        keys = [self._keys.requests(backend), self._keys.batch(backend), self._keys.sizes(backend)]
        args: list[Arg] = [limit, limit_bytes, entry.id, max(SMALL, entry.size_bytes)]
        self._connection.post_script(read, RESERVE, keys, args, repeat=True, prompt=True)

    def forget_reservation(self, backend: str, entry: RawEntry) -> None:
        """Release what was reserved for an entry that will not be published."""
        self._connection.post_script(
            _ignore, FORGET, [self._keys.sizes(backend)], [reservation_of(entry.id)], repeat=True, patient=True
        )

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
        ref = ref_of(entry, batch=batch)
        keys = [stream, self._keys.sizes(backend)]
        self._connection.post_script(_ignore, WITHDRAW, keys, [entry, ref], repeat=True, patient=True)
        signal(self._connection, self._keys, backend, ref)


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
    return [one if isinstance(one, bytes) else refusal(one, after_s) for one in reply[:-1]]


def refusal(depth: int, after_s: float = _RETRY_S[0]) -> QueueFull:
    """Read how the scripts answer for a refused request: its depth, or -1 less the bytes."""
    return QueueFull(depth, after_s) if depth >= 0 else QueueFull(-1 - depth, after_s, in_bytes=True)


def _ignore(reply: Any) -> None:
    """A withdrawal is a courtesy: if it fails, the request runs and its reply is dropped."""
