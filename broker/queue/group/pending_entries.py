"""Pending entries of a backend: those that replicas have claimed and not settled, of live and of dead replicas.

Redis counts the deliveries of each pending entry. Reading one again, or giving it back, is not counted. So more than
one delivery means that a replica died while it held the entry.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...transport.commands import Arg, Script
from ...wire.entry_ref import ref_of, split_by_stream
from .member import GROUP, HISTORY_S, RETRY, RETURNED, Member, log_refusal
from .replica_lease import EXPIRY_CHECKER, ReplicaLease


@dataclass(frozen=True, slots=True)
class RedeliveredEntry:
    """An entry whose consumer's lease expired."""

    ref: bytes
    deliveries: int
    """The number of replicas that died while they held it."""
    fields: list[bytes]
    streamed: bool = False
    """Whether its reply had begun to stream."""


class Swept(NamedTuple):
    """The result of a sweep over the pending entries of a backend."""

    dead: list[bytes]
    """Consumers whose lease has expired and who have pending entries; at most `_MOST_NAMED`."""
    has_returned: bool
    """Whether entries that were given back wait for a replica."""


class Reclaimed(NamedTuple):
    """An entry that is pending in this replica's name, read again."""

    ref: bytes
    deliveries: int
    """The number of other replicas that died while they held it."""
    fields: list[bytes] | None
    """None if its caller has withdrawn it."""
    streamed: bool
    """Whether its reply has begun to stream."""

    @property
    def is_fresh(self) -> bool:
        """Whether it can run as any claim does: it was not redelivered to this replica, and its reply has not begun."""
        return self.fields is None or not (self.deliveries or self.streamed)

    def as_redelivered(self) -> RedeliveredEntry:
        return RedeliveredEntry(self.ref, self.deliveries, self.fields or [], self.streamed)


_MOST_NAMED = 50
_TIDY_MS = 60_000
"""Least time between two removals of dead consumers from one backend."""

_MOST_OWN = 1_000
_PAGE = 100
"""How many pending entries of a dead replica are listed at a time."""

# Finds dead consumers with pending entries. KEYS: the streams. ARGV: group, replica, the beginning of the keys of
# leases, RETURNED, whether the lease of the replica is trusted. Returns whether entries were given back, then the names
# of the dead. The summary of a pending list has only the consumers with pending entries, and is empty in an instant
# where there are none.
_SWEEP = Script(f"""#!lua flags=no-writes
{EXPIRY_CHECKER}
local names, leases, seen, returned = {{}}, {{}}, {{}}, 0
for _, stream in ipairs(KEYS) do
  for _, c in ipairs(redis.call('XPENDING', stream, ARGV[1])[4] or {{}}) do
    local name = c[1]
    if name == ARGV[4] then
      returned = 1
    elseif name ~= ARGV[2] and not seen[name] then
      seen[name] = true
      names[#names + 1], leases[#leases + 1] = name, ARGV[3] .. name
    end
  end
end
local out, is_expired = {{returned}}, expiry_checker(ARGV[3], ARGV[2], ARGV[5])
for first = 1, #leases, {_PAGE} do
  local last = math.min(first + {_PAGE - 1}, #leases)
  for i, lease in ipairs(redis.call('MGET', unpack(leases, first, last))) do
    if is_expired(lease) and #out <= {_MOST_NAMED} then out[#out + 1] = names[first + i - 1] end
  end
end
return out
""")

# Deletes dead consumers without pending entries: deleting another one would lose its entries
# (https://github.com/redis/redis/issues/8635). KEYS: the streams. ARGV: as of `_SWEEP`.
_TIDY = Script(f"""#!lua flags=allow-oom
{EXPIRY_CHECKER}
local is_expired = expiry_checker(ARGV[3], ARGV[2], ARGV[5])
for _, stream in ipairs(KEYS) do
  for _, c in ipairs(redis.call('XINFO', 'CONSUMERS', stream, ARGV[1])) do
    local name = c[2]
    if c[4] == 0 and name ~= ARGV[2] and name ~= ARGV[4] and is_expired(redis.call('GET', ARGV[3] .. name)) then
      redis.call('XGROUP', 'DELCONSUMER', stream, ARGV[1], name)
    end
  end
end
return 0
""")

