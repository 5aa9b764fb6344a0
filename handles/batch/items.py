"""Items and results of a batch."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...broker.wire.replies import Reply
from ..replies.response import value_of


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One item with options of its own. An option that is None is the producer's."""

    data: Any
    """The value that the backend reads as ``request.data``: None, ``str``, bytes, or what JSON can represent."""
    query: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """JSON values that the backend reads as ``request.query_params``."""
    method_name: str | None = None
    """The method of the backend's class."""
    shard_key: str | None = None
    """Items with the same key go to the same backend."""
    timeout_s: float | None = None
    """Seconds until the item expires, from when it is first sent."""


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The result of one item."""

    index: int
    """Position of the item in the input, counted from 0."""
    value: Any = None
    """The value that the backend returned; None if there is an ``error``."""
    error: Exception | None = None
    """Why there is no value: the exception that the future of a handle would raise."""

    def get(self) -> Any:
        """Return the value, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.value


def read_result(index: int, reply: Reply) -> BatchResult:
    """Return the result of the item at ``index`` from its reply."""
    try:
        return BatchResult(index, value_of(reply))
    except Exception as e:
        return BatchResult(index, error=e)


class Indices(Container[int]):
    """A set of indices that takes one bit for each."""

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

    def update(self, indices: Iterable[int]) -> None:
        for index in indices:
            self.add(index)

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
