"""Client disconnects: detection that costs nothing for requests that get their response at once."""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import time

from starlette.types import Receive

from ...handles.calls.call import CallOutcome

logger = logging.getLogger("penstock.proxy")

WATCH_AFTER_S = 0.05
"""A request that has waited this long for its outcome is watched."""


class ClientDisconnected(Exception):
    """The client closed its connection. Never leaves the proxy."""


class WatchedRequest:
    """A request whose outcome is awaited."""

    __slots__ = ("outcome", "receive", "since", "watcher")

    def __init__(self, receive: Receive, since: float, outcome: asyncio.Future[CallOutcome]) -> None:
        self.receive, self.since = receive, since
        self.outcome = outcome
        """The outcome of the call, or `ClientDisconnected`."""
        self.watcher: asyncio.Task[None] | None = None

    def resolve(self, outcome: CallOutcome) -> None:
        """Set the outcome, unless there is one."""
        if not self.outcome.done():
            self.outcome.set_result(outcome)


class DisconnectWatcher:
    """Detects clients that disconnect while their requests wait.

    ASGI reports a disconnect only through ``receive``, and a task that awaits it costs more than the whole of a fast
    request. So a request gets such a task only after it has waited for 50 to 100 ms. One timer serves all requests and
    runs only while some wait.

    The watcher belongs to the event loop in which it is constructed.
    """

    def __init__(self, watch_after_s: float = WATCH_AFTER_S) -> None:
        self._watch_after_s = watch_after_s
        # Looked up once: before Python 3.12 the look-up is a system call, 2 % of a request.
        self._loop = asyncio.get_running_loop()
        self._unwatched: dict[WatchedRequest, None] = {}  # oldest first
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, receive: Receive) -> WatchedRequest:
        """Start watching the client of ``receive``."""
        watched = WatchedRequest(receive, time.perf_counter(), self._loop.create_future())
        self._unwatched[watched] = None
        if self._timer is None:
            self._arm()
        return watched

    def unwatch(self, watched: WatchedRequest) -> None:
        """Stop watching: the outcome has arrived or is no longer awaited."""
        self._unwatched.pop(watched, None)
        if watched.watcher is not None:
            watched.watcher.cancel()
            watched.watcher = None  # its frames refer to the request, and a cycle would wait for the garbage collector

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        self._timer = self._loop.call_later(self._watch_after_s, self._sweep)

    def _sweep(self) -> None:
        before = time.perf_counter() - self._watch_after_s
        for watched in list(self._unwatched):
            if watched.since > before:
                break
            del self._unwatched[watched]
            watched.watcher = self._loop.create_task(_watch(watched))
        if self._unwatched:
            self._arm()
        else:
            self._timer = None


async def _watch(watched: WatchedRequest) -> None:
    if await wait_for_disconnect(watched.receive):
        watched.resolve(ClientDisconnected())


async def wait_for_disconnect(receive: Receive) -> bool:
    """Wait until the client disconnects and return True; return False if ``receive`` fails."""
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    except Exception:  # the `receive` of a middleware may raise anything
        logger.debug("cannot watch for the disconnect of a client", exc_info=True)
        return False
    return True


def is_reset(sock: socket.socket) -> bool:
    """Return whether the peer has reset the connection, even while nothing is read from it."""
    return _has_event(sock, 0)  # errors are always reported


def is_at_eof(sock: socket.socket) -> bool:
    """Return whether the peer has shut down its sending direction, even while data is unread. Works only on Linux."""
    return _has_event(sock, getattr(select, "POLLRDHUP", 0))


def _has_event(sock: socket.socket, event: int) -> bool:
    poll = select.poll()
    poll.register(sock.fileno(), event)
    return bool(poll.poll(0))
