"""Progress of a batch at one moment: counts, and the cause of a wait."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WaitsFor = Literal["queue", "replicas", "broker"]


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """The progress of a batch at one moment."""

    in_flight: int
    """Items that were sent and have no result."""
    retried: int
    """How often an item was sent again, because the queue was full or the broker away."""
    waits_for: WaitsFor | None
    """Why items have no results yet: room in the ``queue``, ``replicas`` that start, or the ``broker``."""
