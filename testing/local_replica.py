"""A replica without Redis and Ray: a thread with an event loop of its own, on which the worker's own parts run.

The runner, the scheduler and the batching are those of every replica, so user code runs as it does there: blocking code
on threads, ``async def`` code on the loop, and never on the loop of the test.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from ..broker.queue.flow_control import CREDIT
from ..broker.registry.records import BackendSpec
from ..broker.wire.keys import Keys
from ..workers.consuming.consumer import Consumer
from ..workers.consuming.settlement import Settlement
from ..workers.executing.runner import Runner
from ..workers.executing.user_code import LoadedCode
from .local_connection import LocalConnection
from .local_group import LocalGroup
from .local_queue import LocalQueue

T = TypeVar("T")

REPLICA = "local#1"
"""The tag of the one replica."""


class LocalReplica:
    """Runs the code of one backend, from the constructor to `close`.

    Raises:
        BackendError: user code cannot be imported, constructed or configured.
    """

    def __init__(
        self, url: str, keys: Keys, backend: str, code: bytes | LoadedCode, config: BackendSpec, queue: LocalQueue
    ) -> None:
        self._url, self._keys, self._backend, self._queue = url, keys, backend, queue
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"replica of {backend}", daemon=True)
        self._thread.start()
        try:
            self._runner, self._consumer, self._following = self._run(self._start(code, config))
        except BaseException:
            self._end_loop()
            raise

    def close(self, timeout_s: float) -> None:
        """Finish the requests that run, for at most ``timeout_s`` seconds, and end the thread. Idempotent."""
        if not self._loop.is_closed():
            self._run(self._stop(timeout_s))
            self._end_loop()

    def reconfigure(self, config: BackendSpec) -> None:
        """Use another configuration from now on. Raises as `Runner.reconfigure` does; then the old one stays."""
        self._run(self._reconfigure(config))

    def check_health(self) -> None:
        """Call the user's ``check_health``, if there is one. Raises `BackendError` if it fails."""
        self._run(self._runner.check_health())

    async def _start(
        self, code: bytes | LoadedCode, config: BackendSpec
    ) -> tuple[Runner, Consumer, asyncio.Task[None]]:
        runner = await Runner.start(self._backend, REPLICA, code, config)
        commands = LocalConnection(self._url, self._queue)
        group = LocalGroup(commands, self._queue, self._keys, self._backend, REPLICA)
        settlement = Settlement(commands, group, self._keys, self._backend, REPLICA)
        scan_soon = asyncio.Event()
        consumer = Consumer(runner, commands, group, settlement, self._keys, self._backend, REPLICA, scan_soon)
        runner.attach(consumer.stream_sender, commands.now_ms, consumer.kept.report, consumer.reply_early)

        def on_signal(signal: bytes) -> None:
            if signal.startswith(CREDIT):
                consumer.stream_sender.on_signal(signal)
            else:
                consumer.withdraw(signal)

        async def follow() -> None:
            while True:
                await scan_soon.wait()
                scan_soon.clear()
                await consumer.claim_returned()

        following = self._loop.create_task(follow())
        self._queue.on_published = lambda: self._on_loop(group.local_claimer.on_published)
        self._queue.on_signal = lambda signal: self._on_loop(on_signal, signal)
        consumer.claim()
        return runner, consumer, following

    async def _reconfigure(self, config: BackendSpec) -> None:
        await self._runner.reconfigure(config)
        self._consumer.reconfigure()

    async def _stop(self, timeout_s: float) -> None:
        ends_s = self._loop.time() + timeout_s
        await self._consumer.drain(timeout_s)
        await self._runner.stop(max(0.0, ends_s - self._loop.time()))
        self._following.cancel()
        await asyncio.wait([self._following])
        self._consumer.close()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _on_loop(self, function: Any, *args: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function, *args)

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
