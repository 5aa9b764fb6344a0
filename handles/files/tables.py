"""Tables: the lines of a batch written as CSV, Parquet or JSON lines, compressed or not.

Two passes over the lines, so that memory is flat: one finds out the columns and their types, one writes. The columns
are ``index``; ``file`` and ``row`` where the rows came from several files; those of the results; ``error_type`` and
``error_message``. Results that are all objects have a column for each of their names, others are a column ``result``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from shutil import copyfileobj
from tempfile import TemporaryFile
from typing import Any, BinaryIO, Literal

from ...broker.wire import exact_json
from .column_types import ColumnType
from .compression import ENDINGS, compressed, without_ending
from .optional import import_optional

TableFormat = Literal["jsonl", "csv", "parquet"]
Lines = Callable[[], Iterable[bytes]]
"""Begins a pass over the lines, each of which counts."""

_PLACE = ("index", "file", "row")
_ERROR = ("error_type", "error_message")
_GROUP_ROWS = 65_536
_GROUP_BYTES = 8 * 1024 * 1024
"""Of lines that make one row group, whichever comes first. As Python objects they take several times as much."""
_NEEDS_QUOTES = re.compile(r'[,;\t"\r\n]|^$|^\s|\s$')


def format_of(path: str) -> TableFormat:
    """Return the format of an output, by the ending of its name."""
    bare = without_ending(path).lower()
    if bare.endswith((".csv", ".tsv")):
        return "csv"
    return "parquet" if bare.endswith((".parquet", ".pq")) else "jsonl"


def is_plain(path: str) -> bool:
    """Return whether an output of that name holds JSON lines, as the journal does."""
    return format_of(path) == "jsonl" and not path.lower().endswith(ENDINGS)


def check_packages(path: str) -> None:
    """Import the libraries that writing ``path`` needs. Raises ``ConfigError``: it is not installed."""
    if format_of(path) == "parquet":
        import_optional("pyarrow.parquet", f"{path}: writing a Parquet file")
    if path.lower().endswith(".zst"):
        import_optional("zstandard", f"{path}: writing a file that is compressed by zstd")


def write_table(lines: Lines, file: BinaryIO, path: str) -> None:
    """Write a table to ``file`` in the format that the ending of ``path`` names."""
    with compressed(file, path) as target:
        kind = format_of(path)
        if kind == "jsonl":
            for line in lines():
                target.write(line)
        elif kind == "csv":
            delimiter = "\t" if without_ending(path).lower().endswith(".tsv") else ","
            for text in _csv(lines, delimiter):
                target.write(text.encode())
        else:
            # Apart, as a compressed stream cannot say where it is.
            with TemporaryFile(prefix="penstock-") as apart:
                _write_parquet(lines, apart if target is not file else file)
                apart.seek(0)
                copyfileobj(apart, target, 1 << 20)


class _Columns:
    """The columns of a table, and the cells of each line."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        place = {name: ColumnType() for name in _PLACE}
        result, encoding = ColumnType(), ColumnType()
        others = False
        for line in lines:
            record = exact_json.loads(line)
            for name, kind in place.items():
                if name != "row" or "file" in record:
                    kind.add(record.get(name))
            if "error" not in record:
                result.add(record["result"])
                others = others or not isinstance(record["result"], dict)
                encoding.add(record.get("encoding"))
        self.types = {name: kind for name, kind in place.items() if name == "index" or kind.kind != "null"}
        self._fields: dict[str, str] | None = None
        if result.kind == "object" and result.fields and not others:
            taken = {*_PLACE, *_ERROR}
            self._fields = {name: f"result.{name}" if name in taken else name for name in result.fields}
            self.types.update({self._fields[name]: kind for name, kind in result.fields.items()})
        else:
            self.types["result"] = result
            if encoding.kind != "null":
                self.types["encoding"] = encoding
        self.types.update({name: ColumnType("text") for name in _ERROR})

    def cells(self, line: bytes) -> dict[str, Any]:
        """Return the cells of a line that are not null, by their columns."""
        record = exact_json.loads(line)
        cells = {name: record[name] for name in _PLACE if name in self.types and name in record}
        if (error := record.get("error")) is not None:
            cells.update(error_type=_valid(error["type"]), error_message=_valid(error["message"]))
        elif self._fields is None:
            cells.update(result=record["result"], encoding=record.get("encoding"))
        else:
            cells.update((self._fields[name], value) for name, value in record["result"].items())
        return cells


def _valid(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


# -- CSV


def _csv(lines: Lines, delimiter: str) -> Iterator[str]:
    columns = _Columns(lines())
    yield delimiter.join(_quoted(_valid(name)) for name in columns.types) + "\r\n"
    for line in lines():
        cells = columns.cells(line)
        yield delimiter.join(_cell(cells.get(name)) for name in columns.types) + "\r\n"


def _cell(value: Any) -> str:
    """Return a value as CSV has it: null is nothing, and text that is empty is quoted."""
    if value is None:
        return ""
    if isinstance(value, str):
        return _quoted(_valid(value))
    return _quoted(exact_json.dumps(value).decode(errors="backslashreplace"))


def _quoted(text: str) -> str:
    if _NEEDS_QUOTES.search(text) is None:
        return text
    return '"' + text.replace('"', '""') + '"'


# -- Parquet


def _write_parquet(lines: Lines, file: BinaryIO) -> None:
    pa = import_optional("pyarrow", "writing a Parquet file")
    parquet = import_optional("pyarrow.parquet", "writing a Parquet file")
    columns = _Columns(lines())
    schema = pa.schema([_field(name, kind, pa) for name, kind in columns.types.items()])
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for group in _groups(lines()):
            rows = [columns.cells(line) for line in group]
            arrays = [
                pa.array(_values(name, kind, rows), type=schema.field(at).type)
                for at, (name, kind) in enumerate(columns.types.items())
            ]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def _field(name: str, kind: ColumnType, pa: Any) -> Any:
    return pa.field(_valid(name), kind.to_arrow(pa), metadata={"format": "json"} if kind.is_json else None)


def _values(name: str, kind: ColumnType, rows: list[dict[str, Any]]) -> list[Any]:
    if kind.needs_conversion:
        return [kind.convert(row.get(name)) for row in rows]
    return [row.get(name) for row in rows]


def _groups(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    group: list[bytes] = []
    size = 0
    for line in lines:
        group.append(line)
        size += len(line)
        if len(group) == _GROUP_ROWS or size > _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def sync_file(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
