"""Entry reader: makes claims of claimed entries, and offers them to the scheduler.

It decodes each entry and fetches a large body. An entry that cannot be decoded becomes a dead letter. An entry that its
caller withdrew, or that would miss its deadline, is settled without a reply.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any

from ...broker.errors import WireError
from ...broker.queue.consumer_group import ConsumerGroup
from ...broker.queue.group.pending_entries import RedeliveredEntry
from ...broker.transport.connection import RedisConnection
from ...broker.wire.keys import Keys
from ...broker.wire.replies import Reply
from ...broker.wire.requests import Entry
from ...handles.errors import to_wire
from ..claim import Claim
from ..executing.errors import failed_reply
from .in_progress import InProgress
from .kept_claims import KeptClaims
from .policies.load_shedding import LoadShedding
from .retries import Retries
from .scheduling import ReplyHandler, Scheduler
from .settings import ConsumerSettings
from .settlement import Settlement

log = logging.getLogger(__name__)


class EntryReader:
    """Reads the entries that one replica has claimed. Only for the loop in which it is made.

    ``replies`` is the consumer: it finishes claims that cannot start, and claims more after a body was fetched.
    """

    def __init__(
        self,
        commands: RedisConnection,
        group: ConsumerGroup,
        settlement: Settlement,
        in_progress: InProgress,
        scheduler: Scheduler,
        load_shedding: LoadShedding,
        replies: ReplyHandler,
        settings: ConsumerSettings,
        keys: Keys,
        backend: str,
        replica: str,
        kept: KeptClaims,
        retries: Retries,
    ) -> None:
        self._commands, self._group, self._settlement, self._keys = commands, group, settlement, keys
        self._in_progress, self._scheduler, self._load_shedding = in_progress, scheduler, load_shedding
        self._replies, self._kept, self._retries = replies, kept, retries
        self._max_dead_letters = settings.max_dead_letters
        self._backend, self._replica = backend, replica
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def apply(self, settings: ConsumerSettings) -> None:
        """Apply a changed configuration."""
        self._max_dead_letters = settings.max_dead_letters

    def close(self) -> None:
        """Start no claim whose body arrives later."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()

    def read(self, entries: Iterable[tuple[bytes, list[bytes] | None]]) -> None:
        """Hold each entry, and start it or let it wait. An entry that fails does not affect the next.

        An entry without fields was deleted by its caller while it was pending.
        """
        now_ms, now_s = self._commands.now_ms(), self._loop.time()
        for ref, fields in entries:
            try:
                self._read_one(ref, fields, now_ms, now_s)
            except Exception as e:
                self._fail(ref, e)

    def hold(self, ref: bytes, entry: Entry, now_ms: float, now_s: float) -> Claim | None:
        """Hold an entry, and return its claim; None if it does not start now.

        That is so if its caller withdrew it, or it would miss its deadline: it is settled. Or its code has raised in
        another replica, and its next attempt is not due yet.

        ``now_ms`` is the time by the broker's clock, ``now_s`` by the loop's.
        """
        is_kept = entry.keep_bytes is not None
        if entry.size_bytes and not is_kept:
            self._group.acknowledger.hold_sized(ref)
        claim = Claim(ref, entry, now_ms)
        deadline_ms = entry.header.deadline_ms
        if self._in_progress.forget_withdrawn(ref) or (
            deadline_ms and not self._load_shedding.should_start(deadline_ms - now_ms, now_s)
        ):
            self._drop(claim)
            return None
        self._in_progress.add(claim)
        if entry.due_ms > now_ms:
            self._retries.wait(claim, self.start_again)
            return None
        return claim

    def start_again(self, claim: Claim) -> None:
        """Start the next attempt of a claim, or settle it if it would miss its deadline."""
        entry = claim.entry
        left_ms = entry.header.deadline_ms - self._commands.now_ms()
        if entry.header.deadline_ms and not self._load_shedding.should_start(left_ms, self._loop.time()):
            self._drop(claim)
            self._in_progress.release(claim)
        elif entry.large:
            self._load(claim)
        else:
            self._scheduler.offer_again(claim)

    def _drop(self, claim: Claim) -> None:
        """Settle a claim that does not start. No reply: a caller with a deadline has a timer of its own."""
        self._scheduler.run_stats.skipped += 1
        if claim.entry.keep_bytes is None:
            self._settlement.settle(claim)
        else:
            self._kept.drop(claim)
        self._retries.forget(claim)

    async def load_body(self, claim: Claim) -> None:
        """Fetch the large body of a claim, then offer the claim to the scheduler."""
        loaded: asyncio.Future[None] = self._loop.create_future()

        def on_body(body: Any) -> None:
            self._on_body(claim, body)
            if not loaded.done():
                loaded.set_result(None)

        self._fetch(claim, on_body)
        await loaded

    def _load(self, claim: Claim) -> None:
        """Fetch the large body of a claim that a batch may wait for, then offer the claim to the scheduler."""
        self._scheduler.batching.loading.add(claim)
        self._fetch(claim, partial(self._on_awaited_body, claim))

    def _fetch(self, claim: Claim, then: Callable[[Any], None]) -> None:
        key = self._keys.body(self._backend, claim.entry.id)
        self._commands.post(then, "GET", key, repeat=True, patient=True, bulky_reply=True)

    def _on_awaited_body(self, claim: Claim, body: Any) -> None:
        if self._is_closed:
            return
        try:
            self._on_body(claim, body)
        finally:
            self._scheduler.batching.loaded(claim)
            self._scheduler.start_waiting()
            self._replies.claim()  # the claim may have been dropped

    def _on_body(self, claim: Claim, body: Any) -> None:
        """Offer a claim to the scheduler. ``body`` is its body, None if that has expired, or an exception."""
        entry = claim.entry
        if isinstance(body, Exception):
            # The entry stays pending in this replica's name, where `StrayClaims` finds it.
            log.warning("cannot fetch the body of request %s: %s", entry.shown_id, body)
            self._in_progress.release(claim)
            return
        if body is None:
            error = WireError(f"the body of request {entry.shown_id!r} has expired")
            self._replies.on_reply(claim, Reply(entry.id, 500, error=to_wire(error), replica=self._replica))
            return
        entry.body = body
        try:
            if entry.attempts:
                self._scheduler.offer_again(claim)
            else:
                self._scheduler.offer(claim)
        except Exception as e:
            self._fail(claim.ref, e)

    def _read_one(self, ref: bytes, fields: list[bytes] | None, now_ms: float, now_s: float) -> None:
        if ref in self._in_progress.claims:
            return
        if fields is None:
            self._in_progress.forget_withdrawn(ref)
            self._settlement.settle_ref(ref)
            return
        try:
            entry = Entry.of(fields)
        except Exception as e:  # a `WireError`; garbage can cause others
            self._bury(ref, fields, e)
            return
        if (claim := self.hold(ref, entry, now_ms, now_s)) is None:
            return
        if entry.large:
            self._load(claim)
        else:
            self._scheduler.offer(claim)

    def _bury(self, ref: bytes, fields: list[bytes], error: Exception) -> None:
        log.error("entry %s of %r cannot be read and goes to the dead letters: %s", ref.decode(), self._backend, error)
        unreadable = RedeliveredEntry(ref, 0, fields)
        self._spawn(self._group.dead_letters.add(unreadable, str(error), max_dead_letters=self._max_dead_letters))

    def _fail(self, ref: bytes, error: Exception) -> None:
        """Reply with an error to an entry whose handling failed by a fault of Penstock."""
        log.error("cannot handle entry %s of %r", ref.decode(), self._backend, exc_info=error)
        if (claim := self._in_progress.claims.get(ref)) is not None:
            self._replies.on_reply(claim, failed_reply(claim.entry, error, self._replica))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
