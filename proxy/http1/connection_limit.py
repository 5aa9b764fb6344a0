"""Limit of an HTTP server's open connections, and the file descriptors that it needs."""

from __future__ import annotations

import logging
import resource
from dataclasses import dataclass

log = logging.getLogger("penstock.proxy")

MAX_CONNECTIONS = 10_000
"""Default limit of one proxy's open connections."""

_OTHER_FILES = 256
"""File descriptors of a proxy besides its clients' connections: connections to the broker, logs, libraries."""


@dataclass
class ConnectionLimit:
    """Counts of a server's open connections, and their limit."""

    maximum: int
    served: int = 0
    refused: int = 0
    """Connections that were refused and are not closed yet."""


def allowed_connections(wanted: int) -> int:
    """Raise this process's limit of open files for ``wanted`` connections and return how many it then permits.

    Beyond the limit of open files connections would stay in the kernel's accept queue, and their clients would wait
    without a response. If the limit is too low even for the process's other files, connections get half of it.
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
        "this process may open %d files, so it accepts %d connections instead of %d (max_connections); "
        "raise the hard limit of open files (ulimit -Hn) for more",
        soft,
        allowed,
        wanted,
    )
    return min(allowed, wanted)
