"""Rows of JSON lines: the value of each line, or the reason why it cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from ..codec import load_json
from ..errors import MalformedBody, PayloadTooLarge

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_ROW_BYTES = 64 * 1024 * 1024
"""The default of the longest row that is read."""


def too_large(size: int, max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(size, max_bytes, "--max-row-bytes")


class Consumed:
    """Counts the bytes of the lines that were taken from a file. Its buffers have read further."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0


def read_lines(file: BinaryIO, max_bytes: int, consumed: Consumed) -> Iterator[Any]:
    """Yield the value of each line; an exception stands for a line that is no JSON or longer than ``max_bytes``."""
    is_first = True
    while line := file.readline(max_bytes + 2):  # with the line's end
        consumed.bytes += len(line)
        if len(line.rstrip(b"\r\n")) > max_bytes:
            size = len(line)
            while not line.endswith(b"\n") and (line := file.readline(1 << 20)):  # the rest of it, piece by piece
                size += len(line)
            consumed.bytes += size - max_bytes - 2
            yield too_large(size, max_bytes)
        else:
            try:
                yield load_json((line.removeprefix(BYTE_ORDER_MARK) if is_first else line).strip(b" \t\r\n"), "the row")
            except MalformedBody as e:
                yield e
        is_first = False


def lines_of_text(file: BinaryIO, consumed: Consumed) -> Iterator[str]:
    """Yield the lines of a text, in which bytes that are not UTF-8 are lone surrogates."""
    is_first = True
    for line in file:
        consumed.bytes += len(line)
        yield (line.removeprefix(BYTE_ORDER_MARK) if is_first else line).decode(errors="surrogateescape")
        is_first = False
