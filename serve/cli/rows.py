"""Rows of an input: JSON lines, CSV or the files of a directory, one at a time.

A row that cannot be read is an exception in its place: it becomes the error of its own result, and the rest goes on.
The n-th row has the index n - 1 in every format, so that an index names a row.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from ...handles.codec import load_json
from ...handles.errors import MalformedBody, PayloadTooLarge
from .csv_rows import ColumnType, CsvRows, is_text

Format = Literal["jsonl", "csv", "files"]

_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_UNREADABLE = {
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: `zstd -dc` writes what it holds, for `penstock batch ENDPOINT -`",
    b"PAR1": "is a Parquet file: save it as CSV or JSON lines",
    b"PK\x03\x04": "is a ZIP archive or a spreadsheet: save it as CSV or JSON lines",
    b"\xff\xfe": "is UTF-16: save it as UTF-8",
    b"\xfe\xff": "is UTF-16: save it as UTF-8",
}
"""Files that begin like this would be an error for each of their lines."""
_CSV_ENDS = (".csv", ".tsv", ".csv.gz", ".tsv.gz")


class Rows:
    """One input, to iterate over once. Opens it at once, so that one that cannot be read is known before any work.

    Args:
        path: a file, compressed by gzip or not, a directory, or ``-`` for standard input.
        format: None goes by what the path is: a directory is ``files``, ``*.csv`` and ``*.tsv`` are ``csv``, all else
            is ``jsonl``.
        max_bytes: a longer row is an error.
        delimiter: of a CSV file; see `CsvRows`, also for the next two.
        types: of its columns.
        strings: all its columns are text.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is of a kind that is not read, or a CSV file with a header that cannot be.
    """

    def __init__(
        self,
        path: str,
        format: Format | None,  # noqa: A002
        max_bytes: int,
        *,
        delimiter: str | None = None,
        types: Mapping[str, ColumnType] = {},
        strings: bool = False,
    ) -> None:
        self._path, self._max_bytes = path, max_bytes
        self._shown = "standard input" if path == "-" else path
        self.format: Format = format or _format_of(path)
        self.names: list[str] = []
        """Of the files, where the rows are files."""
        self.count = 0
        """Rows so far."""
        self.total: int | None = None
        """As ``read`` counts; None if that is not known."""
        self._read = 0
        self._raw: io.BufferedReader | None = None
        self._file: BinaryIO | None = None
        if self.format == "files":
            self._list_files()
            return
        if path == "-":
            self._raw = cast(io.BufferedReader, sys.stdin.buffer)
        else:
            self._raw = open(path, "rb")  # noqa: SIM115 - closed by `close`
            if (size := os.fstat(self._raw.fileno()).st_size) or Path(path).is_file():
                self.total = size
        try:
            self._file = self._decompressed(self._raw)
            if self.format == "csv":
                csv.field_size_limit(max_bytes)
                self._table = CsvRows(
                    self._lines_of_text(), self._shown, delimiter=delimiter, types=types, strings=strings
                )
        except (OSError, zlib.error, EOFError) as e:
            self.close()
            raise self._named(e) from None
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[Any]:
        kinds = {"files": self._files, "csv": self._records, "jsonl": self._lines}
        rows = kinds[self.format]()
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except (OSError, zlib.error, EOFError) as e:
                raise self._named(e) from None
            self.count += 1
            yield row

    @property
    def read(self) -> int:
        """Bytes of the file, or files, so far."""
        if self._file is self._raw or self._raw is None:
            return self._read
        return self._raw.tell()

    def close(self) -> None:
        if self._raw is not None and self._path != "-":
            self._raw.close()

    def _named(self, error: Exception) -> OSError:
        """Return the error of a read with the name of the file."""
        if isinstance(error, OSError) and error.errno is not None:
            return OSError(error.errno, error.strerror, self._shown)
        return OSError(0, f"it cannot be decompressed: {error}", self._shown)

    def _decompressed(self, raw: io.BufferedReader) -> BinaryIO:
        start = raw.peek(4)[:4]
        for signature, what in _UNREADABLE.items():
            if start.startswith(signature):
                raise ValueError(f"{self._shown} {what}")
        if start.startswith(_GZIP):
            return cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=raw)))
        return raw

    # -- files

    def _list_files(self) -> None:
        if self._path == "-":
            raise NotADirectoryError("standard input has no files: give a directory")
        root = Path(self._path)
        os.scandir(root).close()
        self.names = sorted(
            file.relative_to(root).as_posix()
            for file in root.rglob("*")
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)
        )
        self.total = len(self.names)

    def _files(self) -> Iterator[Any]:
        for name in self.names:
            self._read += 1
            if not is_text(name):
                yield MalformedBody(f"the name of the file is not UTF-8: {os.fsencode(name)!r}")
                continue
            file = Path(self._path, name)
            try:
                size = file.stat().st_size
                yield self._too_large(size) if size > self._max_bytes else file.read_bytes()
            except OSError as e:
                yield e

    # -- lines

    def _lines(self) -> Iterator[Any]:
        is_first = True
        while (line := self._line()) is not None:
            if isinstance(line, PayloadTooLarge):
                yield line
                continue
            if is_first:
                line, is_first = line.removeprefix(_BOM), False
            try:
                yield load_json(line.strip(b" \t\r\n"), "the row")
            except MalformedBody as e:
                yield e

    def _line(self) -> bytes | PayloadTooLarge | None:
        assert self._file is not None
        line = self._file.readline(self._max_bytes + 2)  # with the line's end
        self._read += len(line)
        if not line:
            return None
        if len(line.rstrip(b"\r\n")) <= self._max_bytes:
            return line
        size = len(line)
        while not line.endswith(b"\n") and (line := self._file.readline(1 << 20)):  # the rest of it, piece by piece
            size += len(line)
        self._read += size - self._max_bytes - 2
        return self._too_large(size)

    def _too_large(self, size: int) -> PayloadTooLarge:
        return PayloadTooLarge(size, self._max_bytes, "--max-row-bytes")

    def _lines_of_text(self) -> Iterator[str]:
        assert self._file is not None
        is_first = True
        for line in self._file:
            self._read += len(line)
            if is_first:
                line, is_first = line.removeprefix(_BOM), False
            # What is not UTF-8 is an error of its row.
            yield line.decode(errors="surrogateescape")

    def _records(self) -> Iterator[Any]:
        return iter(self._table)


def _format_of(path: str) -> Format:
    if path != "-" and Path(path).is_dir():
        return "files"
    return "csv" if path.lower().endswith(_CSV_ENDS) else "jsonl"
