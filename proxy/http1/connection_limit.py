"""The limit on open connections of one HTTP server, and the file descriptors that it takes."""

from __future__ import annotations

import logging
import resource
from dataclasses import dataclass

log = logging.getLogger("penstock.proxy")

MAX_CONNECTIONS = 10_000
"""Open connections of one proxy, unless it is given another number."""

_OTHER_FILES = 256
"""Descriptors of a proxy that are no client's: its sockets to the broker, logs, libraries."""


@dataclass
class ConnectionLimit:
    """How many connections a server has and may have."""

    maximum: int
    served: int = 0
    refused: int = 0
    """Those that were refused and are not closed yet."""


def allowed_connections(wanted: int) -> int:
    """Return how many of ``wanted`` connections this process may have, after raising its limit of open files.

    Beyond the limit of open files the kernel's queue would fill, and clients would wait without an answer. Half of a
    limit that is too low even for the process itself is left to connections.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    allowed = max(soft - _OTHER_FILES, soft // 2)
    log.warning(
        "this process may open %d files, so it takes %d connections and not %d (max_connections); "
        "raise the hard limit of open files (ulimit -Hn) for more",
        soft,
        allowed,
        wanted,
    )
    return min(allowed, wanted)
