"""The consumer of one replica: claims entries, has them run, replies and settles.

It pulls: it claims when it has room, in small counts that overlap with the work, so that a slow request never holds up
another one while a replica is idle. Replies and claims are continuations of the connections' reads, not tasks: a small
request costs the replica no switch between tasks but those of the user's code.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Iterable
from functools import partial
from time import monotonic
from typing import Any

from ...broker.errors import BrokerRefused, BrokerUnavailable, WireError
from ...broker.queue.consumer_group import ConsumerGroup
from ...broker.queue.dead_letter_limits import MAX_DEAD_LETTERS
from ...broker.queue.group.pending_entries import RedeliveredEntry
from ...broker.queue.stats import RunStats
from ...broker.transport.connection import RedisConnection
from ...broker.wire.entry_ref import is_batch
from ...broker.wire.keys import Keys
from ...broker.wire.replies import Reply
from ...broker.wire.requests import Entry
from ...handles.errors import to_wire
from ..executing.errors import failed_reply
from ..executing.runner import Runner
from .batching import Batching
from .claim import Claim
from .fairness import BATCH_SHARE, Fairness
from .load_shedding import LoadShedding
from .prefetch import CallTimePredictor
from .settlement import Settlement
from .stream_sender import StreamSender

log = logging.getLogger(__name__)

_CLAIM = 16
"""More than this in one claim makes convoys: 8 to 16 were 15 to 20 % faster at 100 connections than 100."""
_CLAIM_MOST = 64
"""A claim that came back full is followed by one twice as large, up to this: with 1,000 requests in flight, 64 at
a time took a sixth off what each costs replica, broker and caller, and a third for blocking code.
"""
_PREFETCH = 64
_PREFETCH_S = 0.002
"""Blocking code has at most this much work waiting for it here: nobody waits behind more while a replica is idle."""
_SLOW_S = 0.010
_CONSIDERATE_S = 1.0
"""While batch items wait, and for this long after an interactive request has come, room is made for the next one, which
waits behind all that was claimed before it: no batch is fetched ahead.
"""
_STUCK_S = 0.025
_REMEMBER = 10_000
_RETRY_S = 0.2


class Consumer:
    """The claims of one replica, from claiming each entry to settling it. Bound to the loop in which it is opened."""

    def __init__(
        self,
        runner: Runner,
        commands: RedisConnection,
        claims: ConsumerGroup,
        answers: Settlement,
        keys: Keys,
        backend: str,
        replica: str,
    ) -> None:
        self._runner, self._commands, self._group, self._keys = runner, commands, claims, keys
        self._backend, self._replica = backend, replica
        self._settlement = answers
        self._reply, self._settle, self._drop_body = answers.reply, answers.settle, answers.drop_body
        self.stream_sender = StreamSender(commands, claims, self._ref_of)
        self.held: dict[bytes, Claim] = {}
        """All claims that are not settled, started or not, by their entry refs."""
        self._by_entry: dict[int, Claim] = {}
        self.released: set[bytes] | None = None
        """Entries released while a search for stray claims is in flight; its result must ignore them."""
        self.unstarted: deque[Claim] = deque()
        """Claims that wait: for a batch to fill up, for the end of a quarantine, or for a free slot."""
        self._crowded = False
        """The last claim brought more than there was room for: both streams returned entries."""
        self._fairness = Fairness()
        self._sharing = False
        """Batch items were waiting at the last claim."""
        self._considerate_until = 0.0
        self._withdrawn: dict[bytes, None] = {}
        self._batches = Batching(commands.now_ms, self._is_considerate, self.start_unstarted, self.ask)
        self._recall: asyncio.TimerHandle | None = None
        self._claiming = False
        self._returning: list[bytes] = []
        """Refs of the entries to give back in this loop tick."""
        self.claims_answered = 0
        """How many claims the broker has answered, if only with nothing or with an error."""
        self.returned = False
        """Other replicas have given back more than this one had room for."""
        self.is_quarantining = False
        self.draining = False
        self._load_shedding = LoadShedding()
        self._run_s = 1.0
        """Run time of a call, in seconds: rises at once to a slower call, and falls slowly."""
        self._last_done = 0.0
        self._call_times = CallTimePredictor()
        self._near_end_timer: asyncio.TimerHandle | None = None
        """Fires shortly before the running call ends."""
        self.idle = asyncio.Event()
        self.wake = asyncio.Event()
        self._loading: set[asyncio.Task[None]] = set()
        self.run_stats = RunStats()

    @property
    def capacity(self) -> int:
        """The number of requests that run at a time when all slots are occupied."""
        return self._concurrency * max(1, self.batch_size)

    @property
    def could_claim(self) -> bool:
        """Whether a claim should be in flight: there is room, and neither quarantine nor draining forbids it."""
        if self.is_quarantining or self.draining or (self.batch_size and self._batches.is_busy):
            return False
        return self.room() > 0

    def open(self) -> None:
        """Bind to the running loop."""
        self._loop = asyncio.get_running_loop()

    def close(self) -> None:
        """Drop all claims; streamed replies break off."""
        self._batches.close()
        for timer in (self._recall, self._near_end_timer):
            if timer is not None:
                timer.cancel()
        for task in self._loading:
            task.cancel()
        for flow in self.stream_sender.flows:
            if (held := self._by_entry.get(id(flow.entry))) is not None:
                self._settlement.break_off(held.ref, flow.entry, "its replica was stopped")
                self._forget(held)
            flow.stop()
        self.stream_sender.close()

    def configure(self) -> None:
        """Apply the runner's configuration, now and after each change of it."""
        config = self._runner.config
        self._concurrency = self._runner.concurrency()
        self.max_deliveries: int = config.get("max_deliveries", 3)
        self.max_dead_letters: int = config.get("max_dead_letters", MAX_DEAD_LETTERS)
        self.batch_size: int = config.get("max_batch_size") or 1 if self._runner.accepts_batch else 0
        """0 where the user's code takes one request at a time."""
        self.claim_size = max(_CLAIM, self.batch_size)
        """What one claim takes, unless there is more than that again and again."""
        self._next_claim = self.claim_size
        self._one_by_one = self._runner.blocking and self._concurrency == 1 and not self.batch_size
        wait_s: float = config.get("batch_wait_timeout", 0.0)
        self._batches.configure(self.batch_size, self._concurrency, wait_s, is_blocking=self._runner.blocking)
        self._fairness = Fairness(config.get("batch_share", BATCH_SHARE))

    async def drain(self, timeout_s: float) -> bool:
        """Stop claiming, give back claims that have not started, and finish the others.

        Returns False if some of it was still running after ``timeout_s`` seconds.
        """
        self.draining = True
        self._recall_unstarted()
        if self.held:
            self.idle.clear()
            try:
                await asyncio.wait_for(self.idle.wait(), timeout_s)
            except asyncio.TimeoutError:
                return False
        return True

    # -- claiming

    def room(self) -> int:
        """Return the number of free slots; negative if more is claimed than there are slots."""
        if self.batch_size:
            return self._batches.room(len(self.unstarted))
        if self._runner.blocking and self._run_s <= _SLOW_S:
            capacity = self._concurrency + max(1, min(_PREFETCH, int(_PREFETCH_S / max(self._run_s, 1e-6))))
        else:
            capacity = self._concurrency
            # Not while batch items wait: an interactive request that arrives now would wait behind one of them.
            if self.held and not self._sharing and self._call_times.nears_end(monotonic()):
                capacity += 1
        return capacity - len(self.held)

    def ask(self, *, block: bool = True) -> None:
        """Claim if there is room; without ``block``, only entries that are waiting already."""
        if self._claiming or self.is_quarantining or self.draining:
            return
        if (room := self.room()) <= 0:
            return
        if self.returned:
            self.wake.set()  # entries that were given back are older
            return
        self._claiming = True
        up_to = min(room, self.claim_size if self._sharing else self._next_claim)
        if self.batch_size:
            block = block and self._batches.may_block
            if self._sharing or not block:
                self._batches.fetch_began(up_to)
        if self._sharing:
            owed = self._fairness.owed(up_to)
            self._group.claimer.claim_shared(up_to, owed, partial(self._on_claimed_shared, up_to, owed))
        else:
            self._group.claimer.claim(up_to, partial(self._on_claimed, up_to), block=block)

    def fill_up(self) -> None:
        """Claim waiting entries for an incomplete batch that is about to start."""
        if self.batch_size and self._batches.needs_more(len(self.unstarted)):
            self.ask(block=False)

    def _is_considerate(self) -> bool:
        return self._sharing and self._loop.time() < self._considerate_until

    def _on_claimed_shared(self, up_to: int, owed: int, result: Any) -> None:
        try:
            if isinstance(result, Exception):
                self._sharing = False
            else:
                batch = sum(is_batch(ref) for ref, _ in result)
                self._sharing = len(result) == up_to and batch >= owed
                if batch < len(result):
                    self._considerate_until = self._loop.time() + _CONSIDERATE_S
                self._fairness = self._fairness.after(len(result) - batch, batch, waiting=self._sharing)
        finally:
            self._take_claimed(result)

    def _on_claimed(self, up_to: int, result: Any) -> None:
        room = None
        try:
            self._next_claim = self.claim_size
            if not self.batch_size and not isinstance(result, Exception) and len(result) >= up_to:
                self._next_claim = min(max(2 * up_to, _CLAIM), _CLAIM_MOST)
            if result and not isinstance(result, Exception) and is_batch(result[-1][0]):
                # From both streams at once there can be more than there is room for. Interactive requests come first.
                self._sharing = True
                if not self.batch_size:
                    room = max(0, self.room())
        finally:
            self._take_claimed(result, room)

    def _take_claimed(self, result: Any, room: int | None = None) -> None:
        """Hold all entries of a claim, and start as many as there is ``room`` for; all of them by default."""
        self._claiming = False
        self.claims_answered += 1
        if isinstance(result, Exception):
            if self.draining:
                return
            self._claiming = True  # until the retry
            self._task(self._retry_claim(result))
            self._batches.fetch_ended(0)
            self.start_unstarted()
            return
        if self.draining:  # the claim was sent before
            if result:
                self._group.acknowledger.give_back([ref for ref, _ in result])
            return
        try:
            if room is not None and room < len(result):
                self._take_each(result[:room])
                self._crowded = True
                result = result[room:]
            self._take_each(result)
            self._batches.fetch_ended(len(result))
            self.start_unstarted()
        finally:
            if len(result) == 1:
                # After the reply of a quick call, which its caller is waiting for: one write then carries both.
                self._loop.call_soon(self.ask)
            else:
                self.ask()

    async def _retry_claim(self, error: Exception) -> None:
        if isinstance(error, BrokerRefused) and error.said.startswith("NOGROUP"):
            log.warning("the consumer group of backend %r is gone: creating it again", self._backend)
        elif not isinstance(error, BrokerUnavailable):
            log.error("cannot claim from backend %r: %s", self._backend, error)
        try:
            await asyncio.sleep(_RETRY_S)
            await self._group.ensure()
        except (BrokerUnavailable, BrokerRefused) as e:
            log.debug("cannot create the consumer group of backend %r: %s", self._backend, e)
        finally:
            self._claiming = False
            self.ask()

    def take_all(self, entries: Iterable[tuple[bytes, list[bytes] | None]]) -> None:
        """`take` each entry, and start as many as may start."""
        self._take_each(entries)
        self.start_unstarted()

    def _take_each(self, entries: Iterable[tuple[bytes, list[bytes] | None]]) -> None:
        """`take` each entry; one that fails does not affect the next."""
        for ref, fields in entries:
            try:
                self.take(ref, fields)
            except Exception as e:
                self._fail(ref, e)

    def _fail(self, ref: bytes, error: Exception) -> None:
        """Reply with an error to an entry whose handling failed by a fault of Penstock."""
        log.error("cannot handle entry %s of %r", ref.decode(), self._backend, exc_info=error)
        if (held := self.held.get(ref)) is not None:
            self._on_done(held.entry, failed_reply(held.entry, error, self._replica))

    def take(self, ref: bytes, fields: list[bytes] | None) -> None:
        """Hold an entry and start it as soon as possible, unless it is held already or was withdrawn."""
        if ref in self.held:
            return
        if fields is None:
            self._withdrawn.pop(ref, None)
            self._settle(ref)
            return
        try:
            entry = Entry.of(fields)
        except Exception as e:  # a `WireError`; garbage can bring about others
            shown = ref.decode()
            log.error("entry %s of %r cannot be read and goes to the dead letters: %s", shown, self._backend, e)
            self._task(
                self._group.dead_letters.add(
                    RedeliveredEntry(ref, 0, fields), str(e), max_dead_letters=self.max_dead_letters
                )
            )
            return
        if (held := self.hold(ref, entry)) is None:
            return
        if entry.large:
            self._batches.loading.add(held)
            self._task(self._load_claimed(held))
        else:
            self.offer(held)

    def hold(self, ref: bytes, entry: Entry) -> Claim | None:
        """Hold an entry. Return None, and settle it, if its caller withdrew it or it would miss its deadline."""
        if entry.size_bytes:
            self._group.acknowledger.hold_sized(ref)
        now_ms = self._commands.now_ms()
        deadline_ms = entry.header.deadline_ms
        # No reply: a caller with a deadline has a timer of its own.
        if ref in self._withdrawn or (
            deadline_ms and not self._load_shedding.should_start(deadline_ms - now_ms, self._loop.time())
        ):
            self._withdrawn.pop(ref, None)
            self._settle(ref)
            self._drop_body(entry)
            return None
        held = self.held[ref] = Claim(ref, entry, now_ms)
        self._by_entry[id(entry)] = held
        return held

    async def load_body(self, held: Claim) -> None:
        """Fetch the large body of a claim, then offer the claim."""
        key = self._keys.body(self._backend, held.entry.id)
        try:
            body = await self._commands.send("GET", key, repeat=True, patient=True, bulky_reply=True)
        except (BrokerUnavailable, BrokerRefused) as e:
            # It stays pending in this replica's name, where `StrayClaims` finds it.
            log.warning("cannot fetch the body of request %s: %s", held.entry.shown_id, e)
            self._forget(held)
            return
        if body is None:
            error = WireError(f"the body of request {held.entry.shown_id!r} has expired")
            self._on_done(held.entry, Reply(held.entry.id, 500, error=to_wire(error), replica=self._replica))
            return
        held.entry.body = body
        try:
            self.offer(held)
        except Exception as e:
            self._fail(held.ref, e)

    async def _load_claimed(self, held: Claim) -> None:
        try:
            await self.load_body(held)
        finally:
            self._batches.loaded(held)
            self.start_unstarted()
            self.ask()  # the claim may have been dropped

    # -- running

    def offer(self, held: Claim) -> None:
        """Start a claim, unless a quarantine is in progress, a batch is filling up or there is no free slot."""
        if held.quarantine_ended is None and (self.is_quarantining or self.batch_size or self._crowded):
            self.unstarted.append(held)
        else:
            self._start([held])

    def start_redelivered(self, redelivered: list[Claim]) -> None:
        """Start redelivered entries, in as few calls as possible."""
        size = max(1, self.batch_size)
        for start in range(0, len(redelivered), size):
            self._start(redelivered[start : start + size])

    def start_unstarted(self) -> None:
        """Start waiting claims as far as possible: in batches, if user code takes batches."""
        waiting = self.unstarted
        if self.is_quarantining or not waiting:
            if waiting:
                self._watch_for_slowness()
            return
        if not self.batch_size:
            while waiting and (not self._crowded or len(waiting) + self.room() > 0):
                self._start([waiting.popleft()])
            if waiting:
                self._watch_for_slowness()
            else:
                self._crowded = False
            return
        while batch := self._batches.next(waiting):
            self._start_batch(batch)
        if self._batches.holds_up(len(waiting)):
            self._watch_for_slowness()

    def _start(self, claims: list[Claim]) -> None:
        if self.batch_size:
            self._start_batch(claims)
            return
        held = claims[0]
        held.running = self._runner.run([held.entry], self._on_done)
        if self._runner.blocking and len(self.held) > self._concurrency:
            self._watch_for_slowness()
        elif self._one_by_one:
            self._predict_end()

    def _start_batch(self, batch: list[Claim]) -> None:
        run, left = self._batches.start(len(batch)), len(batch)
        done: list[tuple[Entry, Reply]] = []

        def finish_done() -> None:
            finished = done.copy()
            done.clear()
            try:
                for entry, reply in finished:
                    self._finish(entry, reply)
            finally:
                if left == 0:
                    self.start_unstarted()
                    self.ask()

        def on_done(entry: Entry, reply: Reply) -> None:
            nonlocal left
            left -= 1
            done.append((entry, reply))
            run.took_s = max(run.took_s, reply.run_ms / 1000)
            if left > 0:
                if len(done) == 1:
                    self._loop.call_soon(finish_done)
                return
            self._batches.end(run)
            try:
                self.fill_up()
                # The replies of this batch take longer to write than the next one to start. Code as quick as that would
                # only compete with them for the interpreter lock.
                if not self._batches.is_quick:
                    self.start_unstarted()
            finally:
                finish_done()

        self.run_stats.count_batch(len(batch))
        running = self._runner.run([held.entry for held in batch], on_done)
        for held in batch:
            held.running = running

    def _predict_end(self) -> None:
        """Schedule the next claim shortly before the end of the call that begins now, if that is predictable."""
        if self._near_end_timer is not None:
            self._near_end_timer.cancel()
            self._near_end_timer = None
        now_s = monotonic()  # the loop's time may be one of whole milliseconds
        if self._run_s > _SLOW_S and (ask_at_s := self._call_times.begin(now_s)) is not None:
            self._near_end_timer = self._loop.call_later(ask_at_s - now_s, self.ask)

    def _on_done(self, entry: Entry, reply: Reply) -> None:
        self._finish(entry, reply)
        try:
            if self._crowded:
                self.start_unstarted()
        finally:
            self.ask()

    def _finish(self, entry: Entry, reply: Reply) -> None:
        """Reply, settle and drop the claim. Never raises."""
        held = self._by_entry.get(id(entry))
        if held is None:
            return
        try:
            self._conclude(held, reply)
        except Exception as e:
            log.exception("cannot send the reply to request %s of backend %r", entry.shown_id, self._backend)
            # Reply with an error instead, which can be sent.
            if entry.caller:
                self._reply(held.ref, entry.caller, failed_reply(entry, e, self._replica))
            self._settle(held.ref)
            self._forget(held)
        finally:
            if held.quarantine_ended is not None:
                held.quarantine_ended.set()
            if self.returned:
                self.wake.set()

    def _conclude(self, held: Claim, reply: Reply) -> None:
        entry = held.entry
        self._last_done = self._loop.time()
        was_cancelled = reply.error is not None and reply.error["kind"] == "RequestCancelled"
        if was_cancelled and held.recalled:
            self._forget(held)
            self._give_back(held.ref)
        else:
            if not was_cancelled:
                self._learn(held, reply.run_ms)
            if reply.error is None:
                self.run_stats.served += 1
                self.run_stats.run_ms += reply.run_ms
            elif not was_cancelled:
                self.run_stats.failed += 1
                self.run_stats.run_ms += reply.run_ms
            if entry.caller and not was_cancelled:
                self._reply(held.ref, entry.caller, reply)
            self._settle(held.ref)
            self._drop_body(entry)
            self._forget(held)
            if self.stream_sender.carries(held.ref):
                self._commands.join_write(partial(self.stream_sender.end, entry, held.ref))
            if not self.held:
                self._commands.hurry()

    def _learn(self, held: Claim, run_ms: float) -> None:
        run_s, deadline_ms = run_ms / 1000, held.entry.header.deadline_ms
        self._run_s = max(run_s, 0.7 * self._run_s + 0.3 * run_s)
        left_ms = deadline_ms - self._commands.now_ms() if deadline_ms else math.inf
        self._load_shedding.record_finish(run_ms, left_ms, self._last_done)
        if self._one_by_one:
            # A stream may run on the loop and leave the thread free, but no other call may begin there yet.
            self._call_times.end(math.inf if self.stream_sender.carries(held.ref) else run_s)
            if len(self.held) > 1:
                self._predict_end()  # of the next, which was at hand

    def _ref_of(self, entry: Entry) -> bytes | None:
        held = self._by_entry.get(id(entry))
        return None if held is None else held.ref

    def _forget(self, held: Claim) -> None:
        self.held.pop(held.ref, None)
        self._by_entry.pop(id(held.entry), None)
        if self.released is not None:
            self.released.add(held.ref)
        if not self.held:
            self.idle.set()

    # -- giving up and giving back

    def withdraw(self, ref: bytes) -> None:
        """Drop a request that its caller withdrew: it is not started if it waits, and cancelled if it runs."""
        held = self.held.get(ref)
        if held is None:
            # The entry may arrive later: the claim's reply and this signal travel on different connections.
            self._withdrawn[ref] = None
            if len(self._withdrawn) > _REMEMBER:
                del self._withdrawn[next(iter(self._withdrawn))]
        elif held.running is not None:
            held.running.cancel(held.entry.id)
        elif held in self.unstarted:
            self.unstarted.remove(held)
            self._settle(ref)
            self._drop_body(held.entry)
            self._forget(held)
            self.ask()

    def _watch_for_slowness(self) -> None:
        """Schedule a check that no claim waits behind a slow call while another replica may be idle."""
        if self._recall is None:
            self._recall = self._loop.call_later(self._patience_s(_STUCK_S), self._on_stuck)

    def _patience_s(self, unforeseen_s: float) -> float:
        if self.batch_size:
            return self._batches.patience_s(unforeseen_s)
        return self._call_times.patience_s(monotonic(), unforeseen=unforeseen_s)

    def _on_stuck(self) -> None:
        self._recall = None
        any_wait = self._batches.holds_up(len(self.unstarted)) if self.batch_size else len(self.held) > self.capacity
        if not any_wait and not self.is_quarantining:
            return
        if self._patience_s(self._last_done + _STUCK_S - self._loop.time()) > 0:
            self._watch_for_slowness()
            return
        self._run_s = max(self._run_s, 2 * _SLOW_S)
        self._batches.overran(self._run_s)
        self._recall_unstarted()

    def _give_back(self, ref: bytes) -> None:
        if not self._returning:
            self._loop.call_soon(self._give_back_together)
        self._returning.append(ref)

    def _give_back_together(self) -> None:
        refs, self._returning = self._returning, []
        self._group.acknowledger.give_back(refs)
        self.returned = True

    def _recall_unstarted(self) -> None:
        refs = [held.ref for held in self.unstarted]
        for held in self.unstarted:
            self._forget(held)
        self.unstarted.clear()
        self._crowded = False
        if refs:
            self._group.acknowledger.give_back(refs)
            self.returned = True
        if self._runner.blocking:
            for held in list(self.held.values()):
                if held.running is not None and held.quarantine_ended is None:
                    held.recalled = held.running.recall(held.entry.id)

    def _task(self, coroutine: Any) -> None:
        task = self._loop.create_task(coroutine)
        self._loading.add(task)
        task.add_done_callback(self._loading.discard)
