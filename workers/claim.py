"""A claim: an entry that this replica has claimed and not settled.

The same object travels from the consumer through the runner to the settlement.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from ..broker.wire.requests import Entry
from ..handles.calls.tracing import RunSpans
from .retry import RetryWish


class RunningCall(Protocol):
    """Claims that were passed to user code together."""

    @property
    def began_s(self) -> float:
        """When a thread began to run them, by the monotonic clock; 0 before, and for code that needs no thread."""
        ...

    def cancel(self, claim: Claim) -> None:
        """Cancel one of them.

        If it waits for a thread, it is not started. If it runs in ``async def`` code that no other request waits for,
        the task is cancelled. If its reply streams, the generator is closed. In these cases its reply is
        `RequestCancelled`. All other code runs to its end.
        """
        ...

    def recall(self, claim: Claim) -> bool:
        """Cancel one of them if it has not started. Returns whether that is so; its reply is `RequestCancelled`."""
        ...


class Claim:
    """An entry that this replica has claimed, until it is settled or given back. Compared by identity."""

    __slots__ = (
        "claimed_ms",
        "entry",
        "is_recalled",
        "is_released",
        "is_replied",
        "is_streaming",
        "is_withdrawn",
        "quarantine_ended",
        "ref",
        "retry",
        "running",
        "spans",
        "was_started",
    )

    def __init__(self, ref: bytes, entry: Entry, claimed_ms: float = 0.0) -> None:
        self.ref, self.entry, self.claimed_ms = ref, entry, claimed_ms
        """The entry ref, the entry, and the time of the claim (Unix time by the broker's clock)."""
        self.running: RunningCall | None = None
        """The call of user code that it is part of; None until it has been passed to the runner."""
        self.is_released = False
        """Whether this replica no longer holds it: it was settled or given back."""
        self.is_recalled = False
        """Whether it is to be given back when its cancellation is confirmed, as it had not started."""
        self.is_replied = False
        """Whether its reply was sent although its code goes on; it is settled later."""
        self.is_streaming = False
        """Whether its reply has begun to stream."""
        self.spans: RunSpans | None = None
        """The spans of its run, if this process records spans."""
        self.quarantine_ended: asyncio.Event | None = None
        """Set when a redelivered entry is done; None for an entry that was claimed for the first time."""
        self.is_withdrawn = False
        """Whether its caller withdrew it while it ran: it does not run again."""
        self.was_started = False
        """Whether the start of a kept request was recorded for it."""
        self.retry: RetryWish | None = None
        """Set when the code raised an error that is retried."""
