"""Background event loop: one daemon thread runs everything synchronous of this process.

It starts when it is first needed. As a daemon it does not keep a script from ending.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

_CLEANUP_TIMEOUT_S = 5.0
"""Seconds for which an interrupted `run` waits until its coroutine has cleaned up."""

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_parent_loops: list[object] = []


def loop() -> asyncio.AbstractEventLoop:
    """Return the background loop of this process. Starts it if it does not run."""
    global _loop
    if _loop is None:
        with _lock:
            if _loop is None:
                new_loop = asyncio.new_event_loop()
                threading.Thread(target=new_loop.run_forever, name="penstock", daemon=True).start()
                _loop = new_loop
    return _loop


def _reset_after_fork() -> None:
    """Forget the loop of the parent: a forked child has the object, but not the thread that runs it."""
    global _lock, _loop
    # Kept alive: collecting it would close the file descriptors that the parent's selector waits on.
    _parent_loops.append(_loop)
    _lock, _loop = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)


class _Outbox:
    """Calls from any thread to one loop. The loop is woken once for all calls that were added before it wakes."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._calls: deque[Callable[[], None]] = deque()
        self._is_woken = False

    def put(self, call: Callable[[], None]) -> None:
        # Appends, then checks the flag; `_run_all` clears the flag, then empties the queue. So either that sees this
        # call, or this thread sees that the loop must be woken.
        self._calls.append(call)
        if not self._is_woken:
            self._is_woken = True
            self.loop.call_soon_threadsafe(self._run_all)

    def _run_all(self) -> None:
        self._is_woken = False
        calls = self._calls
        while calls:
            try:
                calls.popleft()()
            except Exception:
                log.exception("a call from another thread failed")


_outbox: _Outbox | None = None


def soon(call: Callable[[], None]) -> None:
    """Make a call on the background loop, from any thread. The calls of a thread are made in order."""
    global _outbox
    running, outbox = loop(), _outbox
    if outbox is None or outbox.loop is not running:  # a forked child has its parent's
        # Two threads may both create one: both wake the same loop.
        outbox = _outbox = _Outbox(running)
    outbox.put(call)


def submit(coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
    """Start a coroutine on the background loop, from any thread."""
    return asyncio.run_coroutine_threadsafe(coroutine, loop())


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the background loop and return its result, or raise its exception.

    When the wait is interrupted (Ctrl-C), the coroutine is cancelled, and its cleanup is awaited for up to
    `_CLEANUP_TIMEOUT_S`.

    Raises:
        RuntimeError: called on the background loop, which would wait for itself.
    """
    if is_current():
        coroutine.close()
        raise would_wait_for_itself()
    future = submit(coroutine)
    try:
        return future.result()
    except BaseException:
        if future.cancel():
            # The caller may close next a broker that the cleanup needs.
            with suppress(concurrent.futures.TimeoutError):
                submit(_wait_for_end(coroutine)).result(_CLEANUP_TIMEOUT_S)
        raise


async def _wait_for_end(coroutine: Coroutine[Any, Any, Any]) -> None:
    if tasks := [task for task in asyncio.all_tasks() if task.get_coro() is coroutine]:
        await asyncio.wait(tasks)


def is_current() -> bool:
    """Return whether this code runs on the background loop, as callbacks of a sync handle's futures do."""
    # `asyncio.get_running_loop` raises where no loop runs: 300 ns instead of 20.
    running = asyncio._get_running_loop()
    return running is not None and running is _loop


def would_wait_for_itself() -> RuntimeError:
    """Return the error of a blocking call on the background loop, which would have to finish that call."""
    return RuntimeError(
        "a sync call of Penstock cannot be waited for on its own event loop, such as in a callback of a future: "
        "wait on another thread, or add a callback to this future too"
    )
