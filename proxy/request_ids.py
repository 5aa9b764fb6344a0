"""Request ids: ``X-Request-Id`` of the client if it is safe to log, else a new one."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping

HEADER = b"x-request-id"

_SAFE = re.compile(rb"[\x20-\x7e]{1,128}")  # printable ASCII: no line ends, no terminal escapes

# A random prefix per process, then a count: unique without a system call per request.
_new = map(f"{os.urandom(8).hex()}-%x".__mod__, itertools.count(1))


def request_id_of(headers: Mapping[bytes, bytes]) -> bytes:
    """Return the id of a request with ``headers``, whose names are in lower case."""
    given = headers.get(HEADER)
    if given is not None and _SAFE.fullmatch(given) is not None:
        return given
    return next(_new).encode()
