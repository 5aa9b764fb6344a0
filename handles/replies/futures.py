"""Futures of replies, for asyncio and for threads. Cancelling a future cancels its request.

They override ``cancel`` instead of adding a callback. A callback would cost each reply another turn of the event loop
(2 of 32 us of CPU), or the future's lock twice as often.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import sys
import warnings
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

from ...broker.wire.kept import Result
from .. import background_loop
from ..calls.call import Call, CallOutcome
from .response import result_of, value_of_result

_ALWAYS_CHECKED = 100
"""The first replies of a process, all of which are checked for being read."""
_CHECKED_SHARE = 64
"""Of the later replies, one in this many is checked: the check costs 2.5 us, a tenth of a call."""

_numbers = itertools.count()
_has_warned = False
"""Whether this process has warned of a future that nothing read."""


class AsyncReplyFuture(asyncio.Future[Any]):
    """The future of a reply in an event loop. Made by `new_reply_future`, which sets its ``call``."""

    __slots__ = ("call",)
    call: Call | None
    """The call, until it is over: the two refer to each other, which would leave them to the garbage collector."""

    def cancel(self, msg: Any | None = None) -> bool:
        cancelled = super().cancel(msg)
        if cancelled and self.call is not None:
            self.call.cancel()
            self.call = None
        return cancelled

    def settle(self, outcome: CallOutcome) -> None:
        """Set the outcome of the call."""
        self.call = None
        if self.done():
            return
        try:
            value = result_of(outcome)
        except BaseException as e:
            self.set_exception(e)
        else:
            self.set_result(value)

    def mark_read(self) -> None:
        """Declare that nothing will read this future, so that dropping it warns of nothing."""
        if self.done() and not self.cancelled():
            self.exception()


class KeptReplyFuture(asyncio.Future[Any]):
    """The future of the result of a kept request. Cancelling it ends the wait alone."""

    on_cancel: Callable[[], None] | None = None

    def cancel(self, msg: Any | None = None) -> bool:
        cancelled = super().cancel(msg)
        if cancelled and self.on_cancel is not None:
            self.on_cancel()
        return cancelled

    def settle(self, outcome: Result | BaseException) -> None:
        """Set the result, or the error that is its outcome."""
        self.on_cancel = None
        if self.done():
            return
        try:
            if isinstance(outcome, BaseException):
                raise outcome
            self.set_result(value_of_result(outcome))
        except BaseException as e:
            self.set_exception(e)


class _CheckedReplyFuture(AsyncReplyFuture):
    """A future that warns when it is dropped without being read: the second ``await`` was probably forgotten."""

    __slots__ = ("endpoint", "is_read")
    endpoint: str
    """Name of the called endpoint, for the warning."""
    is_read: bool

    def __await__(self) -> Generator[Any, None, Any]:
        self.is_read = True
        return super().__await__()

    # `asyncio.wait` and its like add callbacks, `asyncio.gather` and `asyncio.shield` read the result in theirs.

    def add_done_callback(self, *args: Any, **kwargs: Any) -> None:
        self.is_read = True
        super().add_done_callback(*args, **kwargs)

    def result(self) -> Any:
        self.is_read = True
        return super().result()

    def exception(self) -> BaseException | None:
        self.is_read = True
        return super().exception()

    def cancel(self, msg: Any | None = None) -> bool:
        self.is_read = True
        return super().cancel(msg)

    def mark_read(self) -> None:
        self.is_read = True
        super().mark_read()

    def __del__(self) -> None:
        global _has_warned
        if not self.is_read and not _has_warned and not sys.is_finalizing():
            _has_warned = True
            warnings.warn(
                f"a reply of endpoint {self.endpoint!r} was never read: remote() returns a future once the request is "
                "queued, and `await` on that future returns the reply, as in `await (await handle.remote(...))`. "
                "Further unread replies are not reported",
                RuntimeWarning,
                stacklevel=2,
            )
        super().__del__()


def new_reply_future(endpoint: str, loop: asyncio.AbstractEventLoop) -> AsyncReplyFuture:
    """Return a future for a reply of ``endpoint``.

    The first replies of a process are checked, and one in `_CHECKED_SHARE` of the later ones: dropping such a future
    without reading it warns, once in each process.
    """
    number = next(_numbers)
    if _has_warned or (number >= _ALWAYS_CHECKED and number % _CHECKED_SHARE):
        future = AsyncReplyFuture(loop=loop)
    else:
        future = checked = _CheckedReplyFuture(loop=loop)
        checked.endpoint, checked.is_read = endpoint, False
    future.call = None
    return future


class _Waiters(list[Any]):
    """Waiters of a future: `concurrent.futures.wait` and ``as_completed`` of other threads append themselves."""

    __slots__ = ("is_done",)
    is_done: bool
    """Whether the future is done, so that nothing waits any more."""

    def append(self, waiter: Any) -> None:
        if background_loop.is_current() and not self.is_done:
            raise background_loop.would_wait_for_itself()
        super().append(waiter)


class ReplyFuture(concurrent.futures.Future[Any]):
    """The future of a reply for threads.

    Waiting for it on the background loop, which runs its callbacks, would block that loop for ever. It raises
    RuntimeError instead.
    """

    _waiters: _Waiters
    _on_cancel: Callable[[], object] | None = None
    """Cancels the call; None once the future is done, as the call refers back to the future."""

    def __init__(self) -> None:
        super().__init__()
        self._waiters = _Waiters()  # pyright: ignore[reportIncompatibleVariableOverride]
        self._waiters.is_done = False

    def result(self, timeout: float | None = None) -> Any:
        if asyncio._get_running_loop() is not None:  # the only cost in threads of sync code
            self._check_wait(timeout)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        if asyncio._get_running_loop() is not None:
            self._check_wait(timeout)
        return super().exception(timeout)

    def _check_wait(self, timeout: float | None) -> None:
        if background_loop.is_current() and (timeout is None or timeout > 0) and not self.done():
            raise background_loop.would_wait_for_itself()

    def on_cancel(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
        """Call ``callback`` on ``loop`` when the future is cancelled, or now if it is cancelled already."""
        # Sets the callback, then checks. `cancel` does it in the other order, so that one of the two calls it.
        self._on_cancel = callback_soon = partial(loop.call_soon_threadsafe, callback)
        if self.cancelled():
            callback_soon()

    def cancel(self) -> bool:
        if not super().cancel():
            return False
        if (callback := self._on_cancel) is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and its requests with it
                callback()
        return True

    def settle(self, outcome: CallOutcome) -> None:
        """Set the outcome of the call."""
        # Decoded here, on the background loop: the waiting thread may not need the value.
        try:
            value = result_of(outcome)
        except BaseException as e:
            self.fail(e)
        else:
            self.resolve(value)

    def resolve(self, value: Any) -> None:
        """Set the value of the call."""
        self._on_cancel = None
        self._waiters.is_done = True
        try:
            self.set_result(value)
        except concurrent.futures.InvalidStateError:
            self.set_running_or_notify_cancel()  # it was cancelled, and `concurrent.futures.wait` waits for this

    def set_running_or_notify_cancel(self) -> bool:
        # Called only where the future ends. A cancelled one has waiters until it has notified them.
        self._waiters.is_done = True
        return super().set_running_or_notify_cancel()

    def fail(self, error: BaseException) -> None:
        """Set the error of the call."""
        self._on_cancel = None
        if self.set_running_or_notify_cancel():
            self.set_exception(error)

    def cancel_call(self, call: Call) -> None:
        """Cancel the call of a future that was cancelled."""
        if call.cancel():
            # Otherwise its outcome came first, and has called this.
            self.set_running_or_notify_cancel()
