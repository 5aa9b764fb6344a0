import asyncio
import pickle
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, strategies as st
from starlette.datastructures import QueryParams, UploadFile

from penstock.broker.wire.requests import Entry, Header
from penstock.handles.errors import MalformedBody
from penstock.workers.executing.request import Request
from tests.support.notebooks import shown_in_notebook
from tests.workers.requests import from_handle, from_http

FORM = (
    b'--xyz\r\nContent-Disposition: form-data; name="who"\r\n\r\nAda\r\n'
    b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\nhello\r\n--xyz--\r\n'
)


async def test_a_request_from_http_has_the_interface_of_starlette() -> None:
    entry = from_http(
        b'{"a": 1}',
        headers=[("cookie", "session=42; theme=dark"), ("accept", "a"), ("accept", "b")],
        content_type="application/json",
        path="/hello/Zoë",
        query="q=1&q=2&empty=",
    )
    request = Request(entry)
    assert request.method == "POST"
    assert str(request.url) == "http://example.org:8000/hello/Zoë?q=1&q=2&empty="
    assert str(request.base_url) == "http://example.org:8000/"
    assert request.query_params.getlist("q") == ["1", "2"]
    assert request.query_params["empty"] == ""
    assert request.headers["Content-Type"] == "application/json"
    assert request.headers.getlist("accept") == ["a", "b"]
    assert request.cookies == {"session": "42", "theme": "dark"}
    assert request.client is not None
    assert (request.client.host, request.client.port) == ("192.0.2.7", 40000)
    assert request.scope["raw_path"] == b"/hello/Zo%C3%AB"
    assert request.scope["server"] == ("example.org", 8000)
    request.state.user = "Ada"
    assert request.state.user == "Ada"
    assert await request.body() == b'{"a": 1}'
    assert await request.json() == {"a": 1}
    assert [chunk async for chunk in request.stream()] == [b'{"a": 1}', b""]
    assert not await request.is_disconnected()


def test_path_parameters_keep_their_types() -> None:
    params = {"id": 123, "share": 3.14, "name": "ada", "key": UUID(int=7)}
    request = Request(from_http(path_params=params))
    assert request.path_params == params
    assert [type(value) for value in request.path_params.values()] == [int, float, str, UUID]
    assert request.scope["path_params"] == params


@pytest.mark.parametrize(
    ("content_type", "body", "data"),
    [
        ("application/json", b'{"a": [1, 2.5, null]}', {"a": [1, 2.5, None]}),
        ("Application/JSON; charset=utf-8", b'"x"', "x"),
        ("application/vnd.api+json", b"[]", []),
        ("text/plain", b"[]", b"[]"),
        ("application/jsonlines", b"{}\n{}", b"{}\n{}"),
        ("", b"\x00\xff", b"\x00\xff"),
        ("", b"", b""),
    ],
)
def test_data_from_http_is_decoded_by_its_content_type(content_type: str, body: bytes, data: object) -> None:
    assert Request(from_http(body, content_type=content_type)).data == data


@pytest.mark.parametrize(
    ("codec", "body", "data"),
    [
        ("json", b'{"a":1}', {"a": 1}),
        ("text", "Zoë".encode(), "Zoë"),
        ("bytes", b"\x00\xff", b"\x00\xff"),
        ("none", b"", None),
    ],
)
def test_data_from_a_handle_is_the_sent_value(codec: str, body: bytes, data: object) -> None:
    assert Request(from_handle(body, codec=codec)).data == data


def test_data_is_decoded_once() -> None:
    request = Request(from_handle([1]))
    request.data.append(2)
    assert request.data == [1, 2]


async def test_a_handle_may_send_no_value() -> None:
    request = Request(from_handle(b"", codec="none"))
    assert request.data is None
    assert await request.json() is None
    assert await request.body() == b""


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_request_without_a_body_has_json_none(method: str) -> None:
    request = Request(from_http(method=method, content_type="application/json"))
    assert request.data is None
    assert await request.json() is None
    assert await request.body() == b""
    assert await Request(from_http(method=method)).json() is None


def test_keyword_arguments_are_query_parameters_with_unchanged_values() -> None:
    request = Request(from_handle(1, limit=10, names=["a", "b"], who="Ada"))
    assert isinstance(request.query_params, QueryParams)
    assert dict(request.query_params) == {"limit": 10, "names": ["a", "b"], "who": "Ada"}
    assert request.query_params.get("missing", 7) == 7
    assert request.scope["query_string"] == b"limit=10&names=%5B%22a%22%2C%22b%22%5D&who=Ada"
    assert request.url.path == "/"


def test_pickled_objects_are_read_only_where_they_are_allowed() -> None:
    entry = from_handle(pickle.dumps({1, 2}), codec="pickle")
    assert Request(entry, allow_pickle=True).data == {1, 2}
    with pytest.raises(MalformedBody, match="allow_pickle"):
        _ = Request(entry).data


class Explosive:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1 / 0",)


def test_nothing_from_http_is_unpickled_whatever_its_codec() -> None:
    bomb = pickle.dumps(Explosive())
    for content_type in ("application/python-pickle", "pickle", ""):
        assert Request(from_http(bomb, content_type=content_type), allow_pickle=True).data == bomb
    with pytest.raises(MalformedBody, match="division by zero"):
        _ = Request(from_handle(bomb, codec="pickle"), allow_pickle=True).data


@pytest.mark.parametrize("body", [b" ", b"{", b"\xff\xfe\xfd", b"nope", b"[" * 100_000])
async def test_malformed_json_is_a_malformed_body(body: bytes) -> None:
    request = Request(from_http(body, content_type="application/json"))
    with pytest.raises(MalformedBody):
        _ = request.data
    with pytest.raises(MalformedBody):
        await request.json()
    assert await request.body() == body


