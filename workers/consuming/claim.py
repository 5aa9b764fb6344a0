"""A claim: an entry that this replica has claimed and not settled."""

from __future__ import annotations

import asyncio

from ...broker.wire.requests import Entry
from ..executing.calls import RunningCall


class Claim:
    """An entry from its claim to its settling."""

    __slots__ = ("claimed_ms", "entry", "place", "recalled", "running", "suspect")

    def __init__(self, place: bytes, entry: Entry, claimed_ms: float) -> None:
        self.place, self.entry, self.claimed_ms = place, entry, claimed_ms
        self.running: RunningCall | None = None
        self.recalled = False
        self.suspect: asyncio.Event | None = None
        """That of one whose last holder died, to be set when it is done."""
