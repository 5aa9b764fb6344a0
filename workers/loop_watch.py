"""Watch over a replica's event loop: one warning, with the stack, when user code blocks it.

While ``async def`` code blocks, no other request of the replica runs, and no reply leaves. A thread probes the loop
while tasks of user code run on it, and sleeps otherwise. After the warning it ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable
from traceback import StackSummary, format_list, walk_stack
from types import FrameType

log = logging.getLogger(__name__)

BLOCKED_S = 0.1
"""How long a loop must not answer until it counts as blocked."""

_PERIOD_S = 0.1
"""Pause between two probes. A probe costs the loop a wake-up, so more of them would cost other requests time."""

_SLEEP_AFTER_S = 1.0
"""Without tasks for this long, the thread sleeps until the next one."""

_PACKAGE = os.path.dirname(os.path.dirname(__file__))
_OURS = tuple(os.path.join(_PACKAGE, folder, "") for folder in ("broker", "handles", "proxy", "runtime", "workers"))
_ASYNCIO = os.path.dirname(asyncio.__file__) + os.sep
_EXECUTING = os.path.join(os.path.dirname(__file__), "executing", "")


class LoopWatch:
    """Watches the loop in which it is made.

    Args:
        backend: tag of the backend, for the warning.
        is_busy: whether user code has tasks on the loop. Called on another thread.
    """

    def __init__(self, backend: str, is_busy: Callable[[], bool]) -> None:
        self._backend, self._is_busy = backend, is_busy
        self._loop = asyncio.get_running_loop()
        self.is_asleep = True
        """Whether `wake` must be called before the next task runs. False for ever once it has warned."""
        self._thread: threading.Thread | None = None
        self._awake = threading.Event()
        self._closed = threading.Event()
        self._loop_thread, self._depth = 0, 0
        """The thread of the loop, and the number of its frames below those of a task."""

    def wake(self) -> None:
        """Watch from now on. To be called on the loop before the first task of user code is made, or from a task."""
        self.is_asleep = False
        self._awake.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"loop watch of {self._backend}", daemon=True)
            # In the loop's own turn, where no frame of a task is on the stack, and ahead of a task that is made next.
            self._loop.call_soon(self._begin, self._thread)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self.is_asleep = False
        self._awake.set()

    def _begin(self, thread: threading.Thread) -> None:
        self._loop_thread = threading.get_ident()
        current = sys._getframe()  # pyright: ignore[reportPrivateUsage] - it is public
        self._depth = sum(1 for _ in walk_stack(current)) - 1
        try:
            thread.start()
        except RuntimeError as e:  # the system does not start a thread
            log.debug("the loop of backend %r is not watched: %s", self._backend, e)

    def _run(self) -> None:
        idle_s = 0.0
        while not self._closed.is_set():
            answered = threading.Event()
            try:
                self._loop.call_soon_threadsafe(answered.set)
            except RuntimeError:  # the loop is closed
                return
            if not answered.wait(BLOCKED_S / 2):
                before = self._user_frame()
                if not answered.wait(BLOCKED_S / 2) and before is not None and self._user_frame() is before:
                    self._warn(before)
                    return
                before = None  # a frame refers to the data of the code
                while not answered.wait(1.0):
                    if self._closed.is_set():
                        return
            idle_s = 0.0 if self._is_busy() else idle_s + _PERIOD_S
            self._awake.clear()
            if idle_s < _SLEEP_AFTER_S:
                self._awake.wait(_PERIOD_S)
                continue
            self.is_asleep = True
            # Checked after `is_asleep` was set and the event cleared: else `close` or a new task could be missed.
            if not self._closed.is_set() and not self._is_busy():
                self._awake.wait()
            self.is_asleep, idle_s = False, 0.0

    def _user_frame(self) -> FrameType | None:
        """Return the outermost frame of user code that runs on the loop now, or None."""
        frames = self._frames()
        while frames and frames[0].f_code.co_filename.startswith((_EXECUTING, _ASYNCIO)):
            del frames[0]
        return None if not frames or frames[0].f_code.co_filename.startswith(_OURS) else frames[0]

    def _frames(self) -> list[FrameType]:
        """Return the frames that the loop runs now, the outermost first."""
        frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage] - it is public
        innermost = frames.get(self._loop_thread)
        if innermost is None:
            return []
        return [frame for frame, _ in walk_stack(innermost)][::-1][self._depth :]

    def _warn(self, outermost: FrameType) -> None:
        frames = self._frames()
        if outermost not in frames:  # it has just ended
            return
        stack = StackSummary.extract((frame, frame.f_lineno) for frame in frames[frames.index(outermost) :])
        log.warning(
            "`async def` code of backend %r has blocked the event loop of its replica for more than %d ms, and no "
            "other request runs meanwhile. Blocking code belongs into a plain `def`, which runs on a thread, or into "
            "`await asyncio.to_thread(...)`. This is reported once. It is here:\n%s",
            self._backend,
            BLOCKED_S * 1000,
            "".join(format_list(stack)).rstrip(),
        )