# Reads entries that are pending in the name of a replica. KEYS: a stream. ARGV: group, replica, the beginning of the
# marks of streamed replies, that of the keys of attempts, then ids. Returns for each entry that is still the replica's
# its id, the count of its deliveries, its fields (false if it was withdrawn), and whether its reply has begun to
# stream.
_RECLAIM = Script(f"""#!lua flags=allow-oom
{RETRY}
local out = {{}}
for i = 5, #ARGV do
  local id = ARGV[i]
  local p = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1, ARGV[2])[1]
  if p then
    local claimed = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id, 'RETRYCOUNT', p[4])[1]
    local fields = claimed and add_retry(claimed[2], retry_of(ARGV[4], id)) or false
    out[#out + 1] = {{id, p[4], fields, redis.call('EXISTS', ARGV[3] .. id)}}
  end
end
return out
""")

# Lua: the pending entries of one of several consumers, if its lease has expired.
_OF_DEAD = f"""
{EXPIRY_CHECKER}
local function each_of_dead(first_name, leases, me, is_trusted, visit)
  local is_expired = expiry_checker(leases, me, is_trusted)
  for s, stream in ipairs(KEYS) do
    for i = first_name, #ARGV do
      local name, from = ARGV[i], '-'
      if name ~= me and is_expired(redis.call('GET', leases .. name)) then
        repeat
          local page = redis.call('XPENDING', stream, ARGV[1], from, '+', {_PAGE}, name)
          for _, p in ipairs(page) do
            local found = visit(s, stream, name, p)
            if found then return found end
            from = '(' .. p[1]
          end
        until #page < {_PAGE}
      end
    end
  end
end
"""

# Returns whether an entry of a dead replica is left. KEYS: the streams. ARGV: group, replica, the beginning of the
# keys of leases, whether the lease of the replica is trusted, then the names of replicas that may be dead.
_ARE_LEFT = Script(f"""#!lua flags=no-writes
{_OF_DEAD}
return each_of_dead(5, ARGV[3], ARGV[2], ARGV[4], function() return 1 end) or 0
""")

# Claims the oldest entry of a consumer whose lease expired, and records the death in the entry's history. There is no
# lock that a dying replica could leave behind: all of it is this script. KEYS: the streams. ARGV: group, replica, the
# beginning of the keys of leases, whether the lease of the replica is trusted, the expiry of histories in seconds, the
# beginning of the keys of histories on the first stream and on the second, the beginning of the marks of streamed
# replies, 1 to claim only entries with such a mark, and the beginnings of the keys of attempts; then the names of
# replicas that may be dead. Returns the entry's id, the count of its deliveries, its fields, the number of its stream
# and whether it has the mark; or nothing. An entry that its caller withdrew is acknowledged. The death of a replica is
# not counted for an entry that waited for its next attempt; once that is due, the next death is.
_CLAIM_EXPIRED = Script(f"""#!lua flags=allow-oom
{_OF_DEAD}
{RETRY}
local function claim(s, stream, name, p)
  local streamed = s == 1 and redis.call('EXISTS', ARGV[8] .. p[1]) or 0
  if streamed == 0 and ARGV[9] == '1' then return end
  local retry, due = retry_of(ARGV[9 + s], p[1])
  local same_count = due > 0 and {{'RETRYCOUNT', p[4]}} or {{}}
  local claimed = redis.call('XCLAIM', stream, ARGV[1], ARGV[2], 0, p[1], unpack(same_count))[1]
  if not claimed then
    redis.call('XACK', stream, ARGV[1], p[1])
    return
  end
  local time = redis.call('TIME')
  local now = time[1] .. string.sub('000000' .. time[2], -6, -4)
  local fields = add_retry(claimed[2], retry)
  if due > 0 then
    if due <= tonumber(now) then
      redis.call('SET', ARGV[9 + s] .. p[1], string.match(retry, '^%d+') .. ':0', 'EX', ARGV[5])
    end
    return {{p[1], p[4] - 1, fields, s, streamed}}
  end
  local history = ARGV[5 + s] .. p[1]
  redis.call('RPUSH', history, name, now)
  redis.call('EXPIRE', history, ARGV[5])
  return {{p[1], p[4], fields, s, streamed}}
end
return each_of_dead(12, ARGV[3], ARGV[2], ARGV[4], claim) or {{}}
""")


