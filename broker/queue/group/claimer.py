"""Claims entries off the request streams of a backend, interactive requests before batch items."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from ...transport.commands import Arg, Script
from ...transport.connection import RedisConnection
from ...transport.session import IDLE_BLOCK_MS
from ...wire.entry_ref import ref_of
from .member import GROUP, RETRY, RETURNED, Member

ClaimedEntry = tuple[bytes, list[bytes]]
"""Entry ref and fields."""

_BLOCK = ("BLOCK", IDLE_BLOCK_MS)

# Claims from both streams without waiting. KEYS: the interactive stream, the batch stream. ARGV: group, replica, the
# most entries to claim, the most of these that the batch stream gets before the interactive one. Returns the entries of
# each stream.
_CLAIM_SHARED = Script("""#!lua flags=allow-oom
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

# Claims entries that were given back. KEYS: the streams. ARGV: group, replica, RETURNED, the most entries to claim, the
# beginning of the keys of attempts for each stream. Returns the entries of each stream. An entry that its caller
# withdrew is acknowledged.
_CLAIM_RETURNED = Script(f"""#!lua flags=allow-oom
{RETRY}
local out, left = {{}}, tonumber(ARGV[4])
for s, stream in ipairs(KEYS) do
  out[s] = {{}}
  for _, p in ipairs(left > 0 and redis.call('XPENDING', stream, ARGV[1], '-', '+', left, ARGV[3]) or {{}}) do
    local claimed = redis.call('XCLAIM', stream, ARGV[1], ARGV[2], 0, p[1])
    if claimed[1] then
      add_retry(claimed[1][2], retry_of(ARGV[4 + s], p[1]))
      out[s][#out[s] + 1] = claimed[1]
      left = left - 1
    else
      redis.call('XACK', stream, ARGV[1], p[1])
    end
  end
end
return out
""")


class Claimer:
    """Claims entries for one replica.

    Args:
        member: the replica.
        reads: a connection for the claims alone, as they block, with a ``stall_s`` of `IDLE_STALL_S`.
    """

    def __init__(self, member: Member, reads: RedisConnection) -> None:
        self._member, self._reads = member, reads
        self._batch_stream = member.streams[1].encode()

    def claim(self, up_to: int, then: Callable[[Any], None], *, block: bool = True) -> None:
        """Claim the oldest unclaimed entries of both streams.

        After an exception, entries may be pending in this replica's name that it has never seen:
        `PendingEntries.own_refs` returns them.

        Args:
            up_to: the most entries of each stream.
            then: called with a list of `ClaimedEntry`, those of the batch stream last, or with an exception.
            block: wait for the first entry, at most `IDLE_BLOCK_MS`. The list is empty if none came.
        """

        def read(reply: Any) -> None:
            if isinstance(reply, Exception):
                then(reply)
                return
            entries: list[ClaimedEntry] = []
            for stream, found in reply or ():
                entries += _on_batch(found) if stream == self._batch_stream else found
            then(entries)

        self._reads.post(
            read,
            *("XREADGROUP", "GROUP", GROUP, self._member.replica, "COUNT", up_to, *(_BLOCK if block else ())),
            *("STREAMS", *self._member.streams, ">", ">"),
        )

    def claim_shared(self, up_to: int, owed: int, then: Callable[[Any], None]) -> None:
        """Claim at most ``up_to`` entries of both streams together, without waiting.

        Interactive requests come first, except that ``owed`` entries are of the batch stream if it has as many.
        ``then`` is called as by `claim`.
        """

        def read(reply: Any) -> None:
            then(reply if isinstance(reply, Exception) else reply[0] + _on_batch(reply[1]))

        args: list[Arg] = [GROUP, self._member.replica, up_to, owed]
        self._reads.post_script(read, _CLAIM_SHARED, self._member.streams, args)

    async def claim_returned(self, up_to: int) -> list[ClaimedEntry]:
        """Claim the oldest entries that were given back."""
        member = self._member
        args: list[Arg] = [GROUP, member.replica, RETURNED, up_to, *member.retry_prefixes]
        interactive, batch = await member.commands.run_script(_CLAIM_RETURNED, member.streams, args)
        return cast("list[ClaimedEntry]", interactive) + _on_batch(batch)


def _on_batch(entries: list[ClaimedEntry]) -> list[ClaimedEntry]:
    return [(ref_of(entry, batch=True), fields) for entry, fields in entries]
