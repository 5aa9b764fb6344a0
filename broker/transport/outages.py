"""Log lines about outages of a broker: one warning as an outage begins and one line as it ends, for the whole process.

A process has several connections to one broker, in several loops and threads. Each notices the same outage.
"""

from __future__ import annotations

import logging
import threading
from weakref import WeakSet

log = logging.getLogger(__name__)

_lock = threading.Lock()
_affected: dict[str, WeakSet[object]] = {}
"""Shown URL of a broker → connections in an outage. Weak references, as a loop may end without closing them."""


def report_began(shown_url: str, connection: object, problem: str) -> None:
    """Log ``problem`` of a connection: as a warning if it is the first affected one of this broker, else at DEBUG."""
    with _lock:
        affected = _affected.setdefault(shown_url, WeakSet())
        level = logging.DEBUG if affected else logging.WARNING
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
    if not closing:
        log.info("the broker at %s is back", shown_url)
