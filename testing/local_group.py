"""The consumer group of a queue in memory: what the consumer of a replica claims from, replies to and settles with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..broker.queue.consumer_group import ConsumerGroup
from ..broker.queue.group.acknowledger import Acknowledger
from ..broker.queue.group.attempts import Attempts
from ..broker.queue.group.claimer import ClaimedEntry, Claimer
from ..broker.queue.group.member import Member
from ..broker.queue.group.reply_sender import ReplySender
from ..broker.wire.keys import Keys
from ..broker.wire.replies import Reply
from .local_connection import LocalConnection
from .local_queue import LocalQueue

WaitingClaim = tuple[int, Callable[[Any], None]]


class LocalGroup(ConsumerGroup):
    """The group with its one member. Only for the loop of the replica."""

    def __init__(self, commands: LocalConnection, queue: LocalQueue, keys: Keys, backend: str, replica: str) -> None:
        super().__init__(commands, commands, keys, backend, replica)
        member = Member(commands, keys, backend, replica)
        self.local_claimer = LocalClaimer(member, commands, queue)
        self.claimer = self.local_claimer
        self.replies = LocalReplySender(commands, keys, backend, queue)
        self.acknowledger = LocalAcknowledger(member, queue)
        self.attempts = LocalAttempts(member)

    async def ensure(self) -> None:
        pass


class LocalClaimer(Claimer):
    """Claims entries from the queue."""

    def __init__(self, member: Member, reads: LocalConnection, queue: LocalQueue) -> None:
        super().__init__(member, reads)
        self._queue = queue
        self._loop = asyncio.get_running_loop()
        self._waiting: WaitingClaim | None = None
        """A claim that waits until an entry is published."""

    def claim(self, up_to: int, then: Callable[[Any], None], *, block: bool = True) -> None:
        if (entries := self._queue.claim(up_to)) or not block:
            self._loop.call_soon(then, entries)
        else:
            self._waiting = up_to, then

    def claim_shared(self, up_to: int, owed: int, then: Callable[[Any], None]) -> None:
        self.claim(up_to, then, block=False)

    async def claim_returned(self, up_to: int) -> list[ClaimedEntry]:
        return self._queue.claim_returned(up_to)

    def on_published(self) -> None:
        """End the claim that waits. Called on the loop after an entry was published."""
        if (waiting := self._waiting) is not None and (entries := self._queue.claim(waiting[0])):
            self._waiting = None
            waiting[1](entries)


class LocalAcknowledger(Acknowledger):
    """Settles entries of the queue, or gives them back."""

    def __init__(self, member: Member, queue: LocalQueue) -> None:
        super().__init__(member)
        self._queue = queue

    def hold_sized(self, ref: bytes) -> None:
        pass

    def settle(self, refs: Iterable[bytes]) -> None:
        for ref in refs:
            self._queue.settle(ref)

    def give_back(self, refs: Iterable[bytes]) -> None:
        for ref in refs:
            self._queue.give_back(ref)


class LocalReplySender(ReplySender):
    """Passes replies to the callers of the queue."""

    def __init__(self, commands: LocalConnection, keys: Keys, backend: str, queue: LocalQueue) -> None:
        super().__init__(commands, keys, backend)
        self._queue = queue

    def send(self, caller: str, fields: Sequence[bytes]) -> None:
        self._queue.reply(caller, list(fields))

    def send_part(self, caller: str, fields: Sequence[bytes], on_gone: Callable[[], None]) -> None:
        if not self._queue.reply(caller, list(fields)):
            on_gone()

    def mark_streamed(self, ref: bytes) -> None:
        pass

    def forget_streamed(self, ref: bytes) -> None:
        pass

    def send_large(
        self,
        caller: str,
        request: str,
        body: bytes,
        ttl_ms: int,
        fields: Sequence[bytes],
        too_long: Callable[[], Sequence[bytes]],
    ) -> None:
        for reply in Reply.all_of(list(fields)):
            reply.body, reply.large = body, False
            self._queue.reply(caller, reply.fields())


class LocalAttempts(Attempts):
    """Records nothing: the one replica counts the attempts of its claims."""

    def record(self, ref: bytes, attempts: int, due_ms: int) -> None:
        pass

    def forget(self, ref: bytes) -> None:
        pass
