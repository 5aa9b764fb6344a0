"""Items and results of a batch."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One item with options of its own; None is what the producer has."""

    data: Any
    """What the backend reads as ``request.data``."""
    query: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """JSON values, which the backend reads as ``request.query_params``."""
    method_name: str | None = None
    shard_key: str | None = None
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What became of one item."""

    index: int
    """Of the item, counted from 0."""
    value: Any = None
    error: Exception | None = None
    """Why there is no value: what a handle's future would raise."""

    def get(self) -> Any:
        """Return the value, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.value


class Indices(Container[int]):
    """A set of indices that takes a bit for each."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._count = 0

    def add(self, index: int) -> None:
        if index in self:
            return
        byte = index >> 3
        if byte >= len(self._bits):
            self._bits.extend(bytes(byte + 1 - len(self._bits)))
        self._bits[byte] |= 1 << (index & 7)
        self._count += 1

    def discard(self, index: int) -> None:
        if index in self:
            self._bits[index >> 3] ^= 1 << (index & 7)
            self._count -= 1

    def __contains__(self, index: object) -> bool:
        if not isinstance(index, int) or index < 0:
            return False
        byte = index >> 3
        return byte < len(self._bits) and bool(self._bits[byte] >> (index & 7) & 1)

    def __iter__(self) -> Iterator[int]:
        return (index for index in range(8 * len(self._bits)) if index in self)

    def __len__(self) -> int:
        return self._count
