"""A claim: an entry that this replica has claimed and not settled."""

from __future__ import annotations

import asyncio

from ...broker.wire.requests import Entry
from ..executing.calls import RunningCall


class Claim:
    """An entry that this replica has claimed, until it is settled or given back."""

    __slots__ = ("claimed_ms", "entry", "quarantine_ended", "recalled", "ref", "running")

    def __init__(self, ref: bytes, entry: Entry, claimed_ms: float) -> None:
        self.ref, self.entry, self.claimed_ms = ref, entry, claimed_ms
        self.running: RunningCall | None = None
        self.recalled = False
        self.quarantine_ended: asyncio.Event | None = None
        """Set when a redelivered entry is done; None for an entry that was claimed for the first time."""
