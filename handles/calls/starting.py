"""Calls that still wait for a connection or for their endpoint, so that no caller knows of them yet.

Whoever closes an instance waits for them, as they have been made and are not queued.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import contextmanager

_tasks: dict[tuple[str, str], set[asyncio.Task[object]]] = {}


@contextmanager
def starting(url: str, instance: str) -> Generator[None]:
    """Count the current task among those that start a call to this instance."""
    task = asyncio.current_task()
    assert task is not None
    key = url, instance
    _tasks.setdefault(key, set()).add(task)
    try:
        yield
    finally:
        tasks = _tasks[key]
        tasks.discard(task)
        if not tasks:
            del _tasks[key]


def tasks_that_start(url: str, instance: str) -> list[asyncio.Task[object]]:
    """Return the tasks of the running loop that start a call to this instance."""
    loop = asyncio.get_running_loop()
    return [task for task in list(_tasks.get((url, instance), ())) if task.get_loop() is loop]
