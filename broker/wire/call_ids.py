"""Call ids: the secret that authenticates a reply, and the public id that logs and messages show in its place.

A process with write access to reply streams can write a reply to any caller. The caller accepts it only if it carries
the id of a call in flight. That id is random, travels with the request, and reaches only the replicas that read the
request. Logs and messages never show it: they show the result of `shown_id`.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterator
from functools import lru_cache
from hashlib import sha256, shake_256

_ID_BYTES = 16
_DIGITS = 2 * _ID_BYTES
_BLOCK = 256
"""Number of ids per system call. Read one by one, each costs four times as much."""

_ITEM_BLOCK = 64
"""Number of item ids that are derived together."""
_ITEM_BLOCKS_KEPT = 64
"""Number of such blocks in the cache."""
_LONGEST_INDEX = 18
"""Most digits of an index. Longer ones are rejected unread: parsing a very long number takes long."""


def new_ids() -> Iterator[str]:
    """Yield ids of 128 random bits each, without end.

    For one loop of one process: after a fork, two processes with the same iterator would yield the same ids.
    """
    while True:
        block = os.urandom(_BLOCK * _ID_BYTES).hex()
        for start in range(0, len(block), _DIGITS):
            yield block[start : start + _DIGITS]


def shown_id(request_id: str, call_id: str) -> str:
    """Return the id of a request for logs and messages: its ``X-Request-Id``, or else a hash of its call's id.

    The hash is the same in every process, and does not reveal the call's id.

    >>> shown_id("web-1", "00ff"), shown_id("", "00ff")
    ('web-1', 'call-8909cde2f411')
    """
    return request_id or f"call-{sha256(call_id.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"


class ItemIds:
    """The ids of the items of one batch job: every producer of the job derives the same ones from the job's secret."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._block = lru_cache(_ITEM_BLOCKS_KEPT)(self._derive)

    def id_of(self, index: int) -> str:
        """Return the call id of the item with that index."""
        block, at = divmod(index, _ITEM_BLOCK)
        start = at * _DIGITS
        return f"{self._block(block)[start : start + _DIGITS]}-{index}"

    def index_of(self, call_id: str) -> int | None:
        """Return the index of the item with that call id; None if the id does not belong to this job."""
        index = call_id.rpartition("-")[2]
        if not (index.isascii() and index.isdigit() and len(index) <= _LONGEST_INDEX):
            return None
        expected = self.id_of(int(index))
        return int(index) if hmac.compare_digest(expected.encode(), call_id.encode("utf-8", "surrogatepass")) else None

    def _derive(self, block: int) -> str:
        # One hash for many ids. SHAKE256 needs no HMAC around it: the key in front of the message makes it a MAC
        # (https://keccak.team/keccak_strengths.html).
        return shake_256(self._secret + b"%d" % block).hexdigest(_ITEM_BLOCK * _ID_BYTES)
