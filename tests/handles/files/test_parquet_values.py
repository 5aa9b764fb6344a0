"""Parquet columns: every cell arrives as its type says, or its row is an error that names the column."""

from __future__ import annotations

from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from penstock import handles
from penstock.handles.errors import ConfigError, MalformedBody

pa: Any = import_module("pyarrow")
pq: Any = import_module("pyarrow.parquet")

LONG = 12345678901234567890123456789012345678
MOMENT = datetime(2026, 11, 27, 1, 2, 3, 400_000)
ROME = timezone(timedelta(hours=1))


def read_back(file: Path, column: Any, **options: Any) -> list[Any]:
    """Return what becomes of a column, after a null and in two row groups."""
    array = pa.concat_arrays([pa.nulls(1, column.type), column, column])
    pq.write_table(pa.table({"x": array}), file, row_group_size=max(1, len(array) - 1))
    rows = [row if isinstance(row, MalformedBody) else row["x"] for row in handles.read(file, batch_rows=2, **options)]
    assert rows[0] is None
    values = rows[1:]
    half = len(values) // 2
    assert [repr(value) for value in values[:half]] == [repr(value) for value in values[half:]]
    return values[:half]


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([True, False], pa.bool_(), [True, False]),
        ([-128], pa.int8(), [-128]),
        ([-(2**63), 2**63 - 1], pa.int64(), [-(2**63), 2**63 - 1]),
        ([2**64 - 1], pa.uint64(), [2**64 - 1]),
        ([0.1, 1e300, -0.0], pa.float64(), [0.1, 1e300, -0.0]),
        ([0.5], pa.float16(), [0.5]),
        ([0.1], pa.float32(), [0.10000000149011612]),
        (["", "é", "\0", "𝄞"], pa.string(), ["", "é", "\0", "𝄞"]),
        (["x"], pa.large_string(), ["x"]),
        ([b"", b"\xff\x00"], pa.binary(), ["", "/wA="]),
        ([b"\xff\x00"], pa.binary(2), ["/wA="]),
        ([Decimal("12.50"), Decimal("-0.01")], pa.decimal128(10, 2), ["12.50", "-0.01"]),
        ([Decimal(LONG)], pa.decimal128(38, 0), [str(LONG)]),
        ([Decimal(10) ** 60], pa.decimal256(70, 0), [str(10**60)]),
        ([date(2026, 11, 27), date(1, 1, 1)], pa.date32(), ["2026-11-27", "0001-01-01"]),
        ([date(1969, 12, 31)], pa.date64(), ["1969-12-31"]),
        ([MOMENT], pa.timestamp("ms"), ["2026-11-27T01:02:03.4"]),
        ([MOMENT], pa.timestamp("us"), ["2026-11-27T01:02:03.4"]),
        (
            [1_500_000_000_123_456_789, -1],
            pa.timestamp("ns"),
            ["2017-07-14T02:40:00.123456789", "1969-12-31T23:59:59.999999999"],
        ),
        ([MOMENT.replace(tzinfo=ROME)], pa.timestamp("us", "Europe/Rome"), ["2026-11-27T00:02:03.4+00:00"]),
        ([time(1, 2, 3, 500)], pa.time64("us"), ["01:02:03.0005"]),
        ([time(23, 59, 59)], pa.time32("ms"), ["23:59:59"]),
        ([timedelta(hours=-1, milliseconds=-5)], pa.duration("ms"), ["-PT3600.005S"]),
        ([["a", None], []], pa.list_(pa.string()), [["a", None], []]),
        ([[1, 2]], pa.list_(pa.int32(), 2), [[1, 2]]),
        ([[[date(2026, 1, 1)]], None], pa.large_list(pa.list_(pa.date32())), [[["2026-01-01"]], None]),
        (
            [{"a": 1, "b": [b"x"]}],
            pa.struct([("a", pa.int8()), ("b", pa.list_(pa.binary()))]),
            [{"a": 1, "b": ["eA=="]}],
        ),
        ([[("k", 1)], []], pa.map_(pa.string(), pa.int64()), [{"k": 1}, {}]),
        (["a", "b", "a"], pa.dictionary(pa.int8(), pa.string()), ["a", "b", "a"]),
    ],
    ids=lambda value: str(value) if isinstance(value, pa.DataType) else "",
)
def test_a_column_arrives_as_its_type_says(tmp_path: Path, values: Any, kind: Any, expected: Any) -> None:
    read = read_back(tmp_path / "in.parquet", pa.array(values, kind))
    assert read == expected
    assert [type(value) for value in read] == [type(value) for value in expected]


def test_a_uuid_is_text(tmp_path: Path) -> None:
    storage = pa.array([bytes(range(16))], pa.binary(16))
    column = pa.ExtensionArray.from_storage(pa.uuid(), storage)
    pq.write_table(pa.table({"x": column}), tmp_path / "in.parquet")
    assert list(handles.read(tmp_path / "in.parquet")) == [{"x": "00010203-0405-0607-0809-0a0b0c0d0e0f"}]


def not_utf_8() -> Any:
    array = pa.array([b"good", b"caf\xe9", b"fine"], pa.binary())
    return pa.Array.from_buffers(pa.string(), 3, array.buffers())


@pytest.mark.parametrize(
    ("column", "bad", "reason"),
    [
        (not_utf_8(), 1, "is not UTF-8"),
        (pa.array([0, 2**31 - 1], pa.int32()).view(pa.date32()), 1, "is beyond the years 1 to 9999"),
        (pa.array([2**62, 0], pa.int64()).view(pa.timestamp("ms")), 0, "is beyond the years 1 to 9999"),
        (pa.array([0, 25 * 3600], pa.int32()).view(pa.time32("s")), 1, "is not within a day"),
        (pa.array([[("a", 1), ("a", 2)], []], pa.map_(pa.string(), pa.int64())), 0, "a key that is there twice"),
        (pa.array([[2**62], [0]], pa.list_(pa.timestamp("ms"))), 0, "is beyond the years 1 to 9999"),
    ],
    ids=range(6),
)
def test_a_cell_without_a_value_makes_its_row_an_error_that_names_the_column(
    tmp_path: Path, column: Any, bad: int, reason: str
) -> None:
    pq.write_table(pa.table({"x": column}), tmp_path / "in.parquet")
    rows = list(handles.read(tmp_path / "in.parquet"))
    assert [index for index, row in enumerate(rows) if isinstance(row, MalformedBody)] == [bad]
    assert str(rows[bad]).startswith("column 'x' ")
    assert reason in str(rows[bad])


def test_a_column_whose_type_has_no_value_is_refused_at_once(tmp_path: Path) -> None:
    table = pa.table({"good": [1], "x": pa.array([[(1, 2)]], pa.map_(pa.int64(), pa.int64()))})
    pq.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(ConfigError, match=r"column 'x' is of the type map.*whose keys are not text.*--columns"):
        handles.read(tmp_path / "in.parquet")
    assert list(handles.read(tmp_path / "in.parquet", columns=["good"])) == [{"good": 1}]


def test_columns_of_the_same_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(ConfigError, match="names more than one column 'a'"):
        handles.read(tmp_path / "in.parquet")
