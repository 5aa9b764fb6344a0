"""The errors of user code in the log of their replica: one ERROR line each, with request id, backend and traceback.

At most 10 lines a second; the errors beyond that are counted, and a line states their number when the second is over.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence

from ..broker.wire.requests import Entry
from ..handles.errors import BackendError, PenstockError
from ..handles.log_context import working_on

log = logging.getLogger("penstock.backend")

_LINES_PER_S = 10
_PERIOD_S = 1.0
_LONGEST_SUMMARY = 1000


class ErrorLog:
    """Logs the errors of the user code of one replica. Any thread may call it.

    Args:
        backend: the backend's tag.
        replica: the replica's tag.
        loop: the event loop of the replica.
    """

    def __init__(self, backend: str, replica: str, loop: asyncio.AbstractEventLoop) -> None:
        self._backend, self._replica, self._loop = backend, replica, loop
        self._lock = threading.Lock()
        self._period_ends_at_s = 0.0
        self._lines = 0
        """Lines of the present period."""
        self._unlogged = 0

    def record(self, entries: Sequence[Entry], error: PenstockError) -> None:
        """Log the one error of ``entries``, as their callers receive it.

        One with a status below 500 is the caller's error or a decision of user code, such as an
        ``HTTPException(404)``, and is not logged.
        """
        if error.status < 500 or not self._may_log():
            return
        summary, traceback = _described(error)
        with working_on(entries):
            log.error(
                "backend %r raised %s (replica %s)%s",
                self._backend,
                summary,
                self._replica,
                f"\n{traceback}" if traceback else "",
                extra={"error": summary, "traceback": traceback} if traceback else {"error": summary},
            )

    def flush(self) -> None:
        """Log how many errors were not logged."""
        with self._lock:
            unlogged, self._unlogged = self._unlogged, 0
        if unlogged:
            log.error(
                "backend %r raised %d more errors within a second, which are not logged (replica %s)",
                self._backend,
                unlogged,
                self._replica,
                extra={"unlogged": unlogged},
            )

    def _may_log(self) -> bool:
        now_s = time.monotonic()
        with self._lock:
            if now_s >= self._period_ends_at_s:
                self._period_ends_at_s, self._lines = now_s + _PERIOD_S, 0
            if self._lines < _LINES_PER_S:
                self._lines += 1
                return True
            self._unlogged += 1
            is_first = self._unlogged == 1
        if is_first:
            try:
                self._loop.call_soon_threadsafe(self._loop.call_later, _PERIOD_S, self.flush)
            except RuntimeError:
                pass  # the loop is closed; `flush` at the end of the replica logs the number
        return False


def _described(error: PenstockError) -> tuple[str, str]:
    """Return an error in one line, and the user's traceback, which may be empty."""
    if not isinstance(error, BackendError):
        return _one_line(f"{type(error).__name__}: {error}"), ""
    return _one_line(f"{error.type_name}: {error.message}"), error.traceback.rstrip()


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_SUMMARY else f"{line[: _LONGEST_SUMMARY - 1]}…"
