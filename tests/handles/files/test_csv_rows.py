"""CSV files as people have them: delimiters, headers, types of columns, and what is refused."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from penstock.handles.errors import MalformedBody
from penstock.handles.files.csv_rows import LOOK_AHEAD, CsvRows, parse_types


def rows_of(text: str, **options: Any) -> list[Any]:
    return [
        str(row) if isinstance(row, MalformedBody) else row
        for row in CsvRows(io.StringIO(text, newline=""), "in.csv", **options)
    ]


@pytest.mark.parametrize(
    ("cells", "read"),
    [
        (["1", "-2", ""], [1, -2, None]),
        (["0.5", "1e3", "7"], [0.5, 1000.0, 7]),
        (["0.30000000000000004"], [0.30000000000000004]),
        (["01067", "10115"], ["01067", "10115"]),
        (["10115", "01067"], ["10115", "01067"]),
        (["1", "12345678901234567890123456789012"], ["1", "12345678901234567890123456789012"]),
        (["0.12345678901234567890"], ["0.12345678901234567890"]),
        (["1_000", "2"], ["1_000", "2"]),
        (["nan", "1"], ["nan", "1"]),
        (["1e400"], ["1e400"]),
        (["+1"], ["+1"]),
        ([" 1"], [" 1"]),
        (["true", "null"], ["true", "null"]),
        (["", ""], [None, None]),
    ],
)
def test_a_column_has_numbers_only_where_all_its_values_are_numbers(cells: list[str], read: list[Any]) -> None:
    rows = rows_of("c,d\n" + "".join(f"{cell},x\n" for cell in cells))
    assert [row["c"] for row in rows] == read
    assert [type(row["c"]) for row in rows] == [type(value) for value in read]


def test_a_column_keeps_the_type_that_the_first_rows_have_settled() -> None:
    text = "zip\n" + "10115\n" * LOOK_AHEAD + "01067\n"
    *first, last = rows_of(text)
    assert first == [{"zip": 10115}] * LOOK_AHEAD
    assert last == (
        "column 'zip' is of the type number, and here it is '01067'; --types zip=str or --strings reads it as text"
    )
    assert rows_of(text, strings=True)[-1] == {"zip": "01067"}
    assert rows_of(text, types={"zip": "str"})[-1] == {"zip": "01067"}


def test_types_that_are_given_hold_for_every_row() -> None:
    types = parse_types("n=int,x=float,s=str")
    assert rows_of("n,x,s,t\n12345678901234567890,1,1,1\n", types=types) == [
        {"n": 12345678901234567890, "x": 1.0, "s": "1", "t": 1}
    ]
    (row,) = rows_of("n,x,s,t\n1.5,1,1,1\n", types=types)
    assert "column 'n' is of the type int, and here it is '1.5'" in row


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found_in_the_header(delimiter: str) -> None:
    text = delimiter.join(['"a,;b"', "n"]) + "\n" + delimiter.join(["x", "1"]) + "\n"
    assert rows_of(text) == [{"a,;b": "x", "n": 1}]


def test_a_delimiter_can_be_given() -> None:
    assert rows_of("a:b\n1:2\n", delimiter=":") == [{"a": 1, "b": 2}]


def test_an_unclosed_quote_is_an_error_that_names_its_lines() -> None:
    text = 'a,b\n1,x\n2,"y\n' + "3,z\n" * 58
    assert rows_of(text) == [{"a": 1, "b": "x"}, "lines 3 to 61 are not CSV: unexpected end of data"]


def test_rows_that_are_no_csv_are_errors_and_the_rest_goes_on() -> None:
    first, second, third, last = rows_of('a,b\n"x"y,1\n\n1,2,3\nz,4\n')
    assert first.startswith("lines 2 to 2 are not CSV")
    assert second == "line 3 is empty"
    assert third == "the row has 3 columns, and the header names 2"
    assert last == {"a": "z", "b": 4}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b,a\n", {}, "in.csv: the header names more than one column 'a'"),
        ("", {}, "this one is empty"),
        ("a\n", {"types": {"b": "str"}}, "there is no column 'b'; the header names 'a'"),
        ("caf\udce9\n", {}, "not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_at_its_header(text: str, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CsvRows(io.StringIO(text), "in.csv", **options)


@pytest.mark.parametrize("text", ["zip", "zip=text", "=", "a=int,"])
def test_types_are_columns_with_a_type(text: str) -> None:
    with pytest.raises(ValueError, match="--types is COLUMN=TYPE"):
        parse_types(text)


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5) | st.from_regex(
    r"-?[0-9]{1,20}(\.[0-9]{1,18})?(e[0-9])?", fullmatch=True
)


@given(st.lists(st.tuples(cells, cells), max_size=8))
def test_every_cell_arrives_as_it_was_written(table: list[tuple[str, str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("a", "b"), *table])
    rows = rows_of(text.getvalue())
    assert len(rows) == len(table)
    for row, (a, b) in zip(rows, table, strict=True):
        for value, cell in ((row["a"], a), (row["b"], b)):
            if value is None:
                assert cell == ""
            elif isinstance(value, str):
                assert value == cell
            else:
                assert value == json.loads(cell)
                assert str(int(value)) == cell or "." in cell or "e" in cell
