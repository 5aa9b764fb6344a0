"""Futures of replies, for asyncio and for threads; cancelling one cancels its request.

By a method and not by a callback: that would cost each answer another turn of the loop (2 of 32 us of CPU), or take its
lock twice as often.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

from . import background_loop
from .calls.call import Call, CallOutcome
from .response import result_of


class AsyncReplyFuture(asyncio.Future[Any]):
    """The future of an answer in a loop."""

    call: Call | None = None
    """Until it is done: each leads to the other, and what leads to itself waits for the garbage collector."""

    def cancel(self, msg: Any | None = None) -> bool:
        cancelled = super().cancel(msg)
        if cancelled and self.call is not None:
            self.call.cancel()
            self.call = None
        return cancelled

    def settle(self, outcome: CallOutcome) -> None:
        self.call = None
        if self.done():
            return
        try:
            value = result_of(outcome)
        except BaseException as e:
            self.set_exception(e)
        else:
            self.set_result(value)

    def consume(self) -> None:
        if self.done() and not self.cancelled():
            self.exception()


class _Waiters(list[Any]):
    """What `concurrent.futures.wait` and ``as_completed`` of other threads add themselves to."""

    __slots__ = ("is_done",)
    is_done: bool
    """There is nothing to wait for any more."""

    def append(self, waiter: Any) -> None:
        if background_loop.is_current() and not self.is_done:
            raise background_loop.would_wait_for_itself()
        super().append(waiter)


class ReplyFuture(concurrent.futures.Future[Any]):
    """The future of an answer for threads.

    To wait for it on the background loop, where its callbacks run, would block the loop for ever: that raises
    RuntimeError instead.
    """

    _waiters: _Waiters
    _give_up: Callable[[], object] | None = None
    """Until it is done, as it leads back here."""

    def __init__(self) -> None:
        super().__init__()
        self._waiters = _Waiters()  # pyright: ignore[reportIncompatibleVariableOverride]
        self._waiters.is_done = False

    def result(self, timeout: float | None = None) -> Any:
        if asyncio._get_running_loop() is not None:  # in threads of sync code, that is all it costs
            self._check_wait(timeout)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        if asyncio._get_running_loop() is not None:
            self._check_wait(timeout)
        return super().exception(timeout)

    def _check_wait(self, timeout: float | None) -> None:
        if background_loop.is_current() and (timeout is None or timeout > 0) and not self.done():
            raise background_loop.would_wait_for_itself()

    def on_cancel(self, loop: asyncio.AbstractEventLoop, give_up: Callable[[], object]) -> None:
        """Run ``give_up`` in ``loop`` if this is cancelled or has been."""
        # Set first, looked at second; `cancel` does both the other way round.
        self._give_up = give_up_soon = partial(loop.call_soon_threadsafe, give_up)
        if self.cancelled():
            give_up_soon()

    def cancel(self) -> bool:
        if not super().cancel():
            return False
        if (give_up := self._give_up) is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and its requests with it
                give_up()
        return True

    def settle(self, outcome: CallOutcome) -> None:
        # Decoded in the background loop: the thread that waits may want only to know that it is done.
        try:
            value = result_of(outcome)
        except BaseException as e:
            self.fail(e)
        else:
            self._give_up = None
            self._waiters.is_done = True
            try:
                self.set_result(value)
            except concurrent.futures.InvalidStateError:
                self.set_running_or_notify_cancel()  # it was cancelled, and `concurrent.futures.wait` waits for this

    def set_running_or_notify_cancel(self) -> bool:
        # Called only where it ends. One that is cancelled, and of which nobody was notified yet, is still waited for.
        self._waiters.is_done = True
        return super().set_running_or_notify_cancel()

    def fail(self, error: BaseException) -> None:
        self._give_up = None
        if self.set_running_or_notify_cancel():
            self.set_exception(error)

    def give_up(self, call: Call) -> None:
        """Give the request up, for who has cancelled this."""
        if call.cancel():
            # Else its outcome came first, and has done so.
            self.set_running_or_notify_cancel()
