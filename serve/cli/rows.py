"""The rows of an input: JSON lines, CSV or the files of a directory, one at a time, however many there are.

A row that cannot be read is an exception in its place: it becomes the error of its own result, and the rest goes on.
The n-th row has the index n - 1 in every format, so that an index names a row.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal, cast

import orjson

from ...handles.codec import load_json
from ...handles.errors import MalformedBody, PayloadTooLarge

Format = Literal["jsonl", "csv", "files"]


class Rows:
    """One input, to iterate over once. Opens it at once, so that one that cannot be read is known before any work.

    Args:
        path: a file, a directory, or ``-`` for standard input.
        format: None goes by what the path is: a directory is ``files``, ``*.csv`` is ``csv``, all else ``jsonl``.
        max_bytes: a longer row is an error.

    Raises:
        OSError: it cannot be opened.
        ValueError: a CSV without a header.
    """

    def __init__(self, path: str, format: Format | None, max_bytes: int) -> None:  # noqa: A002
        self._path, self._max_bytes = path, max_bytes
        self.format: Format = format or _format_of(path)
        self.names: list[str] = []
        """Of the files, where the rows are files."""
        self.read = 0
        """Bytes, or files, so far."""
        self.count = 0
        """Rows so far."""
        self.total: int | None = None
        """As ``read`` counts; None if that is not known."""
        self._file: BufferedReader | None = None
        self._header: list[str] = []
        if self.format == "files":
            if path == "-":
                raise NotADirectoryError("standard input has no files: give a directory")
            root = Path(path)
            os.scandir(root).close()
            self.names = sorted(
                file.relative_to(root).as_posix()
                for file in root.rglob("*")
                if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)
            )
            self.total = len(self.names)
            return
        if path == "-":
            self._file = cast(BufferedReader, sys.stdin.buffer)
        else:
            self._file = open(path, "rb")  # noqa: SIM115 - closed by `close`
            if (size := os.fstat(self._file.fileno()).st_size) or Path(path).is_file():
                self.total = size
        if self.format == "csv":
            self._table = csv.reader(self._lines_of_text())
            csv.field_size_limit(max_bytes)
            try:
                self._header = next(self._table)
            except StopIteration:
                raise ValueError(
                    f"{path}: a CSV file begins with the names of its columns; this one is empty"
                ) from None
            except csv.Error as e:
                raise ValueError(f"{path}: the names of the columns cannot be read: {e}") from None

    def __iter__(self) -> Iterator[Any]:
        kinds = {"files": self._files, "csv": self._records, "jsonl": self._lines}
        for row in kinds[self.format]():
            self.count += 1
            yield row

    def close(self) -> None:
        if self._file is not None and self._path != "-":
            self._file.close()

    def _files(self) -> Iterator[Any]:
        for name in self.names:
            self.read += 1
            file = Path(self._path, name)
            try:
                size = file.stat().st_size
                yield self._too_large(size) if size > self._max_bytes else file.read_bytes()
            except OSError as e:
                yield e

    def _lines(self) -> Iterator[Any]:
        while (line := self._line()) is not None:
            if isinstance(line, PayloadTooLarge):
                yield line
                continue
            try:
                yield load_json(line.strip(b" \t\r\n"), "the row")
            except MalformedBody as e:
                yield e

    def _line(self) -> bytes | PayloadTooLarge | None:
        assert self._file is not None
        line = self._file.readline(self._max_bytes + 2)  # with the line's end
        self.read += len(line)
        if not line:
            return None
        if len(line.rstrip(b"\r\n")) <= self._max_bytes:
            return line
        size = len(line)
        while not line.endswith(b"\n") and (line := self._file.readline(1 << 20)):  # the rest of it, piece by piece
            size += len(line)
        self.read += size - self._max_bytes - 2
        return self._too_large(size)

    def _too_large(self, size: int) -> PayloadTooLarge:
        return PayloadTooLarge(size, self._max_bytes, "--max-row-bytes")

    def _lines_of_text(self) -> Iterator[str]:
        assert self._file is not None
        first = True
        for line in self._file:
            self.read += len(line)
            # What is not UTF-8 is refused when the row is sent, by its row.
            text = line.decode(errors="surrogateescape")
            yield text.removeprefix("\ufeff") if first else text
            first = False

    def _records(self) -> Iterator[Any]:
        while True:
            try:
                record = next(self._table)
            except StopIteration:
                return
            except csv.Error as e:
                yield MalformedBody(f"the row is not CSV: {e}")
                continue
            if len(record) != len(self._header):
                yield MalformedBody(f"the row has {len(record)} columns, and the header names {len(self._header)}")
            else:
                yield {name: _value(text) for name, text in zip(self._header, record, strict=True)}


def _format_of(path: str) -> Format:
    if path != "-" and Path(path).is_dir():
        return "files"
    return "csv" if path.lower().endswith(".csv") else "jsonl"


def _value(text: str) -> Any:
    """Return a number for what is written as one, None for nothing."""
    if not text:
        return None
    if text[0] in "0123456789-":
        try:
            number = orjson.loads(text)
        except ValueError:
            return text
        # What JSON would not write like this is no number but, say, a code.
        return number if isinstance(number, int | float) else text
    return text
