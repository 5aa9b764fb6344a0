"""Outputs: journals that a job goes on with, and tables that are made of them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from penstock import handles
from penstock.broker.wire import exact_json
from penstock.handles.errors import ConfigError
from penstock.handles.files.outputs import FileOutput, open_output
from penstock.handles.files.tables import write_table

pa: Any = import_module("pyarrow")
pq: Any = import_module("pyarrow.parquet")
zstandard: Any = import_module("zstandard")


def line(index: int, result: Any) -> bytes:
    return exact_json.dumps({"index": index, "result": result}) + b"\n"


def failed(index: int, message: str = "no") -> bytes:
    error = {"type": "ValueError", "message": message}
    return exact_json.dumps({"index": index, "row": index + 1, "error": error}) + b"\n"


def output(path: Path, *, retry_errors: bool = False, restart: bool = False) -> FileOutput:
    target = open_output(str(path), retry_errors=retry_errors, restart=restart)
    assert isinstance(target, FileOutput)
    return target


def table(name: str, *lines: bytes) -> bytes:
    file = io.BytesIO()
    write_table(lambda: lines, file, name)
    return file.getvalue()


def columns(*lines: bytes) -> Any:
    return pq.read_table(io.BytesIO(table("out.parquet", *lines)))


def results(*values: Any) -> Any:
    """Return the column of these results."""
    return columns(*(line(index, value) for index, value in enumerate(values)))["result"]


NAMES = ["out.jsonl", "out.csv", "out.tsv", "out.parquet", "out.jsonl.gz", "out.csv.zst", "out.parquet.gz"]


@pytest.mark.parametrize("name", NAMES)
def test_an_output_that_was_cut_off_goes_on_after_its_last_whole_line(tmp_path: Path, name: str) -> None:
    first = output(tmp_path / name)
    first.write(line(0, "a"))
    first.write(line(1, "b") + b'{"index":2,"res')
    first.close()
    second = output(tmp_path / name)
    assert sorted(second.done) == [0, 1]
    second.write(line(2, "c"))
    second.finish(keep_journal=True)
    second.close()
    assert [(row["index"], row["result"]) for row in handles.read(tmp_path / name)] == [(0, "a"), (1, "b"), (2, "c")]
    third = output(tmp_path / name)
    assert sorted(third.done) == [0, 1, 2]
    third.finish(keep_journal=False)
    third.close()
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", NAMES)
def test_error_lines_of_rows_that_were_run_again_are_gone(tmp_path: Path, name: str) -> None:
    first = output(tmp_path / name)
    for one in (line(0, 1.5), failed(1), failed(2)):
        first.write(one)
    first.finish(keep_journal=True)
    first.close()
    again = output(tmp_path / name, retry_errors=True)
    assert (sorted(again.done), sorted(again.failed)) == ([0], [1, 2])
    again.write(line(1, 2.5))
    again.finish(keep_journal=True)
    again.close()
    rows = list(handles.read(tmp_path / name))
    assert [row["index"] for row in rows] == [0, 2, 1]
    assert [row.get("result") for row in rows] == [1.5, None, 2.5]


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_table_without_its_journal_is_not_gone_on_with(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"of somebody else")
    with pytest.raises(ConfigError, match="exists, and has no journal to go on with: give another --output"):
        output(tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"of somebody else"
    (tmp_path / f"{name}.journal").write_bytes(b"of somebody else\n")
    with pytest.raises(ConfigError, match="line 1 was not written by a batch"):
        output(tmp_path / name)


def test_compressed_outputs_are_what_their_names_say() -> None:
    text = line(0, "é")
    assert gzip.decompress(table("out.jsonl.gz", text)) == text
    assert zstandard.ZstdDecompressor().decompressobj().decompress(table("out.jsonl.zst", text)) == text
    assert gzip.decompress(table("out.parquet.gz", text))[:4] == b"PAR1"


def test_results_that_are_objects_have_a_column_for_each_name() -> None:
    read = columns(line(0, {"label": "cat", "index": 7}), failed(1, "broken"), line(2, {"score": 0.5}))
    assert read.to_pylist() == [
        {"index": 0, "label": "cat", "result.index": 7, "score": None, "error_type": None, "error_message": None},
        {
            "index": 1,
            "label": None,
            "result.index": None,
            "score": None,
            "error_type": "ValueError",
            "error_message": "broken",
        },
        {"index": 2, "label": None, "result.index": None, "score": 0.5, "error_type": None, "error_message": None},
    ]


def test_the_place_of_a_row_is_in_columns_where_there_are_several_files() -> None:
    one = exact_json.dumps({"index": 0, "file": "a.csv", "row": 1, "result": True}) + b"\n"
    assert table("out.csv", one) == b"index,file,row,result,error_type,error_message\r\n0,a.csv,1,true,,\r\n"


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([True, None], "bool"),
        ([1, -(2**63)], "int64"),
        ([2**64 - 1, 0], "uint64"),
        ([2**64, -1], "decimal128(38, 0)"),
        ([1, 2.5, None], "double"),
        (["a", ""], "string"),
        ([[1, 2], [], [None]], "list<element: int64>"),
        ([[{"a": 1}, {"b": "x"}]], "list<element: struct<a: int64, b: string>>"),
        ([None, None], "string"),
    ],
)
def test_a_column_of_parquet_has_the_type_of_its_values(values: list[Any], kind: str) -> None:
    column = results(*values)
    assert str(column.type).replace("item", "element") == kind

    def plain(value: Any) -> Any:
        if isinstance(value, Decimal):
            return int(value)
        if value.__class__ is list:
            return [plain(member) for member in value]
        if value.__class__ is dict:
            return {name: plain(member) for name, member in value.items() if member is not None}
        return value

    assert [plain(value) for value in column.to_pylist()] == values


@pytest.mark.parametrize(
    "values",
    [[1, "1"], [2**53 + 1, 0.5], [10**40], [[1], {"a": 1}], ["\ud800"], [{}], [True, 1]],
    ids=range(7),
)
def test_values_that_no_type_holds_exactly_are_text_that_holds_json(values: list[Any]) -> None:
    column = results(*values)
    assert [json.loads(value) for value in column.to_pylist()] == values


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**45), 10**45)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(json_values, max_size=5))
def test_every_result_is_in_the_parquet_file_exactly(values: list[Any]) -> None:
    read = columns(*(line(index, [value]) for index, value in enumerate(values)))
    for index, row in enumerate(read.to_pylist()):
        field = read.schema.field("result")
        cell = row["result"]
        if field.metadata == {b"format": b"json"} or isinstance(cell, str):
            assert json.loads(cell) == [values[index]]
        else:
            assert _is_within(cell, [values[index]])


def _is_within(read: Any, value: Any) -> bool:
    """Whether a cell has a value, in itself or as the JSON that its text is."""
    if value.__class__ is read.__class__ is list:
        return len(read) == len(value) and all(map(_is_within, read, value))
    if value.__class__ is read.__class__ is dict:
        return all(_is_within(read[name], member) for name, member in value.items())
    if isinstance(read, str) and read != value:
        return bool(json.loads(read) == value)
    return bool(read == value)


@given(st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"])), max_size=5))
def test_every_text_is_in_the_csv_file_exactly(values: list[str | None]) -> None:
    text = table("out.csv", *(line(index, value) for index, value in enumerate(values))).decode()
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["result"] for row in rows] == [value or "" for value in values]
    assert [row["index"] for row in rows] == [str(index) for index in range(len(values))]
