"""JSON that is read and written without loss."""

import dataclasses
import datetime
import enum
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from penstock.broker.wire import exact_json

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def parsed(parse: Any, body: bytes) -> str:
    try:
        return repr(parse(body))
    except (ValueError, RecursionError):
        return "refused"


@given(st.one_of(json_values.map(lambda value: json.dumps(value).encode()), st.binary(), st.text().map(str.encode)))
def test_json_is_read_as_the_standard_library_reads_it(body: bytes) -> None:
    """Including integers of any size, NaN and lone surrogates."""
    assert parsed(exact_json.loads, body) == parsed(json.loads, body)


@given(st.binary(max_size=40), st.from_regex(rb"-?[0-9]{1,25}(\.[0-9]{1,25})?([eE][+-]?[0-9]{1,3})?", fullmatch=True))
def test_no_number_is_silently_another_one(padding: bytes, number: bytes) -> None:
    body = b'["' + padding.hex().encode() + b'",' + number + b"]"
    assert parsed(exact_json.loads, body) == parsed(json.loads, body)


@given(json_values)
def test_values_are_read_as_written_with_null_for_nan_and_infinity(value: Any) -> None:
    def expected(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, list):
            members: list[Any] = value  # pyright: ignore[reportUnknownVariableType]
            return [expected(member) for member in members]
        if isinstance(value, dict):
            mapping: dict[str, Any] = value  # pyright: ignore[reportUnknownVariableType]
            return {key: expected(member) for key, member in mapping.items()}
        return value

    assert exact_json.loads(exact_json.dumps(value)) == expected(value)


class Colour(enum.Enum):
    RED = 2**70


class Name(str):
    __slots__ = ()


@dataclasses.dataclass
class Row:
    id: int
    when: datetime.date
    _hidden: int = 0


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (2**64, b"18446744073709551616"),
        ({"id": -(10**30), "x": [float("nan"), math.inf]}, b'{"id":-1' + b"0" * 30 + b',"x":[null,null]}'),
        (Row(10**20, datetime.date(2024, 2, 29)), b'{"id":100000000000000000000,"when":"2024-02-29"}'),
        ([Colour.RED], b"[1180591620717411303424]"),
        ({Name("a"): np.float32(0.1), "b": 2**64}, b'{"a":0.1,"b":18446744073709551616}'),
        ({np.str_("a"): 1}, b'{"a":1}'),
        ("\ud800", b'"\\ud800"'),
        ({"\udcff": "ü"}, b'{"\\udcff":"\\u00fc"}'),
        (
            [np.float64(0.5), np.float32(0.1), np.int8(1), np.bool_(True), np.array(7), np.zeros((1, 2), ">i4")],
            b"[0.5,0.1,1,true,7,[[0,0]]]",
        ),
        (np.asfortranarray([[0.0, 2.0], [1.0, 3.0]]), b"[[0.0,2.0],[1.0,3.0]]"),
        ((2**64, np.array([1.5, math.nan], "float32")), b"[18446744073709551616,[1.5,null]]"),
    ],
    ids=repr,
)
def test_values_that_orjson_does_not_support_are_written_exactly(value: Any, written: bytes) -> None:
    assert exact_json.dumps(value) == written


@pytest.mark.parametrize("unit", ["Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns"])
def test_nat_is_null_whatever_its_unit(unit: str) -> None:
    nat: Any = np.array("NaT", f"M8[{unit}]")[()]
    assert exact_json.dumps(nat) == b"null"
    date: Any = np.datetime64("1998-01-01").astype(f"M8[{unit}]")
    said = exact_json.loads(exact_json.dumps(date))
    assert said.startswith(str(date.astype("M8[D]")))
    assert exact_json.loads(exact_json.dumps([np.array([date, date]), np.array(date)])) == [[said, said], said]
    assert exact_json.loads(exact_json.dumps({"at": np.array([[nat, date]])})) == {"at": [[None, said]]}
    assert exact_json.dumps(np.datetime64("NaT")) == b"null"


def test_dates_that_orjson_takes_for_nat_are_unchanged() -> None:
    epoch = np.array(["1970-01-01"], "M8[s]")
    assert exact_json.dumps([epoch, datetime.datetime(1970, 1, 1), "1970-01-01T00:00:00"]) == (
        b'[["1970-01-01T00:00:00"],"1970-01-01T00:00:00","1970-01-01T00:00:00"]'
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({0: "cat"}, r"only strings as keys, and a mapping has the key 0 \(int\)"),
        ([{1: "a", "1": "b"}], r"has the key 1 \(int\)"),
        ({"x": {None: 1}}, r"has the key None \(NoneType\)"),
        ({1, 2}, "set"),
        (10**5000, "4300 digits"),
        (np.array([1], "M8[ps]"), "picoseconds"),
        (np.array([[100_000]], "M8[Y]"), "unrepresentable"),
        (np.longdouble(1), "longdouble|float128"),
    ],
    ids=[
        "a number as a key",
        "two keys that are one",
        "None as a key",
        "a set",
        "too many digits",
        "picoseconds",
        "a far year",
        "a long double",
    ],
)
def test_a_value_that_json_cannot_represent_is_refused_by_name(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        exact_json.dumps(value)


def test_a_value_that_contains_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(TypeError, match="contains itself"):
        exact_json.dumps(endless)
