"""The claims of one replica that are in progress: neither settled nor given back."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager

from ..claim import Claim

_MAX_WITHDRAWN = 10_000
"""Withdrawn entries that are remembered until they arrive."""


class InProgress:
    """The claims that a replica holds, by entry ref."""

    def __init__(self) -> None:
        self.claims: dict[bytes, Claim] = {}
        """All claims in progress, started or not. Changed only by `add` and `release`."""
        self.waiting: deque[Claim] = deque()
        """Claims that wait to start: for a batch to fill up, for the end of a quarantine, or for a free slot."""
        self.delayed: set[Claim] = set()
        """Claims that wait for their next attempt (`Retries`). They occupy no slot."""
        self._withdrawn: dict[bytes, None] = {}
        self._released: set[bytes] | None = None
        self._emptied = asyncio.Event()

    def __len__(self) -> int:
        return len(self.claims)

    def __contains__(self, ref: bytes) -> bool:
        return ref in self.claims

    @property
    def any_started(self) -> bool:
        """Whether any claim is in progress that does not wait to start, or for its next attempt."""
        return self.occupying > len(self.waiting)

    @property
    def occupying(self) -> int:
        """The number of claims that occupy a slot, or will as soon as one is free."""
        return len(self.claims) - len(self.delayed)

    def add(self, claim: Claim) -> None:
        """Hold a claim until it is released."""
        self.claims[claim.ref] = claim

    def release(self, claim: Claim) -> None:
        """Drop a claim that was settled or is given back."""
        claim.is_released = True
        claim.running = None  # the call refers to its claims, and a cycle would wait for the garbage collector
        self.claims.pop(claim.ref, None)
        if self._released is not None:
            self._released.add(claim.ref)
        if not self.claims:
            self._emptied.set()

    @contextmanager
    def recording_released(self) -> Generator[set[bytes], None, None]:
        """Yield a set that collects the refs of claims released meanwhile.

        For a query of the pending list: claims that are released while it is in flight must be ignored in its result.
        """
        released = self._released = set[bytes]()
        try:
            yield released
        finally:
            self._released = None

    async def wait_until_empty(self, timeout_s: float) -> bool:
        """Return True when no claim is in progress, or False after ``timeout_s`` seconds."""
        if not self.claims:
            return True
        self._emptied.clear()
        try:
            await asyncio.wait_for(self._emptied.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    def remember_withdrawn(self, ref: bytes) -> None:
        """Remember that a caller withdrew an entry which has not arrived.

        The signal may be faster than the entry: the claim's reply travels on another connection.
        """
        self._withdrawn[ref] = None
        if len(self._withdrawn) > _MAX_WITHDRAWN:
            del self._withdrawn[next(iter(self._withdrawn))]

    def forget_withdrawn(self, ref: bytes) -> bool:
        """Return whether the entry was withdrawn before it arrived, and forget it."""
        if not self._withdrawn or ref not in self._withdrawn:
            return False
        del self._withdrawn[ref]
        return True