def test_an_unknown_codec_is_refused_by_name() -> None:
    with pytest.raises(MalformedBody, match="'arrow'"):
        _ = Request(from_handle(b"", codec="arrow")).data


async def test_forms_and_files_are_read() -> None:
    request = Request(from_http(FORM, content_type="multipart/form-data; boundary=xyz"))
    async with request.form() as form:
        assert form["who"] == "Ada"
        file = form["file"]
        assert isinstance(file, UploadFile)
        assert (file.filename, await file.read()) == ("a.txt", b"hello")
    request = Request(from_http(b"a=1&b=%20", content_type="application/x-www-form-urlencoded"))
    assert dict(await request.form()) == {"a": "1", "b": " "}


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", FORM),
        ("multipart/form-data; boundary=xyz", b"nonsense"),
        ("multipart/form-data; boundary=xyz", FORM.replace(b'name="who"', b"nameless")),
    ],
)
async def test_a_malformed_form_is_a_malformed_body(content_type: str, body: bytes) -> None:
    with pytest.raises(MalformedBody, match="form"):
        await Request(from_http(body, content_type=content_type)).form()


@pytest.mark.parametrize(("separators", "max_fields"), [(4_000_000, 1000), (1001, 1000), (6, 5)])
async def test_a_form_of_separators_alone_is_refused_before_it_is_parsed(separators: int, max_fields: int) -> None:
    request = Request(from_http(b"&" * separators, content_type="application/x-www-form-urlencoded; charset=utf-8"))
    with pytest.raises(MalformedBody, match=f"a form with {separators} separators, for at most {max_fields} fields"):
        await request.form(max_fields=max_fields)


async def test_a_form_may_have_as_many_fields_as_are_allowed() -> None:
    body = b"&".join(b"a=%d" % n for n in range(1000))
    request = Request(from_http(body + b"&", content_type="application/x-www-form-urlencoded"))
    assert (await request.form()).getlist("a") == [str(n) for n in range(1000)]
    more = Request(from_http(body * 3, content_type="application/x-www-form-urlencoded"))
    assert len((await more.form(max_fields=float("inf"))).multi_items()) == 2998


async def test_a_large_form_is_parsed_off_the_loop() -> None:
    file = b"x" * 3_000_000  # above the limit that is kept in memory
    request = Request(from_http(FORM.replace(b"hello", file), content_type="multipart/form-data; boundary=xyz"))
    parsing = asyncio.ensure_future(request.form())
    await asyncio.sleep(0)
    assert not parsing.done()  # parsing on the loop would have ended, as the body is complete
    form = await parsing
    upload = form["file"]
    assert isinstance(upload, UploadFile)
    assert await upload.read() == file
    assert form["who"] == "Ada"
    assert await request.form() is form
    await request.close()
    malformed = Request(
        from_http(FORM.replace(b"xyz", b"abc") + file, content_type="multipart/form-data; boundary=xyz")
    )
    with pytest.raises(MalformedBody, match="form"):
        await malformed.form()


async def test_the_body_can_be_received_as_an_asgi_message() -> None:
    request = Request(from_http(b"abc"))
    assert await request.receive() == {"type": "http.request", "body": b"abc", "more_body": False}


def test_a_header_of_an_entry_may_hold_any_text() -> None:
    header = Header(headers=[("x-name", "Łukasz"), ("x-plain", "Zoë")], codec="none")
    request = Request(Entry("1", "", header))
    assert request.headers["x-name"].encode("latin-1").decode() == "Łukasz"
    assert request.headers["x-plain"] == "Zoë"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


paths = st.text().map(lambda path: "/" + path)
wild_headers = st.lists(st.tuples(st.text(), st.text()))


@given(st.text(), paths, st.text() | st.dictionaries(st.text(), json_values), wild_headers, st.text())
def test_every_valid_entry_makes_a_request(
    method: str, path: str, query: str | dict[str, Any], headers: list[tuple[str, str]], client: str
) -> None:
    request = Request(Entry("1", "", Header("e", method, path, {}, query, headers, client=client)))
    assert request.scope["path"] == request["path"] == path
    assert len(request.headers.raw) == len(headers)
    str(request.query_params)
    _ = request.client, request.cookies


@pytest.mark.parametrize(
    ("content_type", "said"),
    [("application/x-www-form-urlencoded", "'application/x-www-form-urlencoded'"), ("", "not declared")],
)
async def test_a_body_that_is_not_json_is_refused_with_its_content_type(content_type: str, said: str) -> None:
    with pytest.raises(MalformedBody, match=f"its content type is {said}$"):
        await Request(from_http(b"a=1", content_type=content_type)).json()


async def test_a_body_that_is_declared_as_json_is_refused_without_it() -> None:
    with pytest.raises(MalformedBody) as refused:
        await Request(from_http(b"a=1", content_type="application/json")).json()
    assert "content type" not in str(refused.value)


def test_its_repr_has_neither_header_values_nor_the_body() -> None:
    headers = [("authorization", "Bearer secret"), ("cookie", "secret")]
    entry = from_http(b'"secret"', headers=headers, content_type="application/json", query="q=1", request_id="r-1")
    entry.header.path, entry.header.path_params = "/hello/7", {"n": 7}
    request = Request(entry)
    assert repr(request) == (
        "<Request POST /hello/7, path_params={'n': 7}, query_params={'q': '1'}, content_type='application/json', "
        "body_bytes=8, request_id='r-1'>"
    )
    assert shown_in_notebook(request)[-1] == ["request_id", "r-1"]
    assert "secret" not in str(shown_in_notebook(request))
    assert repr(Request(from_handle(None))) == "<Request GET /, body_bytes=4, request_id=''>"
