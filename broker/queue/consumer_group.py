"""The consumer group of a backend, as one replica uses it.

A backend has two streams: one for interactive requests and one for batch items. An entry ref names an entry of either.
Each stream has one consumer group, and each replica is a consumer of it. An entry is in the group's pending list from
its claim to its settlement, so a replica that dies leaves a record of exactly the entries that it held.

The group has one part for each step in the life of an entry. All of them concern accepted requests, so a broker that is
out of memory refuses none of their commands.
"""

from __future__ import annotations

from ..transport.commands import Script
from ..transport.connection import RedisConnection
from ..wire.keys import Keys
from .group.acknowledger import Acknowledger
from .group.attempts import Attempts
from .group.claimer import Claimer
from .group.dead_letter_writer import DeadLetterWriter
from .group.member import GROUP, Member
from .group.pending_entries import PendingEntries
from .group.replica_lease import ReplicaLease
from .group.reply_sender import ReplySender

# Creates the streams and their groups where they do not exist. KEYS: the streams. ARGV: group.
_ENSURE = Script("""#!lua flags=allow-oom
for _, stream in ipairs(KEYS) do
  local made = redis.pcall('XGROUP', 'CREATE', stream, ARGV[1], '0', 'MKSTREAM')
  if made.err and not string.find(made.err, 'BUSYGROUP') then return made end
end
return 0
""")

# Returns whether there is an entry that no replica has claimed. KEYS: the streams. ARGV: group. The lag that a group
# reports does not help: it is unknown once entries were deleted.
_IS_WAITING = Script("""#!lua flags=no-writes
for _, stream in ipairs(KEYS) do
  for _, g in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    if g[2] == ARGV[1] and redis.call('XRANGE', stream, '(' .. g[8], '+', 'COUNT', 1)[1] then return 1 end
  end
end
return 0
""")


# Deletes a consumer without pending entries. KEYS: the streams. ARGV: group, replica.
_LEAVE = Script("""#!lua flags=allow-oom
for _, stream in ipairs(KEYS) do
  if not redis.call('XPENDING', stream, ARGV[1], '-', '+', 1, ARGV[2])[1] then
    redis.call('XGROUP', 'DELCONSUMER', stream, ARGV[1], ARGV[2])
  end
end
return 0
""")


class ConsumerGroup:
    """The consumer group of one backend, for one replica.

    Args:
        commands: the multiplexed connection of the replica.
        reads: a connection for the claims alone, as they block, with a ``stall_s`` of `IDLE_STALL_S`.
        keys: the keys of the instance.
        backend: tag of the backend.
        replica: name of the replica, which is that of its consumer.

    Attributes:
        lease: the lease of the replica.
        claimer: claims entries.
        pending: reads pending entries, and claims those of dead replicas.
        replies: sends replies to callers.
        acknowledger: settles entries, or gives them back.
        attempts: records the attempts of entries whose code raised.
        dead_letters: moves entries to the dead letters.
    """

    def __init__(
        self, commands: RedisConnection, reads: RedisConnection, keys: Keys, backend: str, replica: str
    ) -> None:
        self._member = member = Member(commands, keys, backend, replica)
        self.claimer = Claimer(member, reads)
        self.lease = ReplicaLease(member)
        self.pending = PendingEntries(member, self.lease)
        self.replies = ReplySender(commands, keys, backend)
        self.acknowledger = Acknowledger(member)
        self.attempts = Attempts(member)
        self.dead_letters = DeadLetterWriter(member)

    async def ensure(self) -> None:
        """Create the streams and their groups if they do not exist. Requests published before are delivered."""
        await self._member.commands.run_script(_ENSURE, self._member.streams, [GROUP], repeat=True)

    async def is_work_waiting(self) -> bool:
        """Return whether there is an entry that no replica has claimed."""
        return bool(await self._member.commands.run_script(_IS_WAITING, self._member.streams, [GROUP], repeat=True))

    async def leave(self) -> None:
        """Delete this replica's consumer, if it has no pending entry."""
        member = self._member
        await member.commands.run_script(_LEAVE, member.streams, [GROUP, member.replica], repeat=True, prompt=True)