class PendingEntries:
    """Reads the pending lists of a backend, and claims entries of dead replicas for one replica."""

    def __init__(self, member: Member, lease: ReplicaLease) -> None:
        self._member, self._lease = member, lease
        self._streamed_prefix = member.keys.streamed(member.backend, "")
        self._history_prefix = member.keys.history(member.backend, "")

    async def sweep(self) -> Swept:
        """Find consumers whose lease has expired and who have pending entries, and whether entries were given back."""
        member = self._member
        # An idle backend, which has no pending entry at all, costs two plain commands and no script.
        first = [
            member.commands.send("XPENDING", stream, GROUP, "-", "+", 1, repeat=True, prompt=True)
            for stream in member.streams
        ]
        if not any(await asyncio.gather(*first)):
            return Swept([], has_returned=False)
        returned, *dead = await self._run(_SWEEP)
        return Swept(dead, bool(returned))

    async def tidy(self) -> None:
        """Delete dead consumers without pending entries, unless another replica has done so in the last minute.

        The cost grows with the number of replicas.
        """
        commands, turn = self._member.commands, self._member.keys.tidy_turn(self._member.backend)
        if await commands.send("SET", turn, "", "NX", "PX", _TIDY_MS, repeat=True, prompt=True):
            await self._run(_TIDY)

    def _run(self, script: Script) -> asyncio.Future[Any]:
        member = self._member
        args: list[Arg] = [GROUP, member.replica, member.lease_prefix, RETURNED, int(self._lease.is_trusted)]
        return member.commands.run_script(script, member.streams, args, repeat=True, prompt=True)

    async def are_left(self, dead: Iterable[bytes]) -> bool:
        """Return whether one of these replicas has left an entry, as far as its lease proves its death."""
        member = self._member
        args: list[Arg] = [GROUP, member.replica, member.lease_prefix, int(self._lease.is_trusted), *dead]
        return bool(await member.commands.run_script(_ARE_LEFT, member.streams, args, repeat=True, prompt=True))

    async def own_refs(self, idle_ms: int = 0) -> list[bytes]:
        """Return the refs of the entries that were claimed in this replica's name at least ``idle_ms`` ago.

        These are at most the oldest `_MOST_OWN` entries of each stream.
        """
        member = self._member
        # Two plain commands and no script: idle replicas do this all the time.
        found = await asyncio.gather(
            *[
                member.commands.send(
                    *("XPENDING", stream, GROUP, "IDLE", idle_ms, "-", "+", _MOST_OWN, member.replica),
                    repeat=True,
                    patient=True,
                )
                for stream in member.streams
            ]
        )
        interactive, batch = ([entry[0] for entry in entries] for entries in found)
        return [*interactive, *(ref_of(entry, batch=True) for entry in batch)]

    async def reclaim(self, refs: Iterable[bytes]) -> list[Reclaimed]:
        """Read those of the entries again that are still pending in this replica's name.

        Replies and settlements that the broker refused are sent again before, so none of their entries is read. Reading
        does not count as a delivery, unlike reading by ``XREADGROUP``.
        """
        member = self._member
        found: list[Reclaimed] = []
        for batch, (stream, entries) in enumerate(zip(member.streams, split_by_stream(refs), strict=True)):
            if not entries:
                continue
            args: list[Arg] = [GROUP, member.replica, self._streamed_prefix, member.retry_prefixes[batch], *entries]
            reply = await member.commands.run_script(_RECLAIM, [stream], args, repeat=True, patient=True)
            for entry, deliveries, fields, streamed in reply:
                ref = ref_of(entry, batch=True) if batch else entry
                found.append(Reclaimed(ref, max(0, deliveries - 1), fields, bool(streamed) and not batch))
        return found

    async def claim_redelivered(self, dead: Iterable[bytes], *, streamed: bool = False) -> RedeliveredEntry | None:
        """Claim the oldest entry of one of these replicas whose lease expired; record its death in the entry's history.

        With ``streamed``, claim only an entry whose reply had begun to stream. It must not run again.
        """
        member = self._member
        histories = (self._history_prefix, self._history_prefix + ref_of(b"", batch=True).decode())
        args: list[Arg] = [GROUP, member.replica, member.lease_prefix, int(self._lease.is_trusted), HISTORY_S]
        args += [*histories, self._streamed_prefix, int(streamed), *member.retry_prefixes, *dead]
        # Prompt: sent again after an outage, it would come before other replicas could renew their leases.
        reply = await member.commands.run_script(_CLAIM_EXPIRED, member.streams, args, prompt=True)
        if not reply:
            return None
        entry, deliveries, fields, stream, had_begun = reply
        return RedeliveredEntry(ref_of(entry, batch=stream == 2), deliveries, fields, had_begun == 1)

    def forget_history(self, ref: bytes) -> None:
        """Delete the history of an entry that is settled."""
        key = self._history_prefix + ref.decode()
        self._member.commands.post(log_refusal, "DEL", key, repeat=True, patient=True)
