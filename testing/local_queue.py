"""The queue of one backend in memory, with the limits of admission: what Redis is to an instance.

Callers and the replica live on event loops of their own. All methods may be called from any thread.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable

from ..broker.queue.publisher import Published, QueueFull, retry_after_s
from ..broker.wire.requests import RawEntry

QueuedEntry = tuple[bytes, list[bytes]]
"""Entry ref and fields, as the claimer of a consumer group returns them."""


class LocalQueue:
    """Unsettled requests, the replies to them, and large bodies."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._waiting: deque[QueuedEntry] = deque()
        self._returned: deque[QueuedEntry] = deque()
        """Entries that the replica has given back."""
        self._claimed: dict[bytes, QueuedEntry] = {}
        self._sizes: dict[bytes, int] = {}
        """Bytes of each unsettled request, by its ref."""
        self._callers: dict[str, Callable[[list[bytes]], None]] = {}
        self.bodies: dict[str, bytes] = {}
        """Large bodies of requests, by key."""
        self.on_published: Callable[[], None] = _ignore
        """Called when an entry was published: the replica claims it."""
        self.on_signal: Callable[[bytes], None] = _ignore_signal
        """Called with signals to the replica, which have the form of ``broker/queue/signals.py``."""

    # -- callers

    def publish(self, entry: RawEntry, limit: int, limit_bytes: int) -> Published:
        """Append an entry, or return the refusal if the queue has reached a limit."""
        with self._lock:
            depth, size = len(self._sizes), sum(self._sizes.values())
            if depth >= limit:
                return QueueFull(depth, self._retry_after_s())
            if size + entry.size_bytes > limit_bytes:
                return QueueFull(size, self._retry_after_s(), in_bytes=True)
            ref = b"%d-%d" % (time.time() * 1000, next(self._numbers))
            self._sizes[ref] = entry.size_bytes
            self._waiting.append((ref, entry.fields()))
        self.on_published()
        return ref

    def withdraw(self, ref: bytes) -> None:
        """Withdraw a request: a waiting one never starts, a running one is cancelled if its code allows that."""
        with self._lock:
            for entries in (self._waiting, self._returned):
                for entry in entries:
                    if entry[0] == ref:
                        entries.remove(entry)
                        del self._sizes[ref]
                        return
        self.on_signal(ref)

    def listen(self, caller: str, on_reply: Callable[[list[bytes]], None]) -> None:
        """Call ``on_reply`` with the fields of each reply to ``caller``, until `leave`."""
        self._callers[caller] = on_reply

    def leave(self, caller: str) -> None:
        """Drop further replies to ``caller``."""
        self._callers.pop(caller, None)

    # -- the replica

    def claim(self, up_to: int) -> list[QueuedEntry]:
        """Claim the oldest entries."""
        return self._claim(self._waiting, up_to)

    def claim_returned(self, up_to: int) -> list[QueuedEntry]:
        """Claim the oldest entries that were given back."""
        return self._claim(self._returned, up_to)

    def _claim(self, entries: deque[QueuedEntry], up_to: int) -> list[QueuedEntry]:
        with self._lock:
            claimed = [entries.popleft() for _ in range(min(up_to, len(entries)))]
            self._claimed.update((entry[0], entry) for entry in claimed)
        return claimed

    def give_back(self, ref: bytes) -> None:
        """Return a claimed entry that was not started."""
        with self._lock:
            if (entry := self._claimed.pop(ref, None)) is not None:
                self._returned.append(entry)

    def settle(self, ref: bytes) -> None:
        """Delete a claimed entry."""
        with self._lock:
            self._claimed.pop(ref, None)
            self._sizes.pop(ref, None)

    def reply(self, caller: str, fields: list[bytes]) -> bool:
        """Pass a reply, or a part of one, to its caller. Returns False if the caller has left."""
        on_reply = self._callers.get(caller)
        if on_reply is not None:
            on_reply(fields)
        return on_reply is not None

    @property
    def returned(self) -> int:
        """The number of entries that were given back and not claimed since."""
        return len(self._returned)

    def _retry_after_s(self) -> float:
        oldest = next(iter(self._sizes), b"")
        return retry_after_s(time.time() * 1000 - int(oldest.partition(b"-")[0] or 0))


def _ignore() -> None:
    """Leave an entry to the replica that is about to start."""


def _ignore_signal(signal: bytes) -> None:
    """Drop a signal that comes before the replica."""
