"""Publisher: admits and appends requests. One Lua script does both, in one call for all requests of a loop tick.

The script counts the unsettled entries of the backend, waiting and running, of all callers: ``XLEN`` includes an entry
until it is settled (acknowledged and deleted), and ``broker/queue/queued_bytes.py`` counts its bytes. Both limits
therefore hold exactly at any number of callers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Union

from ..errors import BrokerUnavailable
from ..transport.commands import COPIED_BYTES, Arg, Script
from ..transport.connection import RedisConnection
from ..transport.url import shown_url
from ..wire._fields import CALLER_FIELD, HEADER_FIELD, ID_FIELD, LARGE, LARGE_FIELD, SIZE_FIELD, VERSION, VERSION_FIELD
from ..wire.entry_ref import ref_of
from ..wire.keys import Keys
from ..wire.requests import RawEntry
from .counts.caller_counts import CallerCounts
from .queued_bytes import FORGET, NO_LIMIT, OLDEST, RECOUNT, RESERVE, SET_ASIDE, SMALL, WITHDRAW, reservation_of
from .signals import signal

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class QueueFull:
    """The result of a request that admission refused, because the queue has reached a limit."""

    depth: int
    """Number of unsettled entries; if ``in_bytes``, the number of bytes that they are charged for."""
    retry_after_s: float
    """Seconds after which to publish the request again; see `retry_after_s`."""
    in_bytes: bool = False
    """Whether the queue has reached its limit of bytes, not of entries."""


Published = Union[bytes, QueueFull, Exception]  # noqa: UP007 - it is evaluated, also on Python 3.10
"""The result of publishing: the entry's id on its stream, the refusal by admission, or the error."""

_RETRY_S = (1.0, 60.0)


def retry_after_s(oldest_ms: float) -> float:
    """Return after how many seconds to publish again to a full queue. Its oldest entry is ``oldest_ms`` old.

    While the oldest unsettled entry waited, all entries before it were settled, and the queue filled up behind it. Its
    age therefore estimates how long the queue takes to drain at its recent rate. The estimate is too long if the oldest
    entry runs for much longer than the others. The result is at least 1 second and at most 60.
    """
    at_least, at_most = _RETRY_S
    return min(max(at_least, oldest_ms / 1000), at_most)


# Both publishing scripts have the same arguments and the same reply. KEYS: the stream to append to, the interactive
# stream, the batch stream, the records of sizes. ARGV: the limit of requests, the limit of bytes, then groups of
# consecutive entries with the same caller and header. A group is the number of its entries, their caller, their header,
# and for each entry its id and the name and value of its body field; the value of a large body is its length. (Without
# groups, five arguments of six were the same for all the calls of a handle.) The reply has for each entry its id, or
# the depth of the queue if that refused it, or -1 minus the bytes in use if those did. If any entry was refused, the
# age of the oldest entry on the streams follows, in milliseconds. A server out of memory refuses the whole call before
# the script starts, so that no part of it is done.
_FIELDS = f"""'{VERSION_FIELD.decode()}', '{VERSION.decode()}',
        '{ID_FIELD.decode()}', ARGV[i], '{CALLER_FIELD.decode()}', caller, '{HEADER_FIELD.decode()}', header"""

# Publishes small entries. All of them are charged the same, so the limit of bytes amounts to a limit of requests, and
# while the queue is short the script need not read the records. Reading them costs the broker a microsecond, a twelfth
# of the call.
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

