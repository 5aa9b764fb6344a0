import dataclasses
import datetime
import pickle
import uuid
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pydantic
import pytest
from hypothesis import given, strategies as st

from penstock.handles.codec import decode, encode
from penstock.handles.errors import MalformedBody

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=[])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=[])), inner, max_size=3)
    ),
    max_leaves=8,
)


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Plain:
    when: datetime.date
    where: Point


class Model(pydantic.BaseModel):
    name: str
    sizes: tuple[int, ...] = ()


TRANSPOSED: object = np.asfortranarray([[0.0, 2.0], [1.0, 3.0]])
"""Not contiguous, which orjson does not support."""


class Unwilling:
    def __reduce__(self) -> Any:
        raise RuntimeError("on purpose")


@given(JSON | st.binary())
def test_a_value_is_the_same_after_encoding_and_decoding(value: Any) -> None:
    assert decode(*encode(value)) == value


@pytest.mark.parametrize(
    ("value", "codec"),
    [(None, "none"), ("ü", "text"), (b"\xff", "bytes"), (bytearray(b"x"), "bytes"), ({}, "json"), (0, "json")],
)
def test_the_codec_depends_on_the_type(value: object, codec: str) -> None:
    assert encode(value)[0] == codec
    assert encode(value, allow_pickle=True)[0] == codec, "pickle is for what cannot travel otherwise"


@pytest.mark.parametrize(
    ("value", "arrives"),
    [
        (Plain(datetime.date(2024, 2, 29), Point(1, 2)), {"when": "2024-02-29", "where": [1, 2]}),
        (Model(name="m", sizes=(1, 2)), {"name": "m", "sizes": [1, 2]}),
        (TRANSPOSED, [[0, 2], [1, 3]]),
        (np.float64(0.5), 0.5),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        ((1, 2), [1, 2]),
        ({"id": 2**64}, {"id": 2**64}),
        ("\ud800", "\ud800"),
        ([np.datetime64("NaT", "D")], [None]),
        (float("nan"), None),
        (memoryview(b"view"), b"view"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_json_can_represent_become_json(value: object, arrives: object) -> None:
    assert decode(*encode(value)) == arrives


@pytest.mark.parametrize(
    "value",
    [object(), {"a": object()}, {1: "a"}, {1: "a", "1": "b"}, {1, 2}, Model],
    ids=["an object", "an object within", "integer keys", "keys that become alike", "a set", "a class"],
)
def test_a_value_that_cannot_be_encoded_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError, match="cannot be sent"):
        encode(value)


def test_python_values_are_pickled_where_that_is_allowed() -> None:
    for value in ({1, 2}, {1: "a", "1": "b"}):
        codec, body = encode(value, allow_pickle=True)
        assert codec == "pickle"
        assert decode(codec, body, allow_pickle=True) == value
    with pytest.raises(MalformedBody, match="allow_pickle"):
        decode(codec, body)


@pytest.mark.parametrize("value", [Unwilling(), lambda: None], ids=["unwilling", "lambda"])
def test_a_value_that_cannot_be_pickled_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError, match="cannot be pickled"):
        encode(value, allow_pickle=True)


@given(st.sampled_from(["json", "text", "bytes", "none", "pickle", "", "unheard-of"]), st.binary(max_size=20))
def test_bytes_without_the_format_of_the_codec_are_malformed(codec: str, body: bytes) -> None:
    with suppress(MalformedBody):
        decode(codec, body, allow_pickle=False)


@pytest.mark.parametrize("body", [b"", b"garbage", pickle.dumps({})[:-3], b"cos\nno_such_name\n."])
def test_a_broken_pickle_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedBody, match="cannot be unpickled"):
        decode("pickle", body, allow_pickle=True)
