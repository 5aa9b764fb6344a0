"""The claim-run-reply loop of one replica: plain asyncio that knows Redis and the user's code, and nothing of Ray.

It pulls: it claims when it has room, in small counts that overlap with the work, so that a slow request never holds up
another one while a replica is idle. Replies and claims are continuations of the connections' reads, not tasks: a small
request costs the replica no switch between tasks but those of the user's code.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Any

from ..broker.claims import Claims, Taken
from ..broker.connection import Connection
from ..broker.errors import BrokerUnavailable, RedisError, ResponseError, WireError
from ..broker.figures import Tally
from ..broker.flow import TAKEN
from ..broker.keys import Keys
from ..broker.lease import Lease
from ..broker.places import id_of, is_batch
from ..broker.signals import LOOK, Signals
from ..broker.wire import LARGE, Entry, Reply
from ..handles.errors import DeliveryLimitExceeded, PenstockError, StreamBroken, to_wire
from .fairness import BATCH_SHARE, Fairness
from .outlet import PartsOutlet
from .prospects import Prospects
from .runner import Runner
from .running import Running

log = logging.getLogger(__name__)

_CLAIM = 16
"""More than this in one claim makes convoys: 8 to 16 were 15 to 20 % faster at 100 connections than 100."""
_PREFETCH = 16
_PREFETCH_S = 0.002
"""Blocking code has at most this much work waiting for it here: nobody waits behind more while a replica is idle."""
_SLOW_S = 0.010
_CONSIDERATE_S = 1.0
"""While batch items wait, and for this long after an interactive request has come, room is made for the next one: it
waits behind all that was claimed before it.
"""
_SHARED_SLOW_S = 0.002
"""Then a batch of items is fetched ahead only if it is over this soon, and batches so quick are small ones: what they
take is the work around them, item by item.
"""
_STUCK_S = 0.025
_LOOK_S = 0.5
_REPLY_BODY_MS = 120_000
_ALIKE_BYTES = 1024
"""Of results of batch items no longer than this, those that are alike lie on their caller's stream as one entry."""
_ALIKE = 64
_REMEMBER = 10_000
_RETRY_S = 0.2


class _Held:
    """An entry from its claim to its settling."""

    __slots__ = ("alone", "claimed_ms", "entry", "place", "recalled", "running")

    def __init__(self, place: bytes, entry: Entry, claimed_ms: float) -> None:
        self.place, self.entry, self.claimed_ms = place, entry, claimed_ms
        self.running: Running | None = None
        self.recalled = False
        self.alone: asyncio.Event | None = None
        """Set when a suspect, which runs alone, is done."""


