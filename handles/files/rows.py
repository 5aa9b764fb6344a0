"""Rows of an input, one at a time: JSON lines, CSV, Parquet, or whole files.

A row that cannot be read is an exception in its place: it becomes the error of its own result, and the rest goes on.
The n-th row has the index n - 1 in every format, so that an index names a row.
"""

from __future__ import annotations

import csv
import io
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, get_args

from ..errors import ConfigError, MalformedBody
from .compression import decompressed, without_ending
from .csv_rows import COLUMN_TYPES, ColumnType, CsvRows, is_text
from .json_lines import MAX_ROW_BYTES, Consumed, lines_of_text, read_lines, too_large
from .parquet_rows import BATCH_ROWS, SIGNATURE, ParquetRows
from .sources import Reading, Source, find, named

Format = Literal["jsonl", "csv", "parquet", "files"]
FORMATS: tuple[Format, ...] = get_args(Format)
As = Literal["rows", "arrow"]

_ENDINGS: dict[str, Format] = {
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
}
_UNREADABLE = {
    b"PK\x03\x04": "is a ZIP archive or a spreadsheet: save it as CSV, Parquet or JSON lines",
    b"\xff\xfe": "is UTF-16: save it as UTF-8",
    b"\xfe\xff": "is UTF-16: save it as UTF-8",
}
"""Files that begin like this would be an error for each of their lines."""
_BUFFER_BYTES = 128 * 1024


class Rows:
    """The rows of one input, to iterate over once. `read` makes it."""

    def __init__(
        self,
        path: str,
        format: Format | None = None,  # noqa: A002
        *,
        delimiter: str | None = None,
        types: Mapping[str, ColumnType] = {},
        strings: bool = False,
        columns: Sequence[str] | None = None,
        max_row_bytes: int = MAX_ROW_BYTES,
        as_: As = "rows",
        batch_rows: int = BATCH_ROWS,
        storage_options: Mapping[str, Any] = {},
    ) -> None:
        found = find(path, storage_options)
        self.source = found.name
        """It names the input of a job."""
        self.format: Format | None = format or ("files" if found.kind == "directory" else None)
        """Of all its files; None where each one's name decides."""
        self._delimiter, self._types, self._strings, self._columns = delimiter, types, strings, columns
        self._settled: dict[str, ColumnType] = {}
        self._max_bytes, self._as, self._batch_rows = max_row_bytes, as_, batch_rows
        sources = found.sources
        if self.format != "files" and found.kind == "directory":
            # Such as the marker `_SUCCESS` among what Spark writes.
            sources = [source for source in sources if not source.name.rpartition("/")[2].startswith("_")]
        self._sources = {source.name: source for source in sources}
        self.names: list[str] | None = None if found.kind == "file" else [source.name for source in sources]
        """Of its files, where more can follow: of a directory, or that match a pattern. They are read in this order."""
        self.count = 0
        """Rows so far."""
        sizes = [source.size for source in sources]
        self.total: int | None = len(sizes) if self.format == "files" else _sum(sizes)
        """As ``read`` counts; None if that is not known."""
        self._begins: list[int] = []
        """The index of the first row of each file that was begun."""
        self._begun: list[str] = []
        self._read_before = 0
        self._open: _OpenFile | None = None
        self._is_begun = False
        if self.format != "files" and sources:
            self._open = self._opened(sources[0])

    @property
    def read(self) -> float:
        """The amount read so far: bytes, or files where the rows are files."""
        opened = self._open  # another thread may close it meanwhile
        return self._read_before + (0 if opened is None else opened.read)

    def place_of(self, index: int) -> tuple[str | None, int]:
        """Return the file of a row, None if there is only one, and the number of the row in it, from 1."""
        if self.names is None:
            return None, index + 1
        at = bisect_right(self._begins, index) - 1
        if at < 0:
            return None, index + 1
        return self._begun[at], index + 1 - self._begins[at]

    def __iter__(self) -> Iterator[Any]:
        if self._is_begun:
            raise RuntimeError("an input can be iterated over once: read it again")
        self._is_begun = True
        return self._all()

    def _all(self) -> Iterator[Any]:
        try:
            # A job that goes on has put the names into its order by now.
            for name in self.names if self.names is not None else list(self._sources):
                source = self._sources[name]
                self._begins.append(self.count)
                self._begun.append(name)
                if self.format == "files":
                    self.count += 1
                    yield self._content(source)
                    self._read_before += 1
                    continue
                opened, self._open = self._open, None
                if opened is not None and opened.source is not source:
                    opened.close()
                    opened = None
                self._open = opened or self._opened(source)
                for row in self._open:
                    self.count += 1
                    yield row
                self._open.close()
                self._open = None
                self._read_before += source.size or 0
        finally:
            self.close()

    def _content(self, source: Source) -> Any:
        """Return the content of a file, or the reason why it cannot be read."""
        if not is_text(source.name):
            return MalformedBody(f"the name of the file is not UTF-8: {os.fsencode(source.name)!r}")
        if source.size is not None and source.size > self._max_bytes:
            return too_large(source.size, self._max_bytes)
        try:
            with source.open() as file:
                content = file.read(self._max_bytes + 1) if source.size is None else file.readall()
        except OSError as e:
            return e
        assert content is not None
        return too_large(len(content), self._max_bytes) if len(content) > self._max_bytes else content

    def _opened(self, source: Source) -> _OpenFile:
        return _OpenFile(
            source,
            self.format,
            delimiter=self._delimiter,
            types=self._types,
            strings=self._strings,
            settled=self._settled,
            columns=self._columns,
            max_bytes=self._max_bytes,
            as_arrow=self._as == "arrow",
            batch_rows=self._batch_rows,
        )

    def close(self) -> None:
        """Close the file that is open. Reading goes no further."""
        if self._open is not None:
            self._open.close()
            self._open = None

    @property
    def is_closed(self) -> bool:
        """Whether no file is open."""
        return self._open is None

    def __enter__(self) -> Rows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<rows of {self.source!r}, {self.count} read>"


