import enum
import json
import pickle
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import date, datetime, timezone
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
import pydantic
import pytest
from hypothesis import given, strategies as st
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse

from penstock.handles.errors import BackendError, MalformedBody, Overloaded, from_wire, to_wire
from penstock.workers.executing.errors import failed_reply, failure, raised_reply
from penstock.workers.executing.results import Collector, encode, is_complete
from tests.workers.requests import from_http


@dataclass
class Point:
    x: int
    y: float


class Reading(pydantic.BaseModel):
    at: datetime
    value: float


class Colour(enum.Enum):
    RED = "red"


class Pair(NamedTuple):
    left: int
    right: list[int]


def as_json(value: object) -> Any:
    status, codec, headers, body = encode(value, "b")
    assert (status, codec, headers) == (200, "json", [])
    return json.loads(body)


@pytest.mark.parametrize(
    ("result", "codec", "body"),
    [
        (None, "none", b""),
        ("Zoë", "text", "Zoë".encode()),
        ("", "text", b""),
        (b"\x00", "bytes", b"\x00"),
        (bytearray(b"ab"), "bytes", b"ab"),
        (memoryview(b"ab"), "bytes", b"ab"),
        ({"a": 1}, "json", b'{"a":1}'),
        (False, "json", b"false"),
    ],
)
def test_a_result_is_encoded_by_its_type(result: object, codec: str, body: bytes) -> None:
    assert encode(result, "b") == (200, codec, [], body)


