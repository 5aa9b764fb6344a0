"""One replica's work on its backend: plain asyncio that knows Redis and the user's code, and nothing of Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from ..broker.claims import Claims
from ..broker.connection import Connection
from ..broker.errors import BrokerRefused, BrokerUnavailable
from ..broker.figures import Tally
from ..broker.flow import TAKEN
from ..broker.keys import Keys
from ..broker.lease import Lease
from ..broker.signals import LOOK, Signals
from .answers import Answers
from .consumer import Consumer
from .runner import Runner
from .take_over import TakeOver

log = logging.getLogger(__name__)


class Worker:
    """Serves one backend from its stream with one `Runner`, from `start` to `stop`."""

    def __init__(self, url: str, instance: str, backend: str, replica: str, runner: Runner) -> None:
        self.backend, self.replica = backend, replica
        self._runner = runner
        keys = Keys(instance)
        commands = self._commands = Connection(url, name=f"penstock-{replica}")
        reads = self._reads = Connection(url, name=f"penstock-{replica}-claims")
        claims = self._claims = Claims(commands, reads, keys, backend, replica)
        answers = Answers(commands, claims, keys, backend, replica)
        self._consumer = Consumer(runner, commands, claims, answers, keys, backend, replica)
        self._outlet = self._consumer.outlet
        self._take_over = TakeOver(self._consumer, claims, answers, backend)
        self._lease = Lease(url, keys.alive(backend, replica))
        self._signals = Signals(url, keys, backend, self._on_signal)
        self._look: asyncio.Task[None] | None = None
        self._recovering = asyncio.Lock()

    @property
    def capacity(self) -> int:
        """How many requests run here at a time when all of it is busy."""
        return self._consumer.capacity

    @property
    def in_progress(self) -> int:
        return len(self._consumer.held)

    @property
    def tally(self) -> Tally:
        """What was done since it was last set."""
        return self._consumer.tally

    @tally.setter
    def tally(self, tally: Tally) -> None:
        self._consumer.tally = tally

    async def start(self) -> None:
        """Connect, take the lease and begin to claim. The runner must have started.

        Raises:
            BrokerUnavailable: Redis cannot be reached.
        """
        loop = asyncio.get_running_loop()
        self._consumer.open()
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
        self._consumer.configure()
        self._look = loop.create_task(self._take_over.keep_looking(), name="take-over")
        self._consumer.ask()

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Use another configuration from now on. Raises `BackendError` if the user's code does not take it."""
        await self._runner.reconfigure(config)
        self._consumer.configure()
        self._consumer.ask()

    async def drain(self, timeout_s: float) -> bool:
        """Stop claiming, give back what was only prefetched, and finish the rest.

        Returns False if some of it was still running after ``timeout_s`` seconds.
        """
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + timeout_s
        finished = await self._consumer.drain(timeout_s)
        # A reply that the broker refuses is lost with the connection, and another replica would run its request again.
        await self._commands.wait_for_patient(ends_at - loop.time())
        return finished

    async def stop(self) -> None:
        """Drop the lease and disconnect. What is still held is taken over by other replicas, so `drain` first."""
        self._consumer.draining = True
        if self._look is not None:
            self._look.cancel()
            await asyncio.wait([self._look])
        self._consumer.close()
        await self._signals.close()
        # Its outstanding claim ends with its connection; what that claimed in the last moment is taken over.
        await self._reads.close()
        await asyncio.get_running_loop().run_in_executor(None, self._lease.stop)
        try:
            if self._commands.connected:
                await self._claims.leave()
        except (BrokerUnavailable, BrokerRefused) as e:
            log.debug("left without a farewell: %s", e)
        await self._commands.close()

    def _on_signal(self, signal: bytes) -> None:
        if signal == LOOK:
            self._consumer.wake.set()
        elif signal.startswith(TAKEN):
            self._outlet.hear(signal)
        else:
            self._consumer.withdraw(signal)

    async def _recover(self) -> None:
        """After a reconnect: what is in our name and not in our hands was lost on its way to us."""
        await self._claims.ensure_group()
        async with self._recovering:
            while True:
                # What we let go of while the answer is on its way was in our hands when we asked.
                let_go = self._consumer.let_go = set[bytes]()
                try:
                    pending = await self._claims.pending()
                finally:
                    self._consumer.let_go = None
                if not self._commands.keeps_commands:
                    break
                # A settlement that was refused is to be sent again: its entry is still pending, and must not run again.
        for place, fields in pending:
            if place not in let_go:
                self._consumer.take(place, fields)
        self._consumer.start_unstarted()
