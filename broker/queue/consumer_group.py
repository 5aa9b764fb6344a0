"""The consumer group of a backend, as one replica uses it: claim, settle, redeliver, give back.

A backend has two streams: one for interactive requests and one for batch items. An entry ref names an entry of either.

Each stream has one consumer group, and each replica is a consumer of it. An entry is in the group's pending list from
its claim to its settlement, so a replica that dies leaves a record of exactly what it held.

Redis counts the deliveries of each pending entry. More than one means that a replica died while it held the entry.
`ConsumerGroup.claim_redelivered` claims such entries one at a time, so that the replica decides what runs beside them.

All of this concerns accepted requests, so a broker that is out of memory refuses none of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import orjson

from ..errors import BrokerFull, StringTooLong
from ..transport.commands import COPIED_BYTES, Arg, Script
from ..transport.connection import RedisConnection
from ..transport.session import BLOCK_MS
from ..wire.entry_ref import apart, id_of, is_batch, ref_of
from ..wire.keys import Keys
from .dead_letter_limits import DROP, DROP_OLDEST, MAX_DEAD_LETTERS
from .leases import TAKE_OVER
from .queued_bytes import RELEASE
from .signals import LOOK, signal

log = logging.getLogger(__name__)

GROUP = "replicas"
RETURNED = "-returned-"
"""The consumer of entries that were given back. It never has a lease, so every replica may claim them."""

HISTORY_S = 7 * 24 * 3600
HISTORY = b"history"
"""The field of a dead letter with its error and its deliveries (JSON); the other fields are those of the entry."""

_BLOCK = ("BLOCK", BLOCK_MS)
_FULL_S = 1.0
_SETTLED_TOGETHER = 500
"""Entries in one settlement script: Lua's ``unpack`` has a limit."""
_BURIED_FIELDS = 2_000
"""Most field names and values of a dead letter, the rest is cut off: Lua's ``unpack`` has a limit."""
_BURIED_BYTES = 1024 * 1024
"""Most bytes of its names and values. Requests of Penstock's callers have fewer, except for a very long query."""


@dataclass(frozen=True, slots=True)
class RedeliveredEntry:
    """An entry whose consumer's lease expired."""

    entry: bytes
    """Its entry ref."""
    deliveries: int
    """The number of replicas that died while they held it."""
    fields: list[bytes]
    streamed: bool = False
    """Its reply had begun to stream."""


class Look(NamedTuple):
    """Numbers of entries in the pending lists of a backend."""

    orphans: int
    """Held by consumers whose lease expired."""
    returned: int
    """Given back, and waiting for a replica."""
    own: int
    """Of the replica that looks."""


class Reclaimed(NamedTuple):
    """An entry that is pending in this replica's name, read again."""

    ref: bytes
    deaths: int
    """The number of replicas that died while they held it."""
    fields: list[bytes] | None
    """None where the caller has withdrawn it."""
    streamed: bool

    @property
    def is_fresh(self) -> bool:
        """It was not redelivered to this replica, and its answer has not begun: it can run as any claim does."""
        return self.fields is None or not (self.deaths or self.streamed)

    def taken(self) -> RedeliveredEntry:
        return RedeliveredEntry(self.ref, self.deaths, self.fields or [], self.streamed)


# Makes the streams and their groups where they are not there. KEYS: the streams. ARGV: group.
_ENSURE = Script("""#!lua flags=allow-oom
for _, stream in ipairs(KEYS) do
  local made = redis.pcall('XGROUP', 'CREATE', stream, ARGV[1], '0', 'MKSTREAM')
  if made.err and not string.find(made.err, 'BUSYGROUP') then return made end
end
return 0
""")

