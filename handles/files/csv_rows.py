"""CSV files as objects: the delimiter, the names of the columns, and one type for each column.

The first rows are read ahead to choose the delimiter and the types. From then on a column keeps its type, and a value
that is not of it is an error of its row.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import islice
from typing import Any, Literal, cast

from ...broker.wire import exact_json
from ..errors import ConfigError, MalformedBody, PayloadTooLarge
from .json_lines import MAX_ROW_BYTES, too_large

ColumnType = Literal["str", "int", "float", "number"]
COLUMN_TYPES: tuple[ColumnType, ...] = ("str", "int", "float", "number")

BadRow = MalformedBody | PayloadTooLarge
"""Stands for a row that cannot be read."""

LOOK_AHEAD = 1000
"""Rows by which the types of the columns are settled."""
_LOOK_AHEAD_SIZE = 4 * 1024 * 1024
"""Characters of which no more rows are read ahead."""
_DELIMITERS = ",;\t|"
_INT = re.compile(r"-?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_LONGEST_INT = 15
"""Digits: a longer number is as a rule the name of something, and other programs would round it."""
_LONGEST_FLOAT = 40
"""Characters."""


class CsvRows:
    """The records of one CSV file, one object for each; an exception stands for a row that cannot be read.

    Args:
        lines: of text, with their ends.
        name: of the file, for errors.
        delimiter: between columns; None finds out from the header.
        types: of columns, by their names; the others are settled by the first rows.
        strings: every column without a type of its own is text.
        settled: types of columns that the first rows of an earlier file have settled; those of this one are added.
        max_bytes: a longer row is an error.

    Raises:
        ConfigError: there is no header, it names a column twice, or ``types`` names a column that it does not have.
    """

    def __init__(
        self,
        lines: Iterable[str],
        name: str,
        *,
        delimiter: str | None = None,
        types: Mapping[str, ColumnType] = {},
        strings: bool = False,
        settled: dict[str, ColumnType] | None = None,
        max_bytes: int = MAX_ROW_BYTES,
    ) -> None:
        self._settled = {} if settled is None else settled
        self._max_bytes = max_bytes
        source = iter(lines)
        first = deque(islice(source, 1))
        if delimiter is None and first:
            delimiter = _delimiter_of(first[0])
        self._table = csv.reader(_rest(first, source), delimiter=delimiter or ",", strict=True)
        try:
            self.header = next(self._table)
        except StopIteration:
            raise ConfigError(f"{name}: a CSV file begins with the names of its columns; this one is empty") from None
        except csv.Error as e:
            raise ConfigError(f"{name}: the names of the columns cannot be read: {e}") from None
        if not all(map(is_text, self.header)):
            raise ConfigError(f"{name}: the names of the columns are not UTF-8: save the file as UTF-8")
        twice = sorted({column for column in self.header if self.header.count(column) > 1})
        if twice:
            raise ConfigError(f"{name}: the header names more than one column {', '.join(map(repr, twice))}")
        if unknown := sorted(set(types) - set(self.header)):
            raise ConfigError(
                f"{name}: there is no column {', '.join(map(repr, unknown))}; the header names "
                f"{', '.join(map(repr, self.header))}"
            )
        self._given: dict[str, ColumnType] = dict.fromkeys(self.header, "str") if strings else {}
        self._given.update(types)

    def __iter__(self) -> Iterator[dict[str, Any] | BadRow]:
        records = self._records()
        ahead: list[list[str] | BadRow] = []
        size = 0
        for record in records:
            ahead.append(record)
            size += 0 if isinstance(record, BadRow) else sum(map(len, record))
            if len(ahead) == LOOK_AHEAD or size > _LOOK_AHEAD_SIZE:
                break
        good = [record for record in ahead if not isinstance(record, BadRow)]
        types: list[ColumnType] = [
            self._given.get(column) or self._settled.get(column) or _type_of([record[at] for record in good])
            for at, column in enumerate(self.header)
        ]
        self._settled.update(zip(self.header, types, strict=True))
        for record in ahead:
            yield self._row(record, types)
        ahead.clear()
        for record in records:
            yield self._row(record, types)

    def _records(self) -> Iterator[list[str] | BadRow]:
        while True:
            before = self._table.line_num
            try:
                record = next(self._table)
            except StopIteration:
                return
            except csv.Error as e:
                yield MalformedBody(f"lines {before + 1} to {self._table.line_num} are not CSV: {e}")
                continue
            if not record:
                yield MalformedBody(f"line {self._table.line_num} is empty")
            elif not all(map(is_text, record)):
                yield MalformedBody("the row is not UTF-8")
            elif len(record) != len(self.header):
                yield MalformedBody(f"the row has {len(record)} columns, and the header names {len(self.header)}")
            elif (size := sum(map(len, record))) > self._max_bytes:
                yield too_large(size, self._max_bytes)
            else:
                yield record

    def _row(self, record: list[str] | BadRow, types: Sequence[ColumnType]) -> dict[str, Any] | BadRow:
        if isinstance(record, BadRow):
            return record
        row: dict[str, Any] = {}
        for column, text, kind in zip(self.header, record, types, strict=True):
            if kind == "str":
                row[column] = text or None
                continue
            if not text:
                row[column] = None
                continue
            value = _number_of(text, kind)
            if value is None:
                return MalformedBody(
                    f"column {column!r} is of the type {kind}, and here it is {text[:100]!r}; --types {column}=str or "
                    "--strings reads it as text"
                )
            row[column] = value
        return row


def is_text(text: str) -> bool:
    """Return whether ``text`` has no lone surrogates, as which bytes that are not UTF-8 are read."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return False
    return True


def _delimiter_of(header: str) -> str:
    """Return the delimiter that a header has the most of, outside quotes."""
    bare = re.sub(r'"[^"]*"', "", header)
    return max(_DELIMITERS, key=bare.count)


def _rest(first: Iterable[str], source: Iterator[str]) -> Iterator[str]:
    yield from first
    yield from source


def _type_of(values: Iterable[str]) -> ColumnType:
    """Return ``number`` if each value is written as JSON writes it and means exactly that; else ``str``."""
    said = [value for value in values if value]
    return "number" if said and all(_is_number(value) for value in said) else "str"


def _is_number(text: str) -> bool:
    if _INT.fullmatch(text):
        return text != "-0" and len(text.lstrip("-")) <= _LONGEST_INT
    if not _NUMBER.fullmatch(text):
        return False
    return len(text) <= _LONGEST_FLOAT and Decimal(text) == Decimal(repr(float(text)))


def _number_of(text: str, kind: ColumnType) -> int | float | None:
    """Return the number that a column of that type has here; None if it has none."""
    if kind == "int":
        return int(text) if _INT.fullmatch(text) and len(text) <= 4000 else None
    if kind == "float":
        if not _NUMBER.fullmatch(text):
            return None
        value = float(text)
        return value if value not in (float("inf"), float("-inf")) else None
    return cast("int | float", exact_json.loads(text.encode())) if _is_number(text) else None


def parse_types(text: str) -> dict[str, ColumnType]:
    """Read ``zip=str,n=int``. Raises ``ConfigError`` for anything else."""
    types: dict[str, ColumnType] = {}
    for part in text.split(","):
        column, equals, kind = part.rpartition("=")
        if not equals or kind not in COLUMN_TYPES:
            raise ConfigError(f"--types is COLUMN=TYPE,..., with a type of {', '.join(COLUMN_TYPES)}; not {part!r}")
        types[column] = kind
    return types
