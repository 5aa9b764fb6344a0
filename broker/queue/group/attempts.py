"""Attempts of entries whose code raised an error that is retried.

A claimed entry cannot be changed. So its attempts, and when the next one is due, lie in a key of their own, and the
scripts that claim an entry again add both to its fields. They outlive the replica: another one goes on counting, and
does not begin early. An entry that waits for its next attempt runs nowhere, so the death of its replica is not counted
as one that it may have caused.
"""

from __future__ import annotations

from ...transport.commands import Arg, Script
from .member import HISTORY_S, Member, log_refusal

# Records the attempts of an entry. KEYS: the key of its attempts. ARGV: their number and when the next one is due, the
# expiry in seconds. It is an accepted request, so a broker that is out of memory does not refuse it.
_RECORD = Script("""#!lua flags=allow-oom
return redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
""")


class Attempts:
    """Records the attempts of the entries that one replica has claimed."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._prefix = member.keys.retry(member.backend, "")

    def record(self, ref: bytes, attempts: int, due_ms: int) -> None:
        """Record that the code was called ``attempts`` times for an entry, and when the next call is due.

        Args:
            ref: of the entry.
            attempts: at least 1.
            due_ms: Unix time by the broker's clock; 0 when the entry no longer waits.
        """
        args: list[Arg] = [b"%d:%d" % (attempts, due_ms), HISTORY_S]
        self._member.post_patient(_RECORD, [self._prefix + ref.decode()], args)

    def forget(self, ref: bytes) -> None:
        """Delete the record of an entry that is settled."""
        self._member.commands.post(log_refusal, "DEL", self._prefix + ref.decode(), repeat=True, patient=True)
