"""Entry refs: the id of an entry, prefixed if the entry lies on the batch stream of its backend.

The same id may exist on both streams, so an id alone does not identify an entry. Replicas keep claims by entry ref, and
signals and delivery histories name entries by it.
"""

from __future__ import annotations

from collections.abc import Iterable

_BATCH = b"b"
"""The prefix of refs to the batch stream. Ids begin with a digit, so it is unambiguous."""


def ref_of(entry: bytes, *, batch: bool) -> bytes:
    """Return the ref of the entry with the id ``entry``."""
    return _BATCH + entry if batch else entry


def is_batch(ref: bytes) -> bool:
    """Return whether the entry lies on the batch stream."""
    return ref.startswith(_BATCH)


def id_of(ref: bytes) -> bytes:
    """Return the id of the entry on its stream."""
    return ref[1:] if ref.startswith(_BATCH) else ref


def queued_ms(ref: bytes, until_ms: float) -> float:
    """Return how long the entry has waited since it was published.

    ``until_ms`` is the Unix time in milliseconds by the broker's clock, from which the id of an entry has its time.
    """
    return max(0.0, round(until_ms - int(ref.partition(b"-")[0].removeprefix(_BATCH)), 3))


def order_of(entry: bytes) -> tuple[int, int]:
    """Return the sort key of an entry's id within its stream: its time in milliseconds, and its number at that time."""
    time_ms, _, sequence = entry.partition(b"-")
    return int(time_ms), int(sequence or 0)


def split_by_stream(refs: Iterable[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Return the ids of the entries on the interactive stream, and of those on the batch stream."""
    interactive: list[bytes] = []
    batch: list[bytes] = []
    for ref in refs:
        if ref.startswith(_BATCH):
            batch.append(ref[1:])
        else:
            interactive.append(ref)
    return interactive, batch
