"""Client disconnects, noticed at no cost to requests that are answered at once."""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import time

from starlette.types import Receive

from ..handles.calls.call import CallOutcome

logger = logging.getLogger("penstock.proxy")

PATIENCE_S = 0.05


class ClientDisconnected(Exception):  # it never leaves the proxy: there is nobody to tell
    """The client went away."""


class WatchedRequest:
    """A request whose answer is awaited."""

    __slots__ = ("outcome", "receive", "since", "watcher")

    def __init__(self, receive: Receive, since: float, outcome: asyncio.Future[CallOutcome]) -> None:
        self.receive, self.since = receive, since
        self.outcome = outcome
        """What the caller heard of its call, or `ClientDisconnected`."""
        self.watcher: asyncio.Task[None] | None = None

    def hear(self, outcome: CallOutcome) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)


class DisconnectWatcher:
    """Tells of clients that go away while they are waiting.

    ASGI tells of it only to who waits in ``receive``, and a task that waits there costs more than a fast request does
    as a whole. So a request gets that task when it has been waiting for 50 to 100 ms, from one timer for all of them,
    which stands still when nothing waits.

    It belongs to the loop that it is made in.
    """

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        # Asked once: before Python 3.12 it costs a system call each time, 2 % of a request.
        self._loop = asyncio.get_running_loop()
        self._unwatched: dict[WatchedRequest, None] = {}  # oldest first
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, receive: Receive) -> WatchedRequest:
        """Begin to watch the client that ``receive`` belongs to."""
        waiting = WatchedRequest(receive, time.perf_counter(), self._loop.create_future())
        self._unwatched[waiting] = None
        if self._timer is None:
            self._arm()
        return waiting

    def forget(self, waiting: WatchedRequest) -> None:
        """The answer is there, or nobody awaits it any more."""
        self._unwatched.pop(waiting, None)
        if waiting.watcher is not None:
            waiting.watcher.cancel()
            waiting.watcher = None  # whose frames lead back to it, and an answer would wait for the garbage collector

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        self._timer = self._loop.call_later(self._patience_s, self._sweep)

    def _sweep(self) -> None:
        before = time.perf_counter() - self._patience_s
        for waiting in list(self._unwatched):
            if waiting.since > before:
                break
            del self._unwatched[waiting]
            waiting.watcher = self._loop.create_task(_watch(waiting))
        if self._unwatched:
            self._arm()
        else:
            self._timer = None


async def _watch(waiting: WatchedRequest) -> None:
    if await wait_for_disconnect(waiting.receive):
        waiting.hear(ClientDisconnected())


async def wait_for_disconnect(receive: Receive) -> bool:
    """Wait until the client goes away. Returns False if that cannot be told."""
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    except Exception:  # a middleware's `receive` may raise what it likes
        logger.debug("cannot watch a client", exc_info=True)
        return False
    return True


def is_reset(sock: socket.socket) -> bool:
    """Return whether the peer of a connection has reset it, also where nothing is read from it any more."""
    return _has_event(sock, 0)  # errors are always reported


def is_at_eof(sock: socket.socket) -> bool:
    """Return whether the peer sends no more, also while what it sent is not read. Only Linux can tell."""
    return _has_event(sock, getattr(select, "POLLRDHUP", 0))


def _has_event(sock: socket.socket, event: int) -> bool:
    poll = select.poll()
    poll.register(sock.fileno(), event)
    return bool(poll.poll(0))
