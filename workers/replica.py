"""A replica: one process that serves one backend. It needs Redis but not Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from ..broker.errors import BrokerRefused, BrokerUnavailable, PenstockError
from ..broker.queue.consumer_group import ConsumerGroup
from ..broker.queue.flow_control import CREDIT
from ..broker.queue.signals import ENTRIES_RETURNED, RECORD_CHANGED, Signals, read_died, signal
from ..broker.queue.stats import RunStats
from ..broker.registry.records import BackendSpec
from ..broker.transport.connection import RedisConnection
from ..broker.transport.session import IDLE_STALL_S
from ..broker.wire.keys import Keys
from .consuming.consumer import Consumer
from .consuming.policies.claim_watch import OBSERVE_S, STOPPED_AFTER_S, ClaimWatch
from .consuming.redelivery import Redelivery
from .consuming.settlement import Settlement
from .consuming.stray_claims import StrayClaims
from .executing.runner import Runner

log = logging.getLogger(__name__)

_IS_WAITING_TIMEOUT_S = 5.0


def connection_of(url: str, replica: str) -> RedisConnection:
    """Return the connection of a replica for all commands that do not block. It is not open yet.

    The renewals of the lease are writes, so it needs no probes.
    """
    return RedisConnection(url, name=f"penstock-{replica}", probes=False)


class Replica:
    """Serves one backend with one started `Runner`, from `start` to `stop`. Bound to the loop in which it is made.

    It has three connections: for claims and for signals, which block, and for all other commands.

    Args:
        url: of the broker.
        instance: name of the instance.
        backend: tag of the backend.
        replica: tag of the replica.
        runner: runs the user's code.
        commands: an open connection of `connection_of`, which its owner closes; without one the replica has its own.
        on_record_changed: called when the record of the backend may have changed.
    """

    def __init__(
        self,
        url: str,
        instance: str,
        backend: str,
        replica: str,
        runner: Runner,
        *,
        commands: RedisConnection | None = None,
        on_record_changed: Callable[[], None] | None = None,
    ) -> None:
        self.backend, self.replica = backend, replica
        self._runner = runner
        self._on_record_changed = on_record_changed
        keys = Keys(instance)
        self._owns_commands = commands is None
        commands = self._commands = connection_of(url, replica) if commands is None else commands
        # A claim is a write too.
        reads = self._reads = RedisConnection(
            url, name=f"penstock-{replica}-claims", probes=False, stall_s=IDLE_STALL_S
        )
        group = self._group = ConsumerGroup(commands, reads, keys, backend, replica)
        settlement = Settlement(commands, group, keys, backend, replica)
        self._scan_soon = asyncio.Event()
        """Set when there may be an entry to redeliver."""
        consumer = self._consumer = Consumer(
            runner, commands, group, settlement, keys, backend, replica, self._scan_soon
        )
        self._strays = StrayClaims(consumer, group)
        self._counted_losses = 0
        self._redelivery = Redelivery(
            consumer,
            group,
            settlement,
            self._strays,
            backend,
            self._scan_soon,
            partial(signal, commands, keys, backend),
            commands.now_ms,
        )
        self._signals = Signals(url, keys, backend, self._on_signal)
        self._scan: asyncio.Task[None] | None = None
        self._claim_watch = ClaimWatch()
        self._observing: asyncio.TimerHandle | None = None

    @property
    def capacity(self) -> int:
        """The number of requests that run at a time when all slots are occupied."""
        return self._consumer.settings.capacity

    @property
    def in_progress(self) -> int:
        """The number of claims in progress."""
        return len(self._consumer.in_progress)

    @property
    def lease_held_since_s(self) -> float | None:
        """Since when the lease has been held without a gap, by ``time.monotonic``; None while it is not held."""
        return self._group.lease.held_since_s

    @property
    def run_stats(self) -> RunStats:
        """The counters since they were last taken."""
        return self._consumer.run_stats

    def take_run_stats(self) -> RunStats:
        """Return the counters, and start new ones."""
        run_stats = self._consumer.take_run_stats()
        losses = self._group.lease.losses
        run_stats.lease_losses += losses - self._counted_losses
        self._counted_losses = losses
        return run_stats

    async def start(self) -> None:
        """Connect, acquire the lease and start claiming.

        Raises:
            BrokerUnavailable: Redis cannot be reached.
        """
        loop = asyncio.get_running_loop()
        consumer = self._consumer
        self._runner.attach(consumer.stream_sender, self._commands.now_ms, consumer.kept.report, consumer.reply_early)
        if self._owns_commands:
            await self._commands.open()
        await self._reads.open()
        # Without its lease a consumer counts as dead, so the lease comes before the first claim.
        await self._group.lease.start(self._redelivery.take_turn, lambda: self._redelivery.is_looking)
        await self._group.ensure()
        await self._signals.open()
        # The reply to a claim may have been lost with either connection.
        self._commands.on_reconnect(self._recover)
        self._commands.on_reconnect(self._reconnect_reads)
        self._reads.on_reconnect(self._recover)
        self._scan = loop.create_task(self._redelivery.scan_until_drained(), name="redelivery")
        self._observe_claims()
        self._consumer.claim()

    async def check(self) -> None:
        """Return if the replica claims, has no room, or no request waits.

        Raises:
            PenstockError: it has had room for `STOPPED_AFTER_S` and has not claimed, although requests wait.
        """
        if not self._claim_watch.has_stopped:
            return
        try:
            is_work_waiting = await asyncio.wait_for(self._group.is_work_waiting(), _IS_WAITING_TIMEOUT_S)
        except (BrokerUnavailable, BrokerRefused, asyncio.TimeoutError) as e:
            log.warning(
                "cannot find out whether requests wait for backend %r: %s", self.backend, str(e) or type(e).__name__
            )
            return
        if is_work_waiting:
            raise PenstockError(
                f"replica {self.replica!r} has had room for {STOPPED_AFTER_S:g} s and has not claimed, "
                f"although requests wait for backend {self.backend!r}"
            )

    async def reconfigure(self, config: BackendSpec) -> None:
        """Use another configuration from now on.

        Raises:
            BackendError: the user's ``reconfigure`` raised; the old configuration stays.
            ConfigError: the configuration does not fit the code, as for `Runner.start`.
        """
        await self._runner.reconfigure(config)
        self._consumer.reconfigure()

    async def drain(self, timeout_s: float) -> bool:
        """Stop claiming, give back claims that have not started, and finish the others.

        Returns False if some were still running after ``timeout_s`` seconds.
        """
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + timeout_s
        finished = await self._consumer.drain(timeout_s)
        # Replies that the broker refuses wait in this connection. If one is lost, another replica runs the request.
        await self._commands.wait_for_patient(ends_at - loop.time())
        return finished

    async def stop(self) -> None:
        """Release the lease and disconnect. Claims still in progress are redelivered, so call `drain` first."""
        self._consumer.stop_claiming()
        if self._scan is not None:
            self._scan.cancel()
            await asyncio.wait([self._scan])
        self._redelivery.close()
        if self._observing is not None:
            self._observing.cancel()
        self._consumer.close()
        await self._signals.close()
        # A claim in flight ends with its connection. Entries that it claimed in the last moment are redelivered.
        await self._reads.close()
        await self._group.lease.stop()
        try:
            if self._commands.connected:
                await self._group.leave()
        except (BrokerUnavailable, BrokerRefused) as e:
            log.debug("cannot remove replica %r from the consumer group: %s", self.replica, e)
        if self._owns_commands:
            await self._commands.close()

    def _on_signal(self, message: bytes) -> None:
        if message == ENTRIES_RETURNED:
            self._redelivery.note_returned()
        elif (dead := read_died(message)) is not None:
            self._redelivery.note_dead(dead)
        elif message == RECORD_CHANGED:
            if self._on_record_changed is not None:
                self._on_record_changed()
        elif message.startswith(CREDIT):
            self._consumer.stream_sender.on_signal(message)
        else:
            self._consumer.withdraw(message)

    def _observe_claims(self) -> None:
        loop, consumer = asyncio.get_running_loop(), self._consumer
        self._observing = loop.call_later(OBSERVE_S, self._observe_claims)
        could_claim = self._commands.connected and self._reads.connected and consumer.could_claim
        self._claim_watch.observe(consumer.claims_answered, could_claim, loop.time())

    async def _recover(self) -> None:
        await self._group.ensure()
        await self._strays.recover_fresh()

    async def _reconnect_reads(self) -> None:
        # The server may be another one by now, or a silent one, which blocking reads notice late.
        self._signals.reconnect()
        self._reads.reconnect("another connection to the broker was lost")