# What there is to take over. KEYS: the streams. ARGV: group, me, what lease keys begin with, RETURNED. Answers how many
# entries the dead hold, how many were given back and how many are mine. Consumers that are dead and hold nothing are
# forgotten on the way: only those, as deleting a consumer loses what it holds.
_LOOK = Script(f"""#!lua flags=allow-oom
{TAKE_OVER}
local is_gone = judge(ARGV[3], ARGV[2])
local orphans, returned, own = 0, 0, 0
for _, stream in ipairs(KEYS) do
  for _, c in ipairs(redis.call('XINFO', 'CONSUMERS', stream, ARGV[1])) do
    local name, pending = c[2], c[4]
    if name == ARGV[4] then
      returned = returned + pending
    elseif name == ARGV[2] then
      own = own + pending
    elseif is_gone(name) then
      orphans = orphans + pending
      if pending == 0 then redis.call('XGROUP', 'DELCONSUMER', stream, ARGV[1], name) end
    end
  end
end
return {{orphans, returned, own}}
""")

# Tells whether an entry waits that no replica has claimed. KEYS: the streams. ARGV: group. The lag that a group reports
# does not tell: it is unknown once entries were deleted.
_IS_WAITING = Script("""#!lua flags=no-writes
for _, stream in ipairs(KEYS) do
  for _, g in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    if g[2] == ARGV[1] and redis.call('XRANGE', stream, '(' .. g[8], '+', 'COUNT', 1)[1] then return 1 end
  end
end
return 0
""")

# Lists what is pending in my name. KEYS: the streams. ARGV: group, me, how many milliseconds ago it was claimed at
# least. Answers the ids of each stream.
_PENDING_IDS = Script("""#!lua flags=no-writes
local out = {}
for s, stream in ipairs(KEYS) do
  out[s] = {}
  for i, p in ipairs(redis.call('XPENDING', stream, ARGV[1], 'IDLE', ARGV[3], '-', '+', 1000, ARGV[2])) do
    out[s][i] = p[1]
  end
end
return out
""")

# Reads what is pending in my name. KEYS: a stream. ARGV: group, me, what marks of streamed answers begin with, then the
# ids. Answers of each that is still mine its id, how often it was delivered, its fields (false where it was withdrawn),
# and whether its answer has begun to stream.
_RECLAIM = Script("""#!lua flags=allow-oom
local out = {}
for i = 4, #ARGV do
  local id = ARGV[i]
  local p = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1, ARGV[2])[1]
  if p then
    local claimed = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id, 'RETRYCOUNT', p[4])[1]
    out[#out + 1] = {id, p[4], claimed and claimed[2] or false, redis.call('EXISTS', ARGV[3] .. id)}
  end
end
return out
""")

# Adopts the oldest entry of a consumer whose lease has lapsed. There is no lock that a death could leave behind: the
# whole of it is this script. KEYS: the streams. ARGV: group, me, what lease keys begin with, RETURNED, seconds to keep
# history, then for each stream what its history keys begin with, what marks of streamed answers begin with, and 1 for
# only those that have such a mark. Answers the entry's id, its deliveries so far, its fields, the number of its stream
# and whether it has the mark; or nothing.
_ADOPT = Script(f"""#!lua flags=allow-oom
{TAKE_OVER}
local group, me = ARGV[1], ARGV[2]
local is_gone = judge(ARGV[3], me)
for s, stream in ipairs(KEYS) do
  for _, c in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
    local name = c[2]
    if c[4] > 0 and name ~= me and name ~= ARGV[4] and is_gone(name) then
      for _, p in ipairs(redis.call('XPENDING', stream, group, '-', '+', c[4], name)) do
        local streamed = s == 1 and redis.call('EXISTS', ARGV[8] .. p[1]) or 0
        local wanted = streamed == 1 or ARGV[9] == '0'
        local claimed = wanted and redis.call('XCLAIM', stream, group, me, 0, p[1])
        if not wanted then
          -- It is for who runs suspects.
        elseif claimed[1] then
          local now = redis.call('TIME')
          local history = ARGV[5 + s] .. p[1]
          redis.call('RPUSH', history, name, now[1] .. string.sub('000000' .. now[2], -6, -4))
          redis.call('EXPIRE', history, ARGV[5])
          return {{p[1], p[4], claimed[1][2], s, streamed}}
        else
          redis.call('XACK', stream, group, p[1])
        end
      end
    end
  end
end
return {{}}
""")