class _OpenFile:
    """One file, opened, and of a format that is known. Its rows are those of that format."""

    def __init__(
        self,
        source: Source,
        format: Format | None,  # noqa: A002
        *,
        delimiter: str | None,
        types: Mapping[str, ColumnType],
        strings: bool,
        settled: dict[str, ColumnType],
        columns: Sequence[str] | None,
        max_bytes: int,
        as_arrow: bool,
        batch_rows: int,
    ) -> None:
        self.source, self._max_bytes = source, max_bytes
        self._parquet: ParquetRows | None = None
        self._parquet_rows = 0
        self._consumed = Consumed()
        self._raw = source.open()
        self._buffered = io.BufferedReader(self._raw, _BUFFER_BYTES)
        try:
            try:
                self._file = decompressed(self._buffered, source.shown)
                self.format = self._format(format)
                self._refuse_options(columns, delimiter, types, strings=strings, as_arrow=as_arrow)
                if self.format == "csv":
                    csv.field_size_limit(max_bytes)
                    self._csv = CsvRows(
                        lines_of_text(self._file, self._consumed),
                        source.shown,
                        delimiter=delimiter or ("\t" if _bare_ending(source.name) == ".tsv" else None),
                        types=types,
                        strings=strings,
                        settled=settled,
                        max_bytes=max_bytes,
                    )
                elif self.format == "parquet":
                    self._parquet = ParquetRows(
                        self._file,
                        source.shown,
                        can_seek=self._file is self._buffered and self._raw.seekable(),
                        columns=columns,
                        max_bytes=max_bytes,
                        batch_rows=batch_rows,
                        as_arrow=as_arrow,
                    )
            except (OSError, zlib.error, EOFError) as e:
                raise self._named(e) from None
        except BaseException:
            self.close()
            raise
        self._as_arrow = as_arrow

    def _format(self, given: Format | None) -> Format:
        start = self._file.peek(4)[:4]
        for signature, what in _UNREADABLE.items():
            if start.startswith(signature):
                raise ConfigError(f"{self.source.shown} {what}")
        by_name = given or _ENDINGS.get(_bare_ending(self.source.name))
        if start.startswith(SIGNATURE):
            if by_name not in (None, "parquet"):
                raise ConfigError(f"{self.source.shown} is a Parquet file, and its format was said to be {by_name}")
            return "parquet"
        return by_name or "jsonl"

    def _refuse_options(
        self,
        columns: Sequence[str] | None,
        delimiter: str | None,
        types: Mapping[str, ColumnType],
        *,
        strings: bool,
        as_arrow: bool,
    ) -> None:
        shown = f"{self.source.shown} is {self.format}"
        if self.format != "parquet":
            if columns is not None:
                raise ConfigError(f"columns are chosen of Parquet files, and {shown}")
            if as_arrow:
                raise ConfigError(f"Arrow record batches are read from Parquet files, and {shown}")
        if self.format != "csv" and (delimiter is not None or types or strings):
            raise ConfigError(f"--delimiter, --types and --strings are for CSV files, and {shown}")

    def __iter__(self) -> Iterator[Any]:
        rows = iter(self._rows())
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except (OSError, zlib.error, EOFError) as e:
                raise self._named(e) from None
            self._parquet_rows += 1
            yield row

    def _rows(self) -> Iterator[Any]:
        if self._parquet is not None:
            return self._parquet.batches() if self._as_arrow else iter(self._parquet)
        return iter(self._csv) if self.format == "csv" else read_lines(self._file, self._max_bytes, self._consumed)

    @property
    def read(self) -> float:
        """Bytes of the file so far."""
        if self._parquet is not None:
            return (self.source.size or 0) * self._parquet_rows / max(1, self._parquet.rows)
        if self._file is self._buffered:
            return self._consumed.bytes
        return self._raw.count if isinstance(self._raw, Reading) else 0

    def _named(self, error: Exception) -> OSError:
        if isinstance(error, OSError) and error.errno is not None:
            return named(error, self.source.shown)
        return OSError(0, f"it cannot be decompressed: {error}", self.source.shown)

    def close(self) -> None:
        if self._parquet is not None:
            self._parquet.close()
        with suppress(OSError):
            self._buffered.close()


