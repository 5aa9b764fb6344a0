"""Reconnect hooks: coroutines that run after each reconnect."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from ..errors import BrokerUnavailable

log = logging.getLogger(__name__)

_RETRY_S = 0.5

Hook = Callable[[], Coroutine[Any, Any, None]]


class ReconnectHooks:
    """Runs each hook in a task of its own. A hook that fails with `BrokerUnavailable` runs again after a pause.

    Args:
        name: of the connection, for the names of the tasks.
        is_connected: returns whether a hook can run; if not, the next reconnect runs it.
    """

    def __init__(self, name: str, is_connected: Callable[[], bool]) -> None:
        self._name, self._is_connected = name, is_connected
        self._hooks: list[Hook] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, hook: Hook) -> None:
        self._hooks.append(hook)

    def run(self) -> None:
        """Start all hooks."""
        for hook in self._hooks:
            self._start(hook)

    async def cancel(self) -> None:
        """Cancel the hooks that are running, except for one that is calling this, and wait for their end."""
        tasks = self._tasks - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _start(self, hook: Hook) -> None:
        if self._is_connected():
            task = asyncio.get_running_loop().create_task(hook(), name=f"after reconnecting {self._name}")
            self._tasks.add(task)
            task.add_done_callback(partial(self._on_done, hook))

    def _on_done(self, hook: Hook, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, BrokerUnavailable):
            # The server is unreachable again, or refuses a command of the hook.
            log.debug("after reconnecting: %s", error)
            asyncio.get_running_loop().call_later(_RETRY_S, self._start, hook)
        else:
            log.error("after reconnecting: %s", error, exc_info=error)
