"""Settlement: the reply to the caller, then acknowledge and delete."""

from __future__ import annotations

import logging
from typing import Any

from ...broker.queue.consumer_group import ConsumerGroup
from ...broker.queue.group.reply_sender import ReplySender
from ...broker.transport.connection import RedisConnection
from ...broker.wire._fields import LARGE
from ...broker.wire.keys import Keys
from ...broker.wire.replies import Reply
from ...handles.calls.large_bodies import too_long as too_long_of
from ...handles.errors import BackendError, PayloadTooLarge, PenstockError, StreamBroken, to_wire
from ..claim import Claim

log = logging.getLogger(__name__)

_REPLY_BODY_MS = 120_000
"""How long the broker keeps a large body of a reply that its caller does not fetch."""
_COMBINED_MAX_BYTES = 1024
"""Longest body of a reply that is combined with others. Replies of one loop tick with the same caller, codec and status
share one entry of the reply stream: an entry with many replies costs about as much as one with a single reply.
"""
_COMBINED_MAX_REPLIES = 64
"""Most replies in one such entry."""


AlikeReplies = dict[tuple[str, str, int], list[Reply]]
"""Small replies, by their caller, codec and status."""


def is_combined(reply: Reply) -> bool:
    """Return whether a reply is combined with others."""
    return len(reply.body) <= _COMBINED_MAX_BYTES and reply.error is None and not reply.headers


def send_combined(sender: ReplySender, alike: AlikeReplies) -> None:
    """Send replies to their callers in as few entries as possible."""
    for (caller, _, _), replies in alike.items():
        for start in range(0, len(replies), _COMBINED_MAX_REPLIES):
            sender.send(caller, Reply.fields_of(replies[start : start + _COMBINED_MAX_REPLIES]))


class Settlement:
    """Replies to callers and settles entries, for one replica. A reply precedes its settlement in the same write."""

    def __init__(self, commands: RedisConnection, group: ConsumerGroup, keys: Keys, backend: str, replica: str) -> None:
        self._commands, self._group, self._keys = commands, group, keys
        self._backend, self._replica = backend, replica
        self._settled: list[bytes] = []
        self._bodies: list[str] = []
        """The keys of large bodies of settled entries, deleted behind these."""
        self._replies: list[tuple[Claim, Reply]] = []
        """Small replies, combined and written when their entries are settled."""

    def reply(self, claim: Claim, reply: Reply) -> None:
        """Send the reply to a claim, which has a caller. The next call must be `settle` with the same claim."""
        if len(reply.body) <= _COMBINED_MAX_BYTES and reply.error is None and not reply.headers:
            self._replies.append((claim, reply))
            return
        caller = claim.entry.caller
        if len(reply.body) > LARGE:
            body, longest = reply.body, self._commands.max_string_bytes

            def too_long() -> list[bytes]:
                message = str(too_long_of(body, min(longest, len(body) - 1)))
                error = to_wire(BackendError(PayloadTooLarge.__name__, message))
                return Reply(reply.id, 500, error=error, replica=self._replica, run_ms=reply.run_ms).fields()

            if len(body) > longest:
                self._group.replies.send(caller, too_long())
                return
            reply.body, reply.large = b"", True
            self._group.replies.send_large(caller, reply.id, body, _REPLY_BODY_MS, reply.fields(), too_long)
        else:
            self._group.replies.send(caller, reply.fields())

    def reply_early(self, claim: Claim, reply: Reply) -> None:
        """Send the reply to a claim, which has a caller and is settled later."""
        if not self._settled:
            self._commands.join_write(self._flush_settled)
        self.reply(claim, reply)

    def _reply_together(self) -> None:
        alike: AlikeReplies = {}
        pending, self._replies = self._replies, []
        for claim, reply in pending:
            key = claim.entry.caller, reply.codec, reply.status
            if (together := alike.get(key)) is None:
                alike[key] = [reply]
            else:
                together.append(reply)
        send_combined(self._group.replies, alike)

    def settle(self, claim: Claim) -> None:
        """Acknowledge and delete the entry of a claim and its large body, behind its reply in the same write."""
        self.settle_ref(claim.ref)
        if claim.entry.large:
            self._bodies.append(self._keys.body(self._backend, claim.entry.id))

    def settle_ref(self, ref: bytes) -> None:
        """Acknowledge and delete an entry that has no body to delete."""
        # Never before the reply: a death in between repeats a request, while the other order would lose one.
        if not self._settled:
            self._commands.join_write(self._flush_settled)
        self._settled.append(ref)

    def _flush_settled(self) -> None:
        settled, self._settled = self._settled, []
        if self._replies:
            self._reply_together()
        if settled:
            self._group.acknowledger.settle(settled)
        if self._bodies:
            bodies, self._bodies = self._bodies, []
            self._commands.post(_log_failure, "UNLINK", *bodies, repeat=True, patient=True)

    def break_off(self, claim: Claim, reason: str) -> None:
        """Fail a streamed reply with `StreamBroken` and settle its entry: a begun stream must not run again."""
        entry = claim.entry
        log.warning("streamed reply to request %s of backend %r broke off: %s", entry.shown_id, self._backend, reason)
        self.refuse(claim, StreamBroken(self._backend, entry.shown_id, reason))
        if entry.size_bytes:
            self._group.acknowledger.hold_sized(claim.ref)
        self.settle(claim)

    def refuse(self, claim: Claim, error: PenstockError) -> None:
        """Reply with an error to an entry that does not run. It is not settled."""
        entry = claim.entry
        if entry.caller:
            reply = Reply(entry.id, error.status, error=to_wire(error), replica=self._replica)
            self._group.replies.send(entry.caller, reply.fields())


def _log_failure(result: Any) -> None:
    if isinstance(result, Exception):
        log.error("cannot delete the body of a request: %s", result)
