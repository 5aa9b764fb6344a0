"""The background event loop: one thread for everything synchronous in this process.

Started when it is first needed; a daemon, so that it never keeps a script from ending.
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

_WIND_UP_S = 5.0

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_inherited: list[object] = []


def loop() -> asyncio.AbstractEventLoop:
    """Return the running background loop of this process."""
    global _loop
    if _loop is None:
        with _lock:
            if _loop is None:
                fresh = asyncio.new_event_loop()
                threading.Thread(target=fresh.run_forever, name="penstock", daemon=True).start()
                _loop = fresh
    return _loop


def _start_anew() -> None:
    """After a fork: the child has its parent's loop, but not the thread that runs it."""
    global _lock, _loop
    # Kept, and never touched: collecting it would close, in the kernel, what the parent still waits on.
    _inherited.append(_loop)
    _lock, _loop = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


class _Outbox:
    """Calls from any thread to one loop, woken once for all that came until it wakes."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._calls: deque[Callable[[], None]] = deque()
        self._woken = False

    def put(self, call: Callable[[], None]) -> None:
        # Appended first, looked at second; `_empty` does both the other way round. So either it sees this call, or we
        # see that it must be woken.
        self._calls.append(call)
        if not self._woken:
            self._woken = True
            self.loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        self._woken = False
        calls = self._calls
        while calls:
            try:
                calls.popleft()()
            except Exception:
                log.exception("a call from a thread failed")


_outbox: _Outbox | None = None


def soon(call: Callable[[], None]) -> None:
    """Make a call on the background loop, from any thread, in the order in which that thread asks for calls."""
    global _outbox
    running, outbox = loop(), _outbox
    if outbox is None or outbox.loop is not running:  # a forked child has its parent's
        # Two threads may each make one; both wake the same loop.
        outbox = _outbox = _Outbox(running)
    outbox.put(call)


def submit(coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
    """Start a coroutine on the background loop, from any thread."""
    return asyncio.run_coroutine_threadsafe(coroutine, loop())


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the background loop and return its result, or raise its exception.

    An interruption (Ctrl-C) of the wait cancels it, and then waits until it has undone what it has to undo.

    Raises:
        RuntimeError: called on the background loop itself, which would wait for itself.
    """
    if is_current():
        coroutine.close()
        raise would_wait_for_itself()
    future = submit(coroutine)
    try:
        return future.result()
    except BaseException:
        if future.cancel():
            # What it undoes that with may be closed by who called, next.
            with suppress(concurrent.futures.TimeoutError):
                submit(_end_of(coroutine)).result(_WIND_UP_S)
        raise


async def _end_of(coroutine: Coroutine[Any, Any, Any]) -> None:
    if tasks := [task for task in asyncio.all_tasks() if task.get_coro() is coroutine]:
        await asyncio.wait(tasks)


def is_current() -> bool:
    """Return whether this code runs on the background loop, as callbacks of a sync handle's futures do."""
    # Unlike `asyncio.get_running_loop`, it raises nothing where no loop runs: 20 ns instead of 300.
    running = asyncio._get_running_loop()
    return running is not None and running is _loop


def would_wait_for_itself() -> RuntimeError:
    """Return the error of a blocking call that is made on the background loop, which would have to end it."""
    return RuntimeError(
        "a sync call of Penstock cannot be waited for on its own event loop, such as in a callback of a future: "
        "wait on another thread, or add a callback to this future too"
    )
