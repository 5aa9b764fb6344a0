"""Ends of claims: an entry is settled (acknowledged and deleted), or given back to all replicas."""

from __future__ import annotations

from collections.abc import Iterable

from ...transport.commands import Arg, Script
from ...wire.entry_ref import id_of, is_batch, split_by_stream
from ..queued_bytes import RELEASE
from ..signals import ENTRIES_RETURNED, signal
from .member import GROUP, RETURNED, Member, log_refusal

_MOST_AT_ONCE = 500
"""Most entries in one call of `_SETTLE_SIZED`: Lua's ``unpack`` has a limit."""

# Settles entries that have a record of their size, and deletes the records. KEYS: the stream, the records. ARGV: group,
# the number of entries, their ids, their refs.
_SETTLE_SIZED = Script(f"""#!lua flags=allow-oom
{RELEASE}
local ids, refs, count = {{}}, {{}}, tonumber(ARGV[2])
for i = 1, count do ids[i], refs[i] = ARGV[2 + i], ARGV[2 + count + i] end
redis.call('XACK', KEYS[1], ARGV[1], unpack(ids))
redis.call('XDEL', KEYS[1], unpack(ids))
release(KEYS[2], refs)
return 0
""")

# Gives back the entries that are still pending in the name of the replica. KEYS: a stream. ARGV: group, replica,
# RETURNED, then entry ids. The delivery is not counted, as the entry was never started.
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


class Acknowledger:
    """Settles the entries that one replica has claimed, or gives them back."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._sizes = member.keys.sizes(member.backend)
        self._sized: set[bytes] = set()
        """Refs of claimed entries whose size the broker has a record of."""

    @property
    def has_waiting(self) -> bool:
        """Whether settlements may be waiting to be sent again. Their entries are still pending."""
        return self._member.commands.has_waiting_commands

    def hold_sized(self, ref: bytes) -> None:
        """Note that a claimed entry has a record of its size (`Entry.size_bytes`), to be deleted with the entry."""
        self._sized.add(ref)

    def settle(self, refs: Iterable[bytes]) -> None:
        """Acknowledge and delete entries, in one write: an entry that is only acknowledged stays on its stream."""
        if self._sized:
            refs = self._settle_sized(refs)
        commands = self._member.commands
        for stream, entries in zip(self._member.streams, split_by_stream(refs), strict=True):
            if entries:
                # Patient, as replies are: if the reply timed out in an outage and the settlement did not, the request
                # would be lost.
                commands.post(log_refusal, "XACK", stream, GROUP, *entries, repeat=True, patient=True)
                commands.post(log_refusal, "XDEL", stream, *entries, repeat=True, patient=True)

    def give_back(self, refs: Iterable[bytes]) -> None:
        """Return claimed entries that were not started. Any replica may claim them, as if for the first time."""
        refs = list(refs)
        self._sized.difference_update(refs)
        member = self._member
        for stream, entries in zip(member.streams, split_by_stream(refs), strict=True):
            if entries:
                member.post_patient(_GIVE_BACK, [stream], [GROUP, member.replica, RETURNED, *entries])
        signal(member.commands, member.keys, member.backend, ENTRIES_RETURNED)

    def _settle_sized(self, refs: Iterable[bytes]) -> list[bytes]:
        """Settle the entries that have a record of their size; return the others."""
        others: list[bytes] = []
        sized: list[bytes] = []
        for ref in refs:
            (sized if ref in self._sized else others).append(ref)
        self._sized.difference_update(sized)
        for batch, stream in enumerate(self._member.streams):
            on_stream = [ref for ref in sized if is_batch(ref) == bool(batch)]
            for start in range(0, len(on_stream), _MOST_AT_ONCE):
                some = on_stream[start : start + _MOST_AT_ONCE]
                args: list[Arg] = [GROUP, len(some), *map(id_of, some), *some]
                self._member.post_patient(_SETTLE_SIZED, [stream, self._sizes], args)
        return others
