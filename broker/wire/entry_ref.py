"""Entry references: the id of an entry, marked if it lies on the batch stream of its backend.

Ids of the two streams may coincide, so that an id alone names no entry. A place does: it is what replicas hold entries
by, what signals speak of and what histories are kept under.
"""

from __future__ import annotations

from collections.abc import Iterable

_BATCH = b"b"
"""No id begins with it: they begin with a digit."""


def ref_of(entry: bytes, *, batch: bool) -> bytes:
    return _BATCH + entry if batch else entry


def is_batch(ref: bytes) -> bool:
    return ref.startswith(_BATCH)


def id_of(ref: bytes) -> bytes:
    """Return the id of the entry on its stream."""
    return ref[1:] if ref.startswith(_BATCH) else ref


def order_of(entry: bytes) -> tuple[int, int]:
    """Return what ids of one stream are ordered by: when, in milliseconds, and which of that time."""
    time_ms, _, sequence = entry.partition(b"-")
    return int(time_ms), int(sequence or 0)


def apart(refs: Iterable[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Return the ids on the interactive stream, and those on the batch stream."""
    interactive: list[bytes] = []
    batch: list[bytes] = []
    for ref in refs:
        if ref.startswith(_BATCH):
            batch.append(ref[1:])
        else:
            interactive.append(ref)
    return interactive, batch
