"""Request ids: ``X-Request-Id`` is taken from the client if it is safe to log, else made here."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping

HEADER = b"x-request-id"

_FIT = re.compile(rb"[\x20-\x7e]{1,128}")  # printable ASCII: nothing that ends a line or colours a terminal

# Unique without a system call for each: a random prefix per process, then a count.
_new = map(f"{os.urandom(8).hex()}-%x".__mod__, itertools.count(1))


def request_id_of(headers: Mapping[bytes, bytes]) -> bytes:
    given = headers.get(HEADER)
    if given is not None and _FIT.fullmatch(given) is not None:
        return given
    return next(_new).encode()