class Worker:
    """Serves one backend from its stream with one `Runner`, from `start` to `stop`."""

    def __init__(self, url: str, instance: str, backend: str, replica: str, runner: Runner) -> None:
        self.backend, self.replica = backend, replica
        self._runner = runner
        self._keys = Keys(instance)
        self._commands = Connection(url, name=f"penstock-{replica}")
        reads = self._reads = Connection(url, name=f"penstock-{replica}-claims")
        self._claims = Claims(self._commands, reads, self._keys, backend, replica)
        self._outlet = PartsOutlet(self._commands, self._claims, self._place_of)
        self._lease = Lease(url, self._keys.alive(backend, replica))
        self._signals = Signals(url, self._keys, backend, self._on_signal)
        self._held: dict[bytes, _Held] = {}
        """By their place: all that is claimed and not settled, started or not."""
        self._by_entry: dict[int, _Held] = {}
        self._unstarted: deque[_Held] = deque()
        """Parked: for a batch to fill up, while a suspect runs alone, or until there is room."""
        self._crowded = False
        """We hold more than there was room for: both streams answered the same claim."""
        self._fairness = Fairness()
        self._sharing = False
        """Batch items waited when we last claimed."""
        self._considerate_until = 0.0
        self._settled: list[bytes] = []
        self._results: list[tuple[_Held, Reply]] = []
        """Of batch items, to be written when these are settled."""
        self._withdrawn: dict[bytes, None] = {}
        self._batches = 0
        self._linger: asyncio.TimerHandle | None = None
        self._lingered = False
        self._recall: asyncio.TimerHandle | None = None
        self._claiming = False
        self._returned = False
        """There was more given back than we had room for."""
        self._nursing = False
        self._draining = False
        self._prospects = Prospects()
        self._run_s = 1.0
        """How long a call takes: an average that believes slowness at once and quickness slowly."""
        self._last_done = 0.0
        self._idle = asyncio.Event()
        self._wake = asyncio.Event()
        self._look: asyncio.Task[None] | None = None
        self._loading: set[asyncio.Task[None]] = set()
        self.tally = Tally()

    @property
    def capacity(self) -> int:
        """How many requests run here at a time when all of it is busy."""
        return self._concurrency * max(1, self._batch_size)

    @property
    def in_progress(self) -> int:
        return len(self._held)

    async def start(self) -> None:
        """Connect, take the lease and begin to claim. The runner must have started.

        Raises:
            BrokerUnavailable: Redis cannot be reached.
        """
        loop = self._loop = asyncio.get_running_loop()
        self._runner.stream_to(self._outlet)
        self._runner.keep_time_by(self._commands.now_ms)
        await self._commands.open()
        await self._reads.open()
        # Either may have carried a claim that we never saw.
        self._commands.on_reconnect(self._recover)
        self._reads.on_reconnect(self._recover)
        # Without its lease a consumer counts as dead, so the lease comes before the first claim.
        await loop.run_in_executor(None, self._lease.start)
        await self._claims.ensure_group()
        await self._signals.open()
        self._configure()
        self._look = loop.create_task(self._keep_looking(), name="take-over")
        self._ask()

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Use another configuration from now on. Raises `BackendError` if the user's code does not take it."""
        await self._runner.reconfigure(config)
        self._configure()
        self._ask()

    async def drain(self, timeout_s: float) -> bool:
        """Stop claiming, give back what was only prefetched, and finish the rest.

        Returns False if some of it was still running after ``timeout_s`` seconds.
        """
        self._draining = True
        self._recall_unstarted()
        if self._held:
            self._idle.clear()
            try:
                await asyncio.wait_for(self._idle.wait(), timeout_s)
            except asyncio.TimeoutError:
                return False
        return True

    async def stop(self) -> None:
        """Drop the lease and disconnect. What is still held is taken over by other replicas, so `drain` first."""
        self._draining = True
        if self._look is not None:
            self._look.cancel()
            await asyncio.wait([self._look])
        for timer in (self._linger, self._recall):
            if timer is not None:
                timer.cancel()
        for task in self._loading:
            task.cancel()
        for flow in self._outlet.flows:
            if (held := self._by_entry.get(id(flow.entry))) is not None:
                self._break_off(held.place, flow.entry, "its replica was stopped")
                self._forget(held)
            flow.stop()
        self._outlet.close()
        await self._signals.close()
        # Its outstanding claim ends with its connection; what that claimed in the last moment is taken over.
        await self._reads.close()
        await self._loop.run_in_executor(None, self._lease.stop)
        try:
            if self._commands.connected:
                await self._claims.leave()
        except (BrokerUnavailable, RedisError) as e:
            log.debug("left without a farewell: %s", e)
        await self._commands.close()

    def _configure(self) -> None:
        config = self._runner.config
        self._concurrency = self._runner.concurrency()
        self._max_deliveries: int = config.get("max_deliveries", 3)
        self._batch_size: int = config.get("max_batch_size") or 1 if self._runner.accepts_batch else 0
        self._batch_wait_s: float = config.get("batch_wait_timeout", 0.0)
        self._fairness = Fairness(config.get("batch_share", BATCH_SHARE))

    # -- claiming

    def _room(self) -> int:
        if self._batch_size:
            size, slow_s = self._batch_size, _SLOW_S
            if self._sharing and self._loop.time() < self._considerate_until:
                slow_s = _SHARED_SLOW_S
                if self._run_s <= slow_s and not self._batch_wait_s:
                    size = min(size, _CLAIM)
            capacity = (self._concurrency + (self._run_s <= slow_s)) * size
        elif self._runner.blocking and self._run_s <= _SLOW_S:
            capacity = self._concurrency + max(1, min(_PREFETCH, int(_PREFETCH_S / max(self._run_s, 1e-6))))
        else:
            capacity = self._concurrency
        return capacity - len(self._held)

    def _ask(self) -> None:
        if self._claiming or self._nursing or self._draining:
            return
        room = self._room()
        if room > 0:
            self._claiming = True
            up_to = min(room, max(_CLAIM, self._batch_size))
            if self._sharing:
                owed = self._fairness.owed(up_to)
                self._claims.claim_shared(up_to, owed, partial(self._on_claimed_shared, up_to, owed))
            else:
                self._claims.claim(up_to, self._on_claimed)

    def _on_claimed_shared(self, up_to: int, owed: int, result: Any) -> None:
        if isinstance(result, Exception):
            self._sharing = False
        else:
            batch = sum(is_batch(place) for place, _ in result)
            self._sharing = len(result) == up_to and batch >= owed
            if batch < len(result):
                self._considerate_until = self._loop.time() + _CONSIDERATE_S
            self._fairness = self._fairness.after(len(result) - batch, batch, waiting=self._sharing)
        self._take_claimed(result)

    def _on_claimed(self, result: Any) -> None:
        room = None
        if result and not isinstance(result, Exception) and is_batch(result[-1][0]):
            # From both streams at once there can be more than there is room for. Interactive requests come first.
            self._sharing = True
            if not self._batch_size:
                room = max(0, self._room())
        self._take_claimed(result, room)

    def _take_claimed(self, result: Any, room: int | None = None) -> None:
        """Take all of a claim, and start what there is ``room`` for: all of it unless that is said."""
        self._claiming = False
        if isinstance(result, Exception):
            if self._draining:
                return
            self._claiming = True  # until the retry
            self._task(self._retry_claim(result))
            return
        if self._draining:  # it was asked for before
            if result:
                self._claims.give_back([place for place, _ in result])
            return
        if room is not None and room < len(result):
            for place, fields in result[:room]:
                self._take(place, fields)
            self._crowded = True
            result = result[room:]
        for place, fields in result:
            self._take(place, fields)
        self._start_unstarted()
        if len(result) == 1:
            # Behind what quick code answers at once: its caller waits for that, and the broker is woken once for both.
            self._loop.call_soon(self._ask)
        else:
            self._ask()

    async def _retry_claim(self, error: Exception) -> None:
        if isinstance(error, ResponseError) and str(error).startswith("NOGROUP"):
            log.warning("the broker has lost the group of %r: making it anew", self.backend)
        elif not isinstance(error, BrokerUnavailable):
            log.error("cannot claim from %r: %s", self.backend, error)
        await asyncio.sleep(_RETRY_S)
        try:
            await self._claims.ensure_group()
        except (BrokerUnavailable, RedisError) as e:
            log.debug("cannot make the group of %r: %s", self.backend, e)
        self._claiming = False
        self._ask()

    def _take(self, place: bytes, fields: list[bytes] | None) -> None:
        """Hold an entry and start it as soon as may be, if there is anything to run and it is not held already."""
        if place in self._held:
            return
        if fields is None or place in self._withdrawn:
            self._withdrawn.pop(place, None)
            self._settle(place)
            return
        try:
            entry = Entry.of(fields)
        except WireError as e:
            log.error("entry %s of %r cannot be read and goes to the dead letters: %s", place.decode(), self.backend, e)
            self._task(self._claims.bury(Taken(place, 0, fields), str(e)))
            return
        if (held := self._hold(place, entry)) is None:
            return
        if entry.large:
            self._task(self._load_body(held))
        else:
            self._offer(held)

    def _hold(self, place: bytes, entry: Entry) -> _Held | None:
        """Hold an entry that is to run; None, and it is settled, if its deadline has passed or is sure to."""
        now_ms = self._commands.now_ms()
        deadline_ms = entry.header.deadline_ms
        if deadline_ms and not self._prospects.are_good(deadline_ms - now_ms, self._loop.time()):
            self._settle(place)  # its caller is told by its own clock
            self._drop_body(entry)
            return None
        held = self._held[place] = _Held(place, entry, now_ms)
        self._by_entry[id(entry)] = held
        return held

    async def _load_body(self, held: _Held) -> None:
        key = self._keys.body(self.backend, held.entry.id)
        try:
            body = await self._commands.send("GET", key, repeat=True)
        except (BrokerUnavailable, RedisError) as e:
            # It stays in our name, so `_recover` finds it when the broker is back.
            log.warning("cannot fetch the body of %r: %s", held.entry.id, e)
            self._forget(held)
            return
        if body is None:
            error = WireError(f"the body of request {held.entry.id!r} has expired")
            self._on_done(held.entry, Reply(held.entry.id, 500, error=to_wire(error), replica=self.replica))
            return
        held.entry.body = body
        self._offer(held)
        self._start_unstarted()

    # -- running

    def _offer(self, held: _Held) -> None:
        """Start what was claimed, unless a suspect has the floor, a batch is to fill up or there is no room."""
        if held.alone is None and (self._nursing or self._batch_size or self._crowded):
            self._unstarted.append(held)
        else:
            self._start([held])

    def _start_unstarted(self) -> None:
        waiting = self._unstarted
        if self._nursing or not waiting:
            if waiting:
                self._watch_for_slowness()
            return
        if not self._batch_size:
            while waiting and (not self._crowded or len(waiting) + self._room() > 0):
                self._start([waiting.popleft()])
            if waiting:
                self._watch_for_slowness()
            else:
                self._crowded = False
            return
        while waiting and self._batches < self._concurrency:
            # The linger counts from the first entry of the batch, and only an incomplete batch lingers.
            if len(waiting) < self._batch_size and self._batch_wait_s > 0 and not self._lingered:
                if self._linger is None:
                    left_s = self._batch_wait_s - (self._commands.now_ms() - waiting[0].claimed_ms) / 1000
                    self._linger = self._loop.call_later(max(0.0, left_s), self._on_lingered)
                return
            self._lingered = False
            if self._linger is not None:
                self._linger.cancel()
                self._linger = None
            batch = [waiting.popleft() for _ in range(min(self._batch_size, len(waiting)))]
            self._start(batch)
        if waiting:
            self._watch_for_slowness()

    def _on_lingered(self) -> None:
        self._linger, self._lingered = None, True
        self._start_unstarted()

    def _start(self, batch: list[_Held]) -> None:
        if self._batch_size:
            self._batches += 1
            left = len(batch)

            def on_done(entry: Entry, reply: Reply) -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    self._batches -= 1
                self._finish(entry, reply)
                # Asked for as each of a batch ends, the next would come in crumbs.
                if left == 0:
                    self._start_unstarted()
                    self._ask()

            self.tally.count_batch(len(batch))
            running = self._runner.run([held.entry for held in batch], on_done)
        else:
            running = self._runner.run([batch[0].entry], self._on_done)
        for held in batch:
            held.running = running
        if self._runner.blocking and len(self._held) > self._concurrency:
            self._watch_for_slowness()

    def _on_done(self, entry: Entry, reply: Reply) -> None:
        self._finish(entry, reply)
        if self._crowded:
            self._start_unstarted()
        self._ask()

    def _finish(self, entry: Entry, reply: Reply) -> None:
        held = self._by_entry.get(id(entry))
        if held is None:
            return
        self._last_done = self._loop.time()
        was_cancelled = reply.error is not None and reply.error["kind"] == "RequestCancelled"
        if was_cancelled and held.recalled:
            self._forget(held)
            self._claims.give_back([held.place])
        else:
            if not was_cancelled:
                self._learn(entry.header.deadline_ms, reply.run_ms)
            if reply.error is None:
                self.tally.served += 1
                self.tally.run_ms += reply.run_ms
            elif not was_cancelled:
                self.tally.failed += 1
                self.tally.run_ms += reply.run_ms
            if entry.caller and not was_cancelled:
                self._reply(held, reply)
            self._settle(held.place)
            self._drop_body(entry)
            self._forget(held)
            if self._outlet.carries(entry):
                self._commands.join_write(partial(self._outlet.end, entry, held.place))
            if not self._held:
                self._commands.hurry()
        if held.alone is not None:
            held.alone.set()
        if self._returned:
            self._wake.set()

    def _learn(self, deadline_ms: int, run_ms: float) -> None:
        run_s = run_ms / 1000
        self._run_s = max(run_s, 0.7 * self._run_s + 0.3 * run_s)
        left_ms = deadline_ms - self._commands.now_ms() if deadline_ms else math.inf
        self._prospects.saw(run_ms, left_ms, self._last_done)

    def _reply(self, held: _Held, reply: Reply) -> None:
        caller = held.entry.caller
        if is_batch(held.place) and len(reply.body) <= _ALIKE_BYTES and reply.error is None and not reply.headers:
            self._results.append((held, reply))
            return
        reply.queue_ms = self._queue_ms(held, reply)
        if len(reply.body) > LARGE:
            self._claims.put_reply_body(caller, reply.id, reply.body, _REPLY_BODY_MS)
            reply.body, reply.large = b"", True
        self._claims.reply(caller, reply.fields())

    def _queue_ms(self, held: _Held, reply: Reply) -> float:
        published_ms = float(id_of(held.place).partition(b"-")[0])
        return max(0.0, round(self._commands.now_ms() - reply.run_ms - published_ms, 3))

    def _reply_together(self) -> None:
        """Write the results of batch items, those that are alike as one entry: one costs the broker as much as many."""
        alike: dict[tuple[str, int, str, float], list[Reply]] = {}
        for held, reply in self._results:
            together = alike.setdefault((held.entry.caller, reply.status, reply.codec, reply.run_ms), [])
            if not together:  # the oldest, whose time in the queue stands for all
                reply.queue_ms = self._queue_ms(held, reply)
            together.append(reply)
        self._results = []
        for (caller, *_), replies in alike.items():
            for start in range(0, len(replies), _ALIKE):
                self._claims.reply(caller, Reply.fields_of(replies[start : start + _ALIKE]))

    def _settle(self, place: bytes) -> None:
        # Goes out behind the reply in the same write, never before it: dying in between repeats a request, the other
        # order loses one.
        if not self._settled:
            self._commands.join_write(self._flush_settled)
        self._settled.append(place)

    def _flush_settled(self) -> None:
        if self._results:
            self._reply_together()
        self._claims.settle(self._settled)
        self._settled = []

    def _drop_body(self, entry: Entry) -> None:
        if entry.large:
            self._commands.post(_log_failure, "UNLINK", self._keys.body(self.backend, entry.id), repeat=True)

    def _place_of(self, entry: Entry) -> bytes | None:
        held = self._by_entry.get(id(entry))
        return None if held is None else held.place

    def _forget(self, held: _Held) -> None:
        self._held.pop(held.place, None)
        self._by_entry.pop(id(held.entry), None)
        if not self._held:
            self._idle.set()

    # -- giving up and giving back

    def _on_signal(self, signal: bytes) -> None:
        if signal == LOOK:
            self._wake.set()
            return
        if signal.startswith(TAKEN):
            self._outlet.hear(signal)
            return
        held = self._held.get(signal)
        if held is None:
            # It may be on its way to us: the claim's reply and this signal travel on different connections.
            self._withdrawn[signal] = None
            if len(self._withdrawn) > _REMEMBER:
                del self._withdrawn[next(iter(self._withdrawn))]
        elif held.running is not None:
            held.running.cancel(held.entry.id)
        elif held in self._unstarted:
            self._unstarted.remove(held)
            self._settle(held.place)
            self._drop_body(held.entry)
            self._forget(held)
            self._ask()

    def _watch_for_slowness(self) -> None:
        """Nobody shall wait behind a slow call while another replica may be idle."""
        if self._recall is None:
            self._recall = self._loop.call_later(_STUCK_S, self._on_stuck)

    def _on_stuck(self) -> None:
        self._recall = None
        if len(self._held) <= self.capacity and not self._nursing:
            return
        if self._loop.time() - self._last_done < _STUCK_S:
            self._watch_for_slowness()
            return
        self._run_s = max(self._run_s, 2 * _SLOW_S)
        self._recall_unstarted()

    def _recall_unstarted(self) -> None:
        places = [held.place for held in self._unstarted]
        for held in self._unstarted:
            self._forget(held)
        self._unstarted.clear()
        self._crowded = False
        if places:
            self._claims.give_back(places)
        if self._runner.blocking:
            for held in list(self._held.values()):
                if held.running is not None and held.alone is None:
                    held.recalled = held.running.recall(held.entry.id)

    # -- taking over

    async def _keep_looking(self) -> None:
        while not self._draining:
            self._wake.clear()
            try:
                orphans, returned = await self._claims.look()
                if orphans:
                    await self._break_off_orphans()
                    await self._nurse()
                while returned and (room := self._room()) > 0 and not self._draining:
                    retaken = await self._claims.retake(min(room, max(_CLAIM, self._batch_size)))
                    for place, fields in retaken:
                        self._take(place, fields)
                    self._start_unstarted()
                    returned = len(retaken)
                self._returned = returned > 0
            except (BrokerUnavailable, RedisError) as e:
                log.debug("cannot look for orphans of %r: %s", self.backend, e)
            # Apart from each other, so that replicas do not all look in the same moment.
            pause_s = _LOOK_S * random.uniform(0.6, 1.0)
            waking = asyncio.ensure_future(self._wake.wait())
            try:
                await asyncio.wait([waking], timeout=pause_s)
            finally:
                waking.cancel()

    async def _break_off_orphans(self) -> None:
        """End the answers that had begun to stream when their replica died: there is nothing of them to run."""
        while (taken := await self._claims.adopt(streamed=True)) is not None:
            await self._end_orphan(taken)

    async def _end_orphan(self, taken: Taken) -> None:
        try:
            entry = Entry.of(taken.fields)
        except WireError as e:
            await self._claims.bury(taken, str(e))
            return
        self._break_off(taken.entry, entry, "its replica died")
        self._claims.forget_history(taken.entry)
        self._claims.forget_streamed(taken.entry)

    def _break_off(self, place: bytes, entry: Entry, reason: str) -> None:
        """Tell the caller that an answer which streams cannot go on: it must not be run again."""
        log.warning("the answer to request %s of %r breaks off: %s", entry.id, self.backend, reason)
        self._tell(entry, StreamBroken(self.backend, entry.id, reason))
        self._settle(place)
        self._drop_body(entry)

    def _tell(self, entry: Entry, error: PenstockError) -> None:
        if entry.caller:
            reply = Reply(entry.id, error.status, error=to_wire(error), replica=self.replica)
            self._claims.reply(entry.caller, reply.fields())

    async def _nurse(self) -> None:
        """Run suspects one at a time and alone: then a second death convicts the one that caused it and nobody else."""
        self._nursing = True
        try:
            while not self._draining:
                if not await self._until_alone():
                    return
                taken = await self._claims.adopt()
                if taken is None:
                    return
                if taken.streamed:
                    await self._end_orphan(taken)
                    continue
                if taken.deliveries >= self._max_deliveries:
                    await self._convict(taken)
                    continue
                await self._run_alone(taken)
        finally:
            self._nursing = False
            self._start_unstarted()
            self._ask()

    async def _until_alone(self) -> bool:
        """Wait until nothing is in progress here; False if the orphans found another home meanwhile."""
        while len(self._held) > len(self._unstarted):
            self._idle.clear()
            try:
                await asyncio.wait_for(self._idle.wait(), _LOOK_S)
            except asyncio.TimeoutError:
                orphans, _ = await self._claims.look()
                if not orphans or self._draining:
                    return False
        return True

    async def _run_alone(self, taken: Taken) -> None:
        try:
            entry = Entry.of(taken.fields)
        except WireError as e:
            await self._claims.bury(taken, str(e))
            return
        if (held := self._hold(taken.entry, entry)) is not None:
            held.alone = done = asyncio.Event()
            if entry.large:
                await self._load_body(held)
                if taken.entry not in self._held:
                    done.set()
            else:
                self._offer(held)
            await done.wait()
        self._claims.forget_history(taken.entry)

    async def _convict(self, taken: Taken) -> None:
        """Tell the caller that every replica which took the request died, and put it among the dead letters."""
        try:
            entry = Entry.of(taken.fields)
        except WireError as e:
            await self._claims.bury(taken, str(e))
            return
        error = DeliveryLimitExceeded(self.backend, entry.id, taken.deliveries, self._max_deliveries)
        log.error("%s", error)
        self._tell(entry, error)
        await self._claims.bury(taken, str(error))

    async def _recover(self) -> None:
        """After a reconnect: what is in our name and not in our hands was lost on its way to us."""
        await self._claims.ensure_group()
        for place, fields in await self._claims.pending():
            self._take(place, fields)
        self._start_unstarted()

    def _task(self, coroutine: Any) -> None:
        task = self._loop.create_task(coroutine)
        self._loading.add(task)
        task.add_done_callback(self._loading.discard)


def _log_failure(result: Any) -> None:
    if isinstance(result, Exception):
        log.error("the broker did not delete the body of a request: %s", result)