# Publishes entries of any size. A fifth key is the beginning of the keys of bodies. An entry whose large body is not
# stored, because the server refused it, is not appended: its result is nothing, and the age of the oldest entry follows
# as well. (To a user whose ACL rules do not allow EXISTS, every body counts as stored.)
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
    local name, value, reserved, missing = ARGV[i + 1], ARGV[i + 2], false, false
    local bytes = #header + #value
    if name == '{LARGE_FIELD.decode()}' then
      missing = redis.pcall('EXISTS', KEYS[5] .. ARGV[i]) == 0
      local length = tonumber(value)
      bytes, value = #header + length, '1'
      if length > {LARGE} then
        local reservation = 'r:' .. redis.sha1hex(ARGV[i])
        local held = redis.call('HGET', KEYS[4], reservation)
        if held then
          redis.call('HDEL', KEYS[4], reservation)
          held, reserved = string.match(held, '^%d+'), true
          total, added = total - held, added - held
        end
      end
    end
    bytes = math.max(bytes, {SMALL})
    if not reserved and {SMALL} * math.max(depth, {SET_ASIDE - 1}) + total + bytes > limit_bytes and depth < limit then
      local counted = recount(KEYS[4], KEYS[2], KEYS[3])
      if counted then total, added = counted, 0 end
    end
    if missing then
      out[#out + 1], refused = false, true
    elseif depth >= limit then
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

# Looks up requests on a stream. KEYS: the stream. ARGV: the entry id to search from, the name of the field that has the
# request's id, then for each request its id and the id of its entry, or '' to search for the entry. Returns for each
# request the id of its entry, or '' if it is not on the stream.
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

# Finds all requests of one caller on a stream. KEYS: the stream. ARGV: the names of the fields that have the caller and
# the request's id, then the caller. Returns for each request its id, followed by the id of its entry.
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
"""Limits of one script call: a larger one would delay the broker's other clients. A call of 500 entries took 4 to 7 ms.
With 128 entries the 99th percentile of HTTP requests beside 100,000 batch items was 4.3 ms instead of 3.6, without more
items per second.
"""


class Publisher:
    """Publishes, finds and withdraws the requests of one process and event loop."""

    def __init__(self, connection: RedisConnection, keys: Keys) -> None:
        self._connection, self._keys = connection, keys
        self.counts = CallerCounts(connection, keys)
        """The requests that ended without a reply."""
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
        """Append an entry at the end of this loop tick, if the queue of the backend has room.

        The entry is never appended twice: publishing is not repeated after an error. The result may be an exception:
        `FateUnknown` if the connection broke and the entry may be on its stream (`find` looks it up), and
        `BrokerUnavailable`, without waiting, while the broker refuses writes. With ``limit=NO_LIMIT`` the entry counts
        as accepted before, and waits until the broker takes writes again.

        Args:
            backend: tag of the backend.
            entry: the request, in its wire form.
            limit: refuse the entry if the backend has this many unsettled entries.
            then: called with the result, in the reader of the connection.
            batch: append to the stream of batch producers.
            limit_bytes: refuse the entry if it and the unsettled entries would take more bytes than this.
        """
        if not self._tick:
            self._connection.join_write(self._flush)
        self._tick.setdefault((backend, limit, limit_bytes, batch), []).append((entry, then))

    def _flush(self) -> None:
        tick, self._tick = self._tick, {}
        for (backend, limit, limit_bytes, batch), entries in tick.items():
            was_accepted = limit == NO_LIMIT
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
                    self._post(script, backend, keys, args, thens, bulky=bulky, was_accepted=was_accepted)
                    args, thens, size, bulky, script = [limit, limit_bytes], [], 0, False, _PUBLISH
            if thens:
                self._post(script, backend, keys, args, thens, bulky=bulky, was_accepted=was_accepted)

    def _post(
        self,
        script: Script,
        backend: str,
        keys: list[str],
        args: list[Arg],
        thens: list[Callable[[Published], None]],
        *,
        bulky: bool,
        was_accepted: bool,
    ) -> None:
        if script is _PUBLISH_ANY:
            keys = [*keys, self._keys.body(backend, "")]
        hand_out = partial(_hand_out, thens, self._connection.url)
        # An entry without a limit was accepted before, and the broker lost it: it waits until writes are possible.
        self._connection.post_script(
            hand_out, script, keys, args, bulky=bulky, patient=was_accepted, prompt=not was_accepted
        )

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
        """Reserve room for an entry with a large body, before the body is stored. `publish` uses the reservation.

        The arguments are those of `publish`. ``then`` is called with None if the room was reserved, else with the
        refusal or the exception. A reservation that is not used lapses after `RESERVATION_S` (queued_bytes.py).
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
        """Release the reservation of an entry that will not be published."""
        self._connection.post_script(
            _ignore_result, FORGET, [self._keys.sizes(backend)], [reservation_of(entry.id)], repeat=True, patient=True
        )

    async def find(
        self,
        backend: str,
        requests: Sequence[tuple[str, bytes | None]],
        since_ms: float,
        *,
        batch: bool = False,
    ) -> list[bytes | None]:
        """Return for each request the id of its entry; None if it was settled, or never reached the stream.

        Args:
            backend: tag of the backend.
            requests: pairs of a request's id and the id of its entry, or None where that is unknown.
            since_ms: where to start searching for unknown entries: milliseconds of Unix time by the broker's clock.
            batch: search the stream of batch producers.
        """
        stream = self._keys.batch(backend) if batch else self._keys.requests(backend)
        args: list[Arg] = [f"{max(0, int(since_ms))}-0", ID_FIELD]
        for id_, entry in requests:
            args += (id_, entry or b"")
        found = await self._connection.run_script(_FIND, [stream], args, repeat=True)
        return [entry or None for entry in found]

    async def find_of(self, backend: str, caller: str) -> dict[bytes, bytes]:
        """Return the requests of a caller on a backend's batch stream: request id to entry id."""
        found = await self._connection.run_script(
            _FIND_OF, [self._keys.batch(backend)], [CALLER_FIELD, ID_FIELD, caller], repeat=True
        )
        return dict(zip(found[::2], found[1::2], strict=True))

    def withdraw(self, backend: str, entry: bytes, *, batch: bool = False) -> None:
        """Withdraw a request. A waiting one never starts; a running one is cancelled if its code allows that.

        The entry is deleted, so that a replica which redelivers it later does not run it. A signal informs the replica
        that has claimed it now. Errors are ignored: the request then runs, and its caller ignores the reply.
        """
        stream = self._keys.batch(backend) if batch else self._keys.requests(backend)
        ref = ref_of(entry, batch=batch)
        keys = [stream, self._keys.sizes(backend)]
        self._connection.post_script(_ignore_result, WITHDRAW, keys, [entry, ref], repeat=True, patient=True)
        signal(self._connection, self._keys, backend, ref)


def _hand_out(thens: list[Callable[[Published], None]], url: str, reply: Any) -> None:
    results: list[Published] = [reply] * len(thens) if isinstance(reply, Exception) else _read(reply, len(thens), url)
    for then, result in zip(thens, results, strict=True):
        try:
            then(result)
        except Exception:
            log.exception("a publication's continuation failed")


def _read(reply: list[Any], count: int, url: str) -> list[Published]:
    if len(reply) == count:
        return reply
    after_s = retry_after_s(reply[-1])
    return [one if isinstance(one, bytes) else _refused(one, after_s, url) for one in reply[:-1]]


def _refused(one: int | None, after_s: float, url: str) -> QueueFull | BrokerUnavailable:
    if one is None:
        return BrokerUnavailable(shown_url(url), "it has not stored the body of the request", after_s)
    return refusal(one, after_s)


def refusal(depth: int, after_s: float = _RETRY_S[0]) -> QueueFull:
    """Return the refusal that a publishing script reported: ``depth`` is the depth, or -1 minus the bytes in use."""
    return QueueFull(depth, after_s) if depth >= 0 else QueueFull(-1 - depth, after_s, in_bytes=True)


def _ignore_result(reply: Any) -> None:
    """Ignore the result of a withdrawal, or of the release of a reservation, which lapses anyway."""
