"""Log lines about outages of a broker: one warning for each outage, for the whole process, and a line when it ends.

A process has several connections to one broker, in several loops and threads. Each notices the same outage, and some of
them when others are well again.
"""

from __future__ import annotations

import logging
import threading
import time
from weakref import WeakSet

ONE_OUTAGE_S = 10.0
"""What begins so soon after the end of an outage is the rest of it: a silent connection is found dead after 6 s."""

log = logging.getLogger(__name__)

_lock = threading.Lock()
_affected: dict[str, WeakSet[object]] = {}
"""Shown URL of a broker → connections in an outage. Weak references, as a loop may end without closing them."""
_ended_at: dict[str, float] = {}
"""Shown URL of a broker → the monotonic time at which its last outage ended, in seconds."""


def report_began(shown_url: str, connection: object, problem: str) -> None:
    """Log ``problem`` of a connection: as a warning if an outage begins with it.

    It is logged at INFO within ``ONE_OUTAGE_S`` of the last outage, and at DEBUG if other connections are affected.
    """
    with _lock:
        affected = _affected.setdefault(shown_url, WeakSet())
        if affected:
            level = logging.DEBUG
        elif time.monotonic() - _ended_at.get(shown_url, float("-inf")) < ONE_OUTAGE_S:
            level = logging.INFO
        else:
            level = logging.WARNING
        affected.add(connection)
    log.log(level, "%s", problem)


def report_ended(shown_url: str, connection: object, *, closing: bool = False) -> None:
    """Log that the broker is back when the last affected connection recovers; log nothing if it is ``closing``."""
    with _lock:
        affected = _affected.get(shown_url)
        if affected is None or connection not in affected:
            return
        affected.discard(connection)
        if affected:
            return
        del _affected[shown_url]
        if closing:
            return
        _ended_at[shown_url] = time.monotonic()
    log.info("the broker at %s is back", shown_url)