# Takes what was given back. KEYS: the streams. ARGV: group, me, RETURNED, how many at most. Answers for each stream as
# XREADGROUP does.
_RETAKE = Script("""#!lua flags=allow-oom
local out, left = {}, tonumber(ARGV[4])
for s, stream in ipairs(KEYS) do
  out[s] = {}
  for _, p in ipairs(left > 0 and redis.call('XPENDING', stream, ARGV[1], '-', '+', left, ARGV[3]) or {}) do
    local claimed = redis.call('XCLAIM', stream, ARGV[1], ARGV[2], 0, p[1])
    if claimed[1] then
      out[s][#out[s] + 1] = claimed[1]
      left = left - 1
    else
      redis.call('XACK', stream, ARGV[1], p[1])
    end
  end
end
return out
""")

# Claims from both streams at once, without waiting. KEYS: the interactive stream, the batch stream. ARGV: group, me,
# how many at most, how many of these the batch stream gets if it has them. Answers the entries of each.
_SHARE = Script("""#!lua flags=allow-oom
local left = tonumber(ARGV[3])
local function read(stream, count)
  if count < 1 then return {} end
  local got = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', count, 'STREAMS', stream, '>')
  got = got and got[1] and got[1][2] or {}
  left = left - #got
  return got
end
local interactive = read(KEYS[1], left - ARGV[4])
local batch = read(KEYS[2], left)
if #batch < tonumber(ARGV[4]) then
  for _, entry in ipairs(read(KEYS[1], left)) do interactive[#interactive + 1] = entry end
end
return {interactive, batch}
""")

_REPLY = Script("""#!lua flags=allow-oom
return redis.call('XADD', KEYS[1], 'NOMKSTREAM', '*', unpack(ARGV))
""")

# Appends a reply if its body is there. KEYS: the stream, the body. ARGV: the fields. Returns 0 if there is no body.
_REPLY_IF_STORED = Script("""#!lua flags=allow-oom
if redis.call('EXISTS', KEYS[2]) == 0 then return 0 end
return redis.call('XADD', KEYS[1], 'NOMKSTREAM', '*', unpack(ARGV))
""")

_PUT = Script("""#!lua flags=allow-oom
return redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
""")

# Settles entries that have a record of their size: with it, as none of the two must be left. KEYS: the stream, the
# records. ARGV: group, how many entries, their ids, their places.
_SETTLE_SIZED = Script(f"""#!lua flags=allow-oom
{RELEASE}
local ids, places, count = {{}}, {{}}, tonumber(ARGV[2])
for i = 1, count do ids[i], places[i] = ARGV[2 + i], ARGV[2 + count + i] end
redis.call('XACK', KEYS[1], ARGV[1], unpack(ids))
redis.call('XDEL', KEYS[1], unpack(ids))
release(KEYS[2], places)
return 0
""")

# KEYS: the stream, its dead letters, the entry's history, the records of sizes, the backend's sums. ARGV: group, entry
# id, its place, how many dead letters are kept, what the keys of bodies begin with, the name of the field for the
# history, then the fields. Does nothing if the entry is gone already.
_BURY = Script(f"""#!lua flags=allow-oom
{RELEASE}
{DROP_OLDEST}
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
redis.call('XDEL', KEYS[1], ARGV[2])
redis.call('XADD', KEYS[2], '*', ARGV[6], ARGV[7], unpack(ARGV, 8))
drop_oldest(KEYS[2], KEYS[5], tonumber(ARGV[4]), ARGV[5])
redis.call('DEL', KEYS[3])
release(KEYS[4], {{ARGV[3]}})
return 1
""")

