"""Tables of any content, written as CSV, JSON lines and Parquet: what arrives is what was written."""

from __future__ import annotations

import csv
import json
from datetime import date, datetime, timezone
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from penstock import handles
from penstock.broker.wire import exact_json
from penstock.handles.codec import decode, encode
from penstock.handles.connection import Connection
from penstock.handles.errors import MalformedBody
from tests.handles.site import Site, echo

pa: Any = import_module("pyarrow")
pq: Any = import_module("pyarrow.parquet")

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
numbers = st.integers(-(10**40), 10**40)
floats = st.floats(allow_nan=False, allow_infinity=False)
dates = st.dates()
moments = st.datetimes(timezones=st.none() | st.just(timezone.utc))

COLUMNS: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "text": (pa.string(), text),
    "long": (pa.decimal128(38, 0), st.integers(-(10**38) + 1, 10**38 - 1)),
    "int": (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    "float": (pa.float64(), floats),
    "date": (pa.date32(), dates),
    "moment": (pa.timestamp("us"), st.datetimes()),
    "flag": (pa.bool_(), st.booleans()),
    "list": (pa.list_(pa.int16()), st.lists(st.none() | st.integers(-(2**15), 2**15 - 1), max_size=3)),
}
tables = st.lists(
    st.fixed_dictionaries({name: st.none() | values for name, (_, values) in COLUMNS.items()}), max_size=6
)


def said(value: Any) -> Any:
    """Return a value as JSON has it."""
    if isinstance(value, datetime):
        whole, _, fraction = value.isoformat().partition(".")
        return f"{whole}.{fraction.rstrip('0')}" if fraction else whole
    return value.isoformat() if isinstance(value, date) else value


def through(file: Path, **options: Any) -> list[Any]:
    """Return what a backend gets of the rows of a file."""
    return [row if isinstance(row, Exception) else decode(*encode(row)) for row in handles.read(file, **options)]


any_table = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@any_table
@given(tables)
def test_json_lines(tmp_path: Path, table: list[dict[str, Any]]) -> None:
    rows = [{name: said(value) for name, value in row.items()} for row in table]
    (tmp_path / "in.jsonl").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    assert through(tmp_path / "in.jsonl") == rows


@any_table
@given(tables)
def test_parquet(tmp_path: Path, table: list[dict[str, Any]]) -> None:
    arrays = {name: pa.array([_exact(row[name], kind) for row in table], kind) for name, (kind, _) in COLUMNS.items()}
    pq.write_table(pa.table(arrays), tmp_path / "in.parquet")
    expected = [{name: _decimal_text(name, said(value)) for name, value in row.items()} for row in table]
    assert through(tmp_path / "in.parquet") == expected


def _exact(value: Any, kind: Any) -> Any:
    return Decimal(value) if value is not None and pa.types.is_decimal(kind) else value


def _decimal_text(name: str, value: Any) -> Any:
    return str(value) if name == "long" and value is not None else value


@any_table
@given(tables)
def test_csv_of_given_types(tmp_path: Path, table: list[dict[str, Any]]) -> None:
    names = ["text", "long", "int", "float", "date"]
    with open(tmp_path / "in.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([names, *([_csv_cell(row[name]) for name in names] for row in table)])
    read = through(tmp_path / "in.csv", types={"text": "str", "long": "int", "int": "int", "float": "float"})
    assert len(read) == len(table)
    for row, written in zip(read, table, strict=True):
        if isinstance(row, MalformedBody):
            assert written["text"] is not None
            assert "is not UTF-8" in str(row) or "are not CSV" in str(row)
            continue
        assert row == {**{name: said(written[name]) for name in names}, "text": written["text"] or None}


def _csv_cell(value: Any) -> Any:
    return repr(value) if isinstance(value, float) else said(value)


cells = st.none() | text | numbers | floats.map(repr) | dates.map(str) | st.from_regex(r"-?0[0-9]{0,4}", fullmatch=True)


@any_table
@given(st.lists(st.tuples(cells, cells), max_size=8))
def test_csv_of_any_cells_means_them_or_refuses_the_row(tmp_path: Path, table: list[tuple[Any, Any]]) -> None:
    with open(tmp_path / "in.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("a", "b"), *table])
    read = through(tmp_path / "in.csv")
    assert len(read) == len(table)
    for row, cells in zip(read, table, strict=True):
        if isinstance(row, Exception):
            assert isinstance(row, MalformedBody)
            continue
        for value, cell in zip((row["a"], row["b"]), cells, strict=True):
            written = "" if cell is None else str(cell)
            if value is None:
                assert written == ""
            elif isinstance(value, str):
                assert value == written
            else:
                assert exact_json.loads(written.encode()) == value
                assert not written.lstrip("-").startswith("0") or written.lstrip("-")[1:2] in ("", ".", "e")


ROW = {
    "text": "é;\n𝄞",
    "long": 10**30,
    "int": -(2**63),
    "float": 0.1,
    "date": date(2026, 11, 27),
    "moment": datetime(2026, 11, 27, 1, 2, 3, 4),
    "flag": False,
    "list": [1, None],
}


@pytest.mark.parametrize("format_", ["jsonl", "csv", "parquet"])
def test_a_backend_gets_and_returns_each_of_these(
    site: Site, connected: Connection, tmp_path: Path, format_: str
) -> None:
    site.serve(echo)
    file = tmp_path / f"in.{format_}"
    table = [ROW, dict.fromkeys(ROW)]
    expected = [{name: said(value) for name, value in row.items()} for row in table]
    if format_ == "jsonl":
        file.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in expected))
    elif format_ == "parquet":
        arrays = {
            name: pa.array([_exact(row[name], kind) for row in table], kind) for name, (kind, _) in COLUMNS.items()
        }
        pq.write_table(pa.table(arrays), file)
        expected[0]["long"] = str(ROW["long"])
    else:
        with open(file, "w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows([list(ROW), *([_csv_cell(value) for value in row.values()] for row in table)])
        expected[0] |= {"long": str(ROW["long"]), "int": str(ROW["int"]), "flag": "False", "list": "[1, None]"}
    assert [result.get() for result in connected.batch("ask").map(handles.read(file))] == expected