JSON: list[tuple[Any, Any]] = [
    (Point(1, 2.5), {"x": 1, "y": 2.5}),
    (Reading(at=datetime(2024, 1, 2, tzinfo=timezone.utc), value=1), {"at": "2024-01-02T00:00:00Z", "value": 1.0}),
    ([Reading(at=datetime(2024, 1, 2), value=1)], [{"at": "2024-01-02T00:00:00", "value": 1.0}]),
    (date(2024, 1, 2), "2024-01-02"),
    (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    (Colour.RED, "red"),
    (Pair(1, [2]), [1, [2]]),
    ({"n": 123456789012345678901}, {"n": 123456789012345678901}),
    (np.array([["NaT", "2024-01-02"]], "M8[us]"), [[None, "2024-01-02T00:00:00"]]),
    (np.arange(6).reshape(2, 3), [[0, 1, 2], [3, 4, 5]]),
    (np.arange(6).reshape(2, 3).T, [[0, 3], [1, 4], [2, 5]]),
    (np.array(["a", "b"]), ["a", "b"]),
    (np.array([Point(1, 2)], dtype=object), [{"x": 1, "y": 2}]),
    (
        {"n": np.int64(3), "x": np.float32(0.5), "t": np.bool_(True), "a": np.ones(2)},
        {"n": 3, "x": 0.5, "t": True, "a": [1.0, 1.0]},
    ),
    (np.float64(0.1), 0.1),
    ([float("nan"), float("inf"), np.nan], [None, None, None]),
]


@pytest.mark.parametrize(("value", "read"), JSON)
def test_json_values_are_encoded_as_json(value: object, read: object) -> None:
    assert as_json(value) == read


@pytest.mark.parametrize("value", [{1, 2}, object(), {0: "cat"}, {1: "a", "1": "b"}, [{None: 1}], 1j, Point])
def test_a_value_that_cannot_be_sent_is_refused_with_the_way_out(value: object) -> None:
    with pytest.raises(TypeError, match=r"'greeter' returned a value that cannot be sent: .*allow_pickle") as caught:
        encode(value, "greeter")
    assert type(value).__name__ in str(caught.value)


@pytest.mark.parametrize("value", [{1, 2}, {0: "cat"}, {"a": 1j}, {1: "a", "1": "b"}])
def test_objects_are_pickled_only_where_that_is_allowed(value: object) -> None:
    status, codec, headers, body = encode(value, "b", allow_pickle=True)
    assert (status, codec, headers) == (200, "pickle", [])
    assert pickle.loads(body) == value


def test_json_values_are_never_pickled() -> None:
    assert encode([1], "b", allow_pickle=True).codec == "json"


def test_an_object_of_a_class_without_a_module_can_be_pickled() -> None:
    class Local:
        value = 7

    assert pickle.loads(encode(Local(), "b", allow_pickle=True).body).value == 7


def test_generators_and_coroutines_are_refused_by_name() -> None:
    async def coroutine() -> None: ...

    async def async_generator() -> AsyncIterator[int]:
        yield 1

    generator = (n for n in [1])
    for result, name in ((generator, "generator"), (async_generator(), "generator"), (coroutine(), "coroutine")):
        with pytest.raises(TypeError, match=f"'b' returned a {name}"):
            encode(result, "b", allow_pickle=True)


def test_a_response_is_sent_whole() -> None:
    response = JSONResponse({"a": 1}, 201, {"X-Mine": "Zoë"})
    response.set_cookie("a", "1")
    response.set_cookie("b", "2")
    status, codec, headers, body = encode(response, "b")
    assert (status, codec, body) == (201, "response", b'{"a":1}')
    assert ("x-mine", "Zoë") in headers
    assert len([value for name, value in headers if name == "set-cookie"]) == 2
    assert encode(RedirectResponse("/there"), "b")[:2] == (307, "response")


def test_an_invalid_status_is_refused() -> None:
    with pytest.raises(ValueError, match="200 to 599, not 999"):
        encode(Response(status_code=999), "b")


def test_only_a_plain_response_is_complete() -> None:
    assert is_complete({"a": 1})
    assert is_complete(PlainTextResponse("a"))
    assert not is_complete(StreamingResponse(iter(["a"])))
    assert not is_complete(Response(background=lambda: None))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_the_messages_of_an_application_make_one_response() -> None:
    collector = Collector()
    start = {"type": "http.response.start", "status": 202, "headers": [(b"a", b"1")]}
    assert collector.add(start) is None
    assert collector.add({"type": "http.response.body", "body": b"ab", "more_body": True}) is None
    assert collector.add({"type": "http.response.body", "body": b"c"}) == (202, "response", [("a", "1")], b"abc")
    assert collector.add({"type": "http.response.body", "body": b"late"}) is None


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


def raised_by_user_code(error: BaseException) -> BackendError:
    try:
        raise error
    except BaseException as e:
        found = from_wire(json.loads(json.dumps(to_wire(failure(e)))))
        assert isinstance(found, BackendError)
        return found


def test_an_error_has_type_message_and_traceback() -> None:
    error = raised_by_user_code(ValueError("bad input"))
    assert (error.type_name, error.message, error.status) == ("ValueError", "bad input", 500)
    assert "raise error" in error.traceback
    assert error.traceback.endswith("ValueError: bad input\n")
    assert raised_by_user_code(Unprintable()).type_name == f"{Unprintable.__module__}.Unprintable"


def test_an_exception_that_was_never_raised_has_no_traceback() -> None:
    error = failure(ValueError("x"))
    assert isinstance(error, BackendError)
    assert error.traceback == ""


@pytest.mark.parametrize(
    "error",
    [
        Unprintable(),
        SystemExit(3),
        KeyboardInterrupt(),
        StopIteration(1),
        GeneratorExit(),
        ValueError("\ud800"),
        ValueError("x" * 10_000_000),
        HTTPException(99),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_error_can_be_sent(error: BaseException) -> None:
    told = raised_by_user_code(error)
    assert told.status == 500
    assert len(told.message) + len(told.traceback) < 100_000


@given(st.text() | st.characters(categories=["Cs"]))
def test_every_message_can_be_sent(message: str) -> None:
    told = raised_by_user_code(ValueError(message))
    assert told.message == message.encode("utf-8", "backslashreplace").decode()


def test_a_long_chain_of_errors_can_be_sent() -> None:
    error = ValueError("first")
    for n in range(2 * sys.getrecursionlimit()):
        following = ValueError(str(n))
        following.__context__ = error
        error = following
    assert raised_by_user_code(error).type_name == "ValueError"


def test_the_traceback_includes_causes() -> None:
    def fail() -> Iterator[None]:
        try:
            yield from [].pop()
        except IndexError as e:
            raise ValueError("outer") from e

    try:
        list(fail())
    except ValueError as e:
        error = failure(e)
        assert isinstance(error, BackendError)
        assert "pop from empty list" in error.traceback
        assert "direct cause" in error.traceback


def test_http_exceptions_keep_their_status_and_headers() -> None:
    error = HTTPException(401, "who are you?", {"WWW-Authenticate": "Basic"})
    reply = failed_reply(from_http(), error, "r#1")
    assert reply.status == 401
    assert reply.headers == [("www-authenticate", "Basic")]
    assert reply.error is not None
    told = from_wire(reply.error)
    assert isinstance(told, BackendError)
    assert (told.status, told.message) == (401, "who are you?")
    assert told.type_name == "starlette.exceptions.HTTPException"


def test_an_http_exception_that_redirects_is_a_response_and_not_an_error() -> None:
    reply = raised_reply(from_http(), HTTPException(307, "elsewhere", {"Location": "/b"}), "r#1", 2.0)
    assert (reply.status, reply.codec, reply.error, reply.body) == (307, "response", None, b"elsewhere")
    assert reply.headers == [("location", "/b"), ("content-type", "text/plain; charset=utf-8")]
    assert (reply.replica, reply.run_ms) == ("r#1", 2.0)
    unchanged = raised_reply(from_http(), HTTPException(304, headers={"ETag": '"1"'}), "r#1")
    assert (unchanged.status, unchanged.headers, unchanged.body) == (304, [("etag", '"1"')], b"")


@pytest.mark.parametrize("error", [HTTPException(400), HTTPException(599), HTTPException(199), ValueError("x")])
def test_every_other_exception_is_an_error(error: Exception) -> None:
    entry = from_http()
    reply = raised_reply(entry, error, "r#1")
    assert reply.error is not None
    assert reply == failed_reply(entry, error, "r#1")


def test_a_malformed_body_is_the_callers_fault() -> None:
    reply = failed_reply(from_http(), MalformedBody("not JSON"), "r#1")
    assert reply.status == 400
    assert reply.error == {"kind": "MalformedBody", "args": ["not JSON"]}


def test_the_503_of_a_called_backend_is_passed_on() -> None:
    assert raised_by_user_code(Overloaded("other", 5, 5)).status == 503


def test_the_retry_after_of_a_called_backend_is_passed_on() -> None:
    busy = Overloaded("other", 5, 5)
    busy.retry_after_s = 2.5
    assert failed_reply(from_http(), busy, "r#1").headers == [("retry-after", "3")]