def _bare_ending(name: str) -> str:
    """Return the ending of a name, without that of compression, in lower case."""
    return os.path.splitext(without_ending(name.lower()))[1]


def _sum(sizes: Sequence[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def read(
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,  # noqa: A002
    delimiter: str | None = None,
    types: Mapping[str, ColumnType] | None = None,
    strings: bool = False,
    columns: Sequence[str] | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
    as_: As = "rows",
    batch_rows: int = BATCH_ROWS,
    storage_options: Mapping[str, Any] | None = None,
) -> Rows:
    """Return the rows of files, for `BatchProducer.as_completed` or any other loop. Rows are read as they are needed.

    ::

        for result in client.batch("score").as_completed(handles.read("data/*.parquet")):
            print(result.index, result.get())

    The first file is opened at once, so that one that cannot be read is known before any work. A row that cannot be
    read is an exception in its place: a batch makes it the error of that row, and goes on.

    Args:
        path: a file, a directory, a glob pattern, a URL that fsspec opens (``s3://``, ``gs://``, ``https://``), or
            ``-`` for standard input. Files may be compressed by gzip or zstd.
        format: None goes by names: a directory is ``files``, each of which is a row (``bytes``); ``*.csv`` and
            ``*.tsv`` are ``csv``, ``*.parquet`` is ``parquet``, and all else is ``jsonl``. Another format than
            ``files`` reads the files of a directory as that.
        delimiter: between the columns of CSV; None finds out from the header.
        types: of columns of CSV, by their names: ``str``, ``int``, ``float`` or ``number``; the first rows settle the
            others.
        strings: columns of CSV without a type of their own are text.
        columns: of Parquet that are read; None is all.
        max_row_bytes: a longer row is an error.
        as_: ``rows`` are what JSON lines hold, and dicts of JSON values of CSV and Parquet. ``arrow`` is Arrow record
            batches, of Parquet files only.
        batch_rows: rows of Parquet that are decoded at a time, and rows of a record batch.
        storage_options: for fsspec, such as credentials.

    Raises:
        TypeError: an argument is of the wrong type.
        ConfigError: a value cannot be, a package of the extra ``penstock[files]`` is missing, or the first file is not
            of its format.
        OSError: there is no such file, or it cannot be read.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a str or a path, not {type(path).__name__}")
    if format is not None and format not in FORMATS:
        raise ConfigError(f"format must be {', '.join(FORMATS)} or None, not {format!r}")
    if as_ not in get_args(As):
        raise ConfigError(f"as_ must be 'rows' or 'arrow', not {as_!r}")
    for name, value in (("max_row_bytes", max_row_bytes), ("batch_rows", batch_rows)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, not {type(value).__name__}")
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    if isinstance(columns, str):
        raise TypeError(f"columns must be a list of names, not the str {columns!r}")
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise ConfigError(f"delimiter must be one character, not {delimiter!r}")
    for column, kind in (types or {}).items():
        if kind not in COLUMN_TYPES:
            raise ConfigError(f"types: column {column!r} must be of the type {', '.join(COLUMN_TYPES)}, not {kind!r}")
    return Rows(
        os.fspath(path),
        format,
        delimiter=delimiter,
        types=types or {},
        strings=strings,
        columns=columns,
        max_row_bytes=max_row_bytes,
        as_=as_,
        batch_rows=batch_rows,
        storage_options=storage_options or {},
    )