# Undoes claims. KEYS: a stream. ARGV: group, me, RETURNED, then entry ids. Only what is still ours goes back, and its
# delivery is not counted: it was never started.
_GIVE_BACK = Script("""#!lua flags=allow-oom
local given = 0
for i = 4, #ARGV do
  local p = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2])[1]
  if p then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, ARGV[i], 'RETRYCOUNT', p[4] - 1, 'JUSTID')
    given = given + 1
  end
end
return given
""")

# KEYS: the streams. ARGV: group, me. Forgets a consumer with nothing pending.
_LEAVE = Script("""#!lua flags=allow-oom
for _, stream in ipairs(KEYS) do
  for _, c in ipairs(redis.call('XINFO', 'CONSUMERS', stream, ARGV[1])) do
    if c[2] == ARGV[2] and c[4] == 0 then redis.call('XGROUP', 'DELCONSUMER', stream, ARGV[1], ARGV[2]) end
  end
end
return 0
""")


class ConsumerGroup:
    """What one replica does to the request streams of its backend.

    ``commands`` is the process's multiplexed connection; ``reads`` is one of its own, as claiming blocks.
    """

    def __init__(
        self, commands: RedisConnection, reads: RedisConnection, keys: Keys, backend: str, replica: str
    ) -> None:
        self._commands, self._reads, self._keys = commands, reads, keys
        self._backend, self._replica = backend, replica
        self._streams = [keys.requests(backend), keys.batch(backend)]
        self._history = keys.history(backend, "")
        self._streamed = keys.streamed(backend, "")
        self._leases = keys.alive(backend, "")
        self._sizes = keys.sizes(backend)
        self._dead, self._sums = keys.dead(backend), keys.done(backend)
        self._bodies = keys.body(backend, "")
        self._sized: set[bytes] = set()
        """Places of held entries whose size the broker has a record of."""
        self._full_until = 0.0
        """The broker was out of memory: replies go by a script until then."""

    async def ensure_group(self) -> None:
        """Create the streams and their groups if they are not there. What was published before is delivered."""
        await self._commands.run_script(_ENSURE, self._streams, [GROUP], repeat=True)

    def claim(self, up_to: int, then: Callable[[Any], None], *, block: bool = True) -> None:
        """Ask for the oldest unclaimed entries; ``then`` gets a list of ``(place, fields)``, or an exception.

        Waits at most `BLOCK_MS` for the first entry and not at all for the rest; the list is empty if nothing came.
        Without ``block`` it does not wait for the first one either.
        There are at most ``up_to`` of each stream, those of the batch stream last.
        After an exception, entries may be ours that we never saw: `pending_places` has them.
        """
        interactive, batch = self._streams
        batch_name = batch.encode()

        def unwrap(reply: Any) -> None:
            if isinstance(reply, Exception):
                then(reply)
                return
            entries: list[tuple[bytes, list[bytes]]] = []
            for stream, found in reply or ():
                entries += _on_batch(found) if stream == batch_name else found
            then(entries)

        self._reads.post(
            unwrap,
            *("XREADGROUP", "GROUP", GROUP, self._replica, "COUNT", up_to, *(_BLOCK if block else ())),
            *("STREAMS", interactive, batch, ">", ">"),
        )

    def claim_shared(self, up_to: int, owed: int, then: Callable[[Any], None]) -> None:
        """Claim at most ``up_to`` entries of both streams together, without waiting; ``then`` hears as from `claim`.

        Interactive ones come first, but ``owed`` of them all are left to the batch stream if it has as many.
        """

        def unwrap(reply: Any) -> None:
            then(reply if isinstance(reply, Exception) else reply[0] + _on_batch(reply[1]))

        self._reads.post_script(unwrap, _SHARE, self._streams, [GROUP, self._replica, up_to, owed])

    def reply(self, caller: str, fields: Sequence[bytes]) -> None:
        """Append a reply to a caller's stream, if the caller still keeps one."""
        key = self._keys.replies(caller)
        if self._full_until and time.monotonic() < self._full_until:
            self._commands.post_script(_log_failure, _REPLY, [key], fields, repeat=True, patient=True)
            return

        def retry_without_memory(result: Any) -> None:
            if isinstance(result, BrokerFull):
                # The script is slower, so it is used for the time being only. Until this answer comes, the entry may be
                # settled and its reply not yet written.
                self._full_until = time.monotonic() + _FULL_S
                self._commands.post_script(_log_failure, _REPLY, [key], fields, repeat=True, patient=True)
            elif isinstance(result, Exception):
                _log_failure(result)

        bulky = len(fields[-1]) > COPIED_BYTES  # the body comes last
        self._commands.post(
            retry_without_memory,
            "XADD",
            key,
            "NOMKSTREAM",
            "*",
            *fields,
            repeat=True,
            patient=True,
            needs_memory=True,
            bulky=bulky,
        )

    def mark_streamed(self, ref: bytes) -> None:
        """Write down that an answer begins to stream; call it before its first `part`."""
        key, ttl_ms = self._streamed + ref.decode(), HISTORY_S * 1000
        self._commands.post_script(_log_failure, _PUT, [key], [b"", ttl_ms], repeat=True, patient=True)

    def forget_streamed(self, ref: bytes) -> None:
        self._commands.post(_log_failure, "UNLINK", self._streamed + ref.decode(), repeat=True, patient=True)

    def part(self, caller: str, fields: Sequence[bytes], on_gone: Callable[[], None]) -> None:
        """Append a part of an answer to a caller's stream, in order; ``on_gone`` hears that there is none any more."""

        def check(result: Any) -> None:
            if result is None:
                on_gone()
            elif isinstance(result, Exception):
                _log_failure(result)

        # Always by the script that a full memory does not refuse: a part that was tried again would come too late.
        key = self._keys.replies(caller)
        self._commands.post_script(check, _REPLY, [key], fields, repeat=True, patient=True)

    def reply_large(
        self,
        caller: str,
        request: str,
        body: bytes,
        ttl_ms: int,
        fields: Sequence[bytes],
        too_long: Callable[[], Sequence[bytes]],
    ) -> None:
        """Append a reply whose ``body`` is too large for a stream: that is stored first, in a key of its own.

        Where the broker takes no string that long, what ``too_long`` returns is appended in its place.
        """
        stored, stream = self._keys.reply_body(caller, request), self._keys.replies(caller)
        is_stored = is_due = False
        """The broker has taken the body; the reply was not appended, as it had not yet."""

        def append() -> None:
            self._commands.post_script(_log_failure, _REPLY, [stream], fields, repeat=True, patient=True)

        def after_body(result: Any) -> None:
            nonlocal is_stored
            if isinstance(result, StringTooLong):
                self.reply(caller, too_long())
            elif isinstance(result, BrokerFull):
                put: list[Arg] = [body, ttl_ms]
                self._commands.post_script(_log_failure, _PUT, [stored], put, repeat=True, patient=True, bulky=True)
                append()
            elif isinstance(result, Exception):
                _log_failure(result)
                append()
            else:
                is_stored = True
                if is_due:
                    append()

        def after_reply(result: Any) -> None:
            nonlocal is_due
            if isinstance(result, Exception):
                _log_failure(result)
            elif result == 0:
                if is_stored:
                    log.error("the body of the reply to request %s has expired before the reply was sent", request)
                is_due = True  # the body was refused, and is sent again

        # A script that stores it makes a Lua string of it first, which copies and hashes it: of 10 MiB that was 8 ms.
        wait = {"repeat": True, "patient": True, "needs_memory": True}
        self._commands.post(after_body, "SET", stored, body, "PX", ttl_ms, bulky=True, **wait)
        self._commands.post_script(after_reply, _REPLY_IF_STORED, [stream, stored], fields, repeat=True, patient=True)

    def hold_sized(self, ref: bytes) -> None:
        """Note that this entry has a size on record (`Entry.size_bytes`): it is to be settled together with that."""
        self._sized.add(ref)

    def settle(self, refs: Iterable[bytes]) -> None:
        """Acknowledge and delete, together: an entry that is only acknowledged stays on its stream for ever."""
        if self._sized:
            refs = self._settle_sized(refs)
        for stream, entries in zip(self._streams, apart(refs), strict=True):
            if entries:
                # Patient, as replies are: if one of the two gave up while the broker is away, the other must not go
                # through.
                self._commands.post(_log_failure, "XACK", stream, GROUP, *entries, repeat=True, patient=True)
                self._commands.post(_log_failure, "XDEL", stream, *entries, repeat=True, patient=True)

    def _settle_sized(self, refs: Iterable[bytes]) -> list[bytes]:
        """Settle those of ``refs`` whose size is on record; return the others."""
        others: list[bytes] = []
        sized: list[bytes] = []
        for ref in refs:
            (sized if ref in self._sized else others).append(ref)
        self._sized.difference_update(sized)
        for batch, stream in enumerate(self._streams):
            on_stream = [ref for ref in sized if is_batch(ref) == bool(batch)]
            for start in range(0, len(on_stream), _SETTLED_TOGETHER):
                some = on_stream[start : start + _SETTLED_TOGETHER]
                args: list[Arg] = [GROUP, len(some), *map(id_of, some), *some]
                self._commands.post_script(
                    _log_failure, _SETTLE_SIZED, [stream, self._sizes], args, repeat=True, patient=True
                )
        return others

    def forget_history(self, ref: bytes) -> None:
        self._commands.post(_log_failure, "DEL", self._history + ref.decode(), repeat=True, patient=True)

    async def look(self) -> Look:
        """Return what there is to take over, and how much is pending in this replica's own name."""
        args: list[Arg] = [GROUP, self._replica, self._leases, RETURNED]
        return Look(*await self._commands.run_script(_LOOK, self._streams, args, repeat=True, prompt=True))

    async def is_work_waiting(self) -> bool:
        """Return whether there is an entry that no replica has claimed."""
        return bool(await self._commands.run_script(_IS_WAITING, self._streams, [GROUP], repeat=True))

    @property
    def keeps_commands(self) -> bool:
        """Whether settlements may wait to be sent again: their entries are still pending."""
        return self._commands.keeps_commands

    async def pending_places(self, idle_ms: int = 0) -> list[bytes]:
        """Return what was claimed in this replica's name at least ``idle_ms`` ago and is not settled.

        That is at most the oldest 1,000 entries of each stream.
        """
        args: list[Arg] = [GROUP, self._replica, idle_ms]
        interactive, batch = await self._commands.run_script(
            _PENDING_IDS, self._streams, args, repeat=True, patient=True
        )
        return [*interactive, *(ref_of(entry, batch=True) for entry in batch)]

    async def reclaim(self, refs: Iterable[bytes]) -> list[Reclaimed]:
        """Read entries again that are pending in this replica's name, leaving out those that are not any more.

        Replies and settlements that the broker has refused are sent again first, so none of theirs is read. It does not
        count as a delivery, unlike reading them by XREADGROUP: deliveries stand for deaths.
        """
        found: list[Reclaimed] = []
        for batch, (stream, entries) in enumerate(zip(self._streams, apart(refs), strict=True)):
            if not entries:
                continue
            args: list[Arg] = [GROUP, self._replica, self._streamed, *entries]
            reply = await self._commands.run_script(_RECLAIM, [stream], args, repeat=True, patient=True)
            for entry, deliveries, fields, streamed in reply:
                ref = ref_of(entry, batch=True) if batch else entry
                found.append(Reclaimed(ref, max(0, deliveries - 1), fields, bool(streamed) and not batch))
        return found

    async def claim_redelivered(self, *, streamed: bool = False) -> RedeliveredEntry | None:
        """Claim the oldest entry of a replica that is gone, and write that death into the entry's history.

        With ``streamed``, only one whose answer had begun to stream: there is nothing of it to run.
        """
        histories = (self._history, self._history + ref_of(b"", batch=True).decode())
        args: list[Arg] = [GROUP, self._replica, self._leases, RETURNED, HISTORY_S, *histories]
        args += [self._streamed, int(streamed)]
        # Prompt: sent again after an outage, it would come before others could renew their leases.
        reply = await self._commands.run_script(_ADOPT, self._streams, args, prompt=True)
        if not reply:
            return None
        entry, deliveries, fields, stream, had_begun = reply
        return RedeliveredEntry(ref_of(entry, batch=stream == 2), deliveries, fields, had_begun == 1)

    async def claim_returned(self, up_to: int) -> list[tuple[bytes, list[bytes]]]:
        """Claim the oldest of what was given back."""
        args: list[Arg] = [GROUP, self._replica, RETURNED, up_to]
        interactive, batch = await self._commands.run_script(_RETAKE, self._streams, args)
        return cast("list[tuple[bytes, list[bytes]]]", interactive) + _on_batch(batch)

    async def bury(
        self,
        taken: RedeliveredEntry,
        error: str,
        tell: Callable[[], None] | None = None,
        *,
        max_dead_letters: int = MAX_DEAD_LETTERS,
    ) -> None:
        """Move an entry to the dead letters, with the history of its deliveries and the ``error`` that ended it.

        Of more than ``max_dead_letters`` the oldest are dropped and counted.

        ``tell`` posts what its caller is told, in the same write and before it: who has been told finds the letter.
        """
        key = self._history + taken.entry.decode()
        flat = cast("list[bytes]", await self._commands.send("LRANGE", key, 0, -1, repeat=True, patient=True))
        deliveries = [
            {"replica": replica.decode(errors="replace"), "died_ms": int(died)}
            for replica, died in zip(flat[::2], flat[1::2], strict=True)
        ]
        history = orjson.dumps({"error": error, "deliveries": deliveries})
        if tell is not None:
            tell()
        await self._commands.run_script(
            _BURY,
            [self._streams[is_batch(taken.entry)], self._dead, key, self._sizes, self._sums],
            [GROUP, id_of(taken.entry), taken.entry, max_dead_letters, self._bodies, HISTORY, history, *_cut(taken)],
            repeat=True,
            patient=True,
        )

    async def drop_old_letters(self, max_dead_letters: int) -> None:
        """Drop dead letters that are too many or too old."""
        await self._commands.run_script(DROP, [self._dead, self._sums], [max_dead_letters, self._bodies], repeat=True)

    def give_back(self, refs: Iterable[bytes]) -> None:
        """Return what was claimed and not started, for any replica to take, as if it had never been claimed."""
        refs = list(refs)
        self._sized.difference_update(refs)
        for stream, entries in zip(self._streams, apart(refs), strict=True):
            if entries:
                args: list[Arg] = [GROUP, self._replica, RETURNED, *entries]
                self._commands.post_script(_log_failure, _GIVE_BACK, [stream], args, repeat=True, patient=True)
        signal(self._commands, self._keys, self._backend, LOOK)

    async def leave(self) -> None:
        """Forget this replica as a consumer, if it holds nothing."""
        await self._commands.run_script(_LEAVE, self._streams, [GROUP, self._replica], repeat=True, prompt=True)


_FieldsT = TypeVar("_FieldsT", list[bytes], "list[bytes] | None")


def _on_batch(entries: list[tuple[bytes, _FieldsT]]) -> list[tuple[bytes, _FieldsT]]:
    return [(ref_of(entry, batch=True), fields) for entry, fields in entries]


def _cut(taken: RedeliveredEntry) -> list[bytes]:
    """Return the fields of an entry as its dead letter keeps them."""
    fields = taken.fields[:_BURIED_FIELDS]
    if sum(map(len, fields)) <= _BURIED_BYTES:
        return fields
    kept: list[bytes] = []
    left = _BURIED_BYTES
    for field in fields:
        kept.append(field[:left])
        left -= len(kept[-1])
    return kept


def _log_failure(result: Any) -> None:
    if isinstance(result, Exception):
        log.error("the broker did not take a reply or its settling: %s", result)
