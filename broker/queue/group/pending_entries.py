"""Pending entries of a backend: those that replicas have claimed and not settled, of live and of dead replicas.

Redis counts the deliveries of each pending entry. Reading one again, or giving it back, is not counted. So more than
one delivery means that a replica died while it held the entry.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ...transport.commands import Arg, Script
from ...wire.entry_ref import ref_of, split_by_stream
from ..leases import IS_EXPIRED
from .member import GROUP, HISTORY_S, RETRY, RETURNED, Member, log_refusal


@dataclass(frozen=True, slots=True)
class RedeliveredEntry:
    """An entry whose consumer's lease expired."""

    ref: bytes
    deliveries: int
    """The number of replicas that died while they held it."""
    fields: list[bytes]
    streamed: bool = False
    """Whether its reply had begun to stream."""


class PendingCounts(NamedTuple):
    """Numbers of pending entries of a backend."""

    expired: int
    """Held by consumers whose lease expired."""
    returned: int
    """Given back, and waiting for a replica."""
    own: int
    """Held by the replica that counts."""


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


# Counts pending entries. KEYS: the streams. ARGV: group, replica, the beginning of the keys of leases, RETURNED.
# Returns the numbers of `PendingCounts`. Deletes dead consumers without pending entries: deleting another one would
# lose its entries (https://github.com/redis/redis/issues/8635).
_COUNT = Script(f"""#!lua flags=allow-oom
{IS_EXPIRED}
local is_expired = expiry_checker(ARGV[3], ARGV[2])
local expired, returned, own = 0, 0, 0
for _, stream in ipairs(KEYS) do
  for _, c in ipairs(redis.call('XINFO', 'CONSUMERS', stream, ARGV[1])) do
    local name, pending = c[2], c[4]
    if name == ARGV[4] then
      returned = returned + pending
    elseif name == ARGV[2] then
      own = own + pending
    elseif is_expired(name) then
      expired = expired + pending
      if pending == 0 then redis.call('XGROUP', 'DELCONSUMER', stream, ARGV[1], name) end
    end
  end
end
return {{expired, returned, own}}
""")

# Lists the entries that are pending in the name of a replica. KEYS: the streams. ARGV: group, replica, the least time
# since their claim, in milliseconds. Returns the ids of each stream.
_OWN_IDS = Script("""#!lua flags=no-writes
local out = {}
for s, stream in ipairs(KEYS) do
  out[s] = {}
  for i, p in ipairs(redis.call('XPENDING', stream, ARGV[1], 'IDLE', ARGV[3], '-', '+', 1000, ARGV[2])) do
    out[s][i] = p[1]
  end
end
return out
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

# Claims the oldest entry of a consumer whose lease expired, and records the death in the entry's history. There is no
# lock that a dying replica could leave behind: all of it is this script. KEYS: the streams. ARGV: group, replica, the
# beginning of the keys of leases, RETURNED, the expiry of histories in seconds, the beginning of the keys of histories
# on the first stream and on the second, the beginning of the marks of streamed replies, 1 to claim only entries with
# such a mark, and the beginnings of the keys of attempts. Returns the entry's id, the count of its deliveries, its
# fields, the number of its stream and whether it has the mark; or nothing. An entry that its caller withdrew is
# acknowledged. The death of a replica is not counted for an entry that waited for its next attempt; once that is due,
# the next death is.
_CLAIM_EXPIRED = Script(f"""#!lua flags=allow-oom
{IS_EXPIRED}
{RETRY}
local group, me = ARGV[1], ARGV[2]
local is_expired = expiry_checker(ARGV[3], me)
for s, stream in ipairs(KEYS) do
  for _, c in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
    local name = c[2]
    if c[4] > 0 and name ~= me and name ~= ARGV[4] and is_expired(name) then
      for _, p in ipairs(redis.call('XPENDING', stream, group, '-', '+', c[4], name)) do
        local streamed = s == 1 and redis.call('EXISTS', ARGV[8] .. p[1]) or 0
        local wanted = streamed == 1 or ARGV[9] == '0'
        local retry, due = retry_of(ARGV[9 + s], p[1])
        local same_count = due > 0 and {{'RETRYCOUNT', p[4]}} or {{}}
        local claimed = wanted and redis.call('XCLAIM', stream, group, me, 0, p[1], unpack(same_count))
        if not wanted then
          -- It is claimed by the call for all entries.
        elseif claimed[1] then
          local time = redis.call('TIME')
          local now = time[1] .. string.sub('000000' .. time[2], -6, -4)
          local fields = add_retry(claimed[1][2], retry)
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
        else
          redis.call('XACK', stream, group, p[1])
        end
      end
    end
  end
end
return {{}}
""")


class PendingEntries:
    """Reads the pending lists of a backend, and claims entries of dead replicas for one replica."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._streamed_prefix = member.keys.streamed(member.backend, "")
        self._history_prefix = member.keys.history(member.backend, "")

    async def count(self) -> PendingCounts:
        """Count the entries to redeliver, those that were given back, and this replica's own."""
        member = self._member
        args: list[Arg] = [GROUP, member.replica, member.lease_prefix, RETURNED]
        reply = await member.commands.run_script(_COUNT, member.streams, args, repeat=True, prompt=True)
        return PendingCounts(*reply)

    async def own_refs(self, idle_ms: int = 0) -> list[bytes]:
        """Return the refs of the entries that were claimed in this replica's name at least ``idle_ms`` ago.

        These are at most the oldest 1,000 entries of each stream.
        """
        member = self._member
        args: list[Arg] = [GROUP, member.replica, idle_ms]
        interactive, batch = await member.commands.run_script(_OWN_IDS, member.streams, args, repeat=True, patient=True)
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

    async def claim_redelivered(self, *, streamed: bool = False) -> RedeliveredEntry | None:
        """Claim the oldest entry of a replica whose lease expired, and record that death in the entry's history.

        With ``streamed``, claim only an entry whose reply had begun to stream. It must not run again.
        """
        member = self._member
        histories = (self._history_prefix, self._history_prefix + ref_of(b"", batch=True).decode())
        args: list[Arg] = [GROUP, member.replica, member.lease_prefix, RETURNED, HISTORY_S, *histories]
        args += [self._streamed_prefix, int(streamed), *member.retry_prefixes]
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
