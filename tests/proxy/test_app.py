import asyncio
import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from penstock.broker.registry.records import Change, EndpointRecord
from penstock.broker.wire._fields import LARGE, Pairs
from penstock.broker.wire.replies import Reply
from penstock.handles.errors import (
    BackendError,
    DeliveryLimitExceeded,
    MalformedBody,
    Overloaded,
    PenstockError,
    to_wire,
)
from tests.proxy.site import Answerer, Connected, Site, running, text
from tests.support.waiting import wait_until_async


def replying(codec: str, body: bytes = b"", status: int = 200, headers: Pairs | None = None) -> Answerer:
    return lambda entry: Reply(entry.id, status, codec, headers or [], body=body)


def failing(error: PenstockError) -> Answerer:
    return lambda entry: Reply(entry.id, error=to_wire(error))


class TestTheRequestOfABackend:
    async def test_path_parameters_are_typed(self, site: Site) -> None:
        await site.endpoint("/api/{user_id:int}/{number:float}")
        received = (await site.http.get("/api/123/3.14")).json()
        assert received["params"] == {"user_id": ["int", "123"], "number": ["float", "3.14"]}
        assert (await site.http.get("/api/abc/3.14")).status_code == 404

    async def test_method_path_query_headers_and_body_reach_the_backend(self, site: Site) -> None:
        await site.endpoint("/{x}")
        headers = [(b"X-Two", b"1"), (b"x-two", b"2"), (b"content-type", b"text/csv"), (b"x-odd", b"caf\xe9")]
        response = await site.http.post("/h%C3%A9?a=1&b=%20", content=b"1,2", headers=headers)
        received = response.json()
        assert received["endpoint"] == "e"
        assert received["method"] == "POST"
        assert received["path"] == "/hé"
        assert received["params"] == {"x": ["str", "hé"]}
        assert received["query"] == "a=1&b=%20"
        assert received["size"] == 3
        assert received["call"] == "__call__"
        assert re.fullmatch(r"127\.0\.0\.1:\d+", received["client"])
        sent = [tuple(pair) for pair in received["headers"]]
        assert [value for name, value in sent if name == "x-two"] == ["1", "2"]
        assert ("content-type", "text/csv") in sent
        assert ("x-odd", "caf\xe9") in sent

    async def test_hop_by_hop_headers_do_not_reach_the_backend(self, site: Site) -> None:
        await site.endpoint("/")
        headers = {"connection": "close, X-Mine", "x-mine": "1", "te": "trailers", "upgrade": "h2c", "x-kept": "1"}
        received = (await site.http.get("/", headers=headers)).json()
        names = {name for name, _ in received["headers"]}
        assert names.isdisjoint({"connection", "x-mine", "te", "upgrade"})
        assert {"x-kept", "host"} <= names

    async def test_no_client_can_choose_the_codec(self, site: Site) -> None:
        await site.endpoint("/")
        for content_type in ("application/python-pickle", "pickle", "application/x-pickle"):
            received = (await site.http.post("/", content=b"\x80\x04.", headers={"content-type": content_type})).json()
            assert received["codec"] == ""

    async def test_the_deadline_is_in_the_broker_s_clock(self, redis_url: str) -> None:
        async with running(redis_url, request_timeout_s=30) as site:
            await site.endpoint("/")
            seconds, _ = await site.redis.time()
            received = (await site.http.get("/")).json()
            assert 0 <= received["deadline_ms"] - (seconds + 30) * 1000 < 3000

    async def test_a_header_selects_the_method_of_the_backend(self, site: Site) -> None:
        await site.endpoint("/")
        for name in ("predict", "__call__"):
            assert (await site.http.get("/", headers={"x-serve-call-method": name})).json()["call"] == name

    @pytest.mark.parametrize("name", ["_private", "__init__", "a b", "a.b", "", "1"])
    async def test_private_methods_are_refused(self, site: Site, name: str) -> None:
        await site.endpoint("/")
        response = await site.http.get("/", headers={"x-serve-call-method": name})
        assert response.status_code == 400
        assert repr(name) in response.json()["error"]["message"]
        assert not site.started

    @pytest.mark.parametrize("headers", [{}, {"x-serve-call-method": "reset"}, {"x-serve-call-method": "__call__"}])
    async def test_methods_that_the_endpoint_does_not_offer_are_refused(
        self, site: Site, headers: dict[str, str]
    ) -> None:
        await site.endpoint("/", call_methods=("predict", "explain"))
        response = await site.http.get("/", headers=headers)
        assert response.status_code == 403
        name = headers.get("x-serve-call-method", "__call__")
        message = f"endpoint 'e' offers the methods 'predict', 'explain', not {name!r}"
        assert response.json()["error"]["message"] == message
        assert not site.started
        assert (await site.http.get("/", headers={"x-serve-call-method": "explain"})).json()["call"] == "explain"

    async def test_a_shard_key_selects_the_backend(self, site: Site) -> None:
        for name in ("a", "b"):
            await site.endpoint(None, text(name), name=name)
        both = EndpointRecord(name="both", route="/", traffic={"a": 0.5, "b": 0.5})
        await site.change(Change({}, {"both": both}))
        seen: dict[str, str] = {}
        for key in ("1", "2", "3", "4", "5", "6", "7", "8"):
            answers = {(await site.http.get("/", headers={"x-serve-shard-key": key})).text for _ in range(5)}
            assert len(answers) == 1
            seen[key] = answers.pop()
        assert set(seen.values()) == {"a", "b"}


class TestTheResponse:
    @pytest.mark.parametrize(
        ("codec", "body", "content_type"),
        [
            ("none", b"", None),
            ("text", "grüß".encode(), "text/plain; charset=utf-8"),
            ("bytes", b"\x00\xff", "application/octet-stream"),
            ("json", b'{"a":1}', "application/json"),
        ],
    )
    async def test_each_kind_of_value_has_its_content_type(
        self, site: Site, codec: str, body: bytes, content_type: str | None
    ) -> None:
        await site.endpoint("/", replying(codec, body))
        response = await site.http.get("/")
        assert response.status_code == 200
        assert response.content == body
        assert response.headers.get("content-type") == content_type
        assert response.headers["content-length"] == str(len(body))

    async def test_a_response_of_the_backend_keeps_status_headers_and_body(self, site: Site) -> None:
        headers = [("Content-Type", "image/png"), ("set-cookie", "a=1"), ("set-cookie", "b=2"), ("etag", '"x"')]
        await site.endpoint("/", replying("response", b"png", 201, headers))
        response = await site.http.get("/")
        assert response.status_code == 201
        assert response.content == b"png"
        assert response.headers["content-type"] == "image/png"
        assert response.headers.get_list("set-cookie") == ["a=1", "b=2"]

    async def test_hop_by_hop_headers_of_a_response_are_dropped(self, site: Site) -> None:
        headers = [
            ("Connection", "close, X-Gone"),
            ("x-gone", "1"),
            ("keep-alive", "timeout=5"),
            ("Transfer-Encoding", "chunked"),
            ("content-length", "999"),
            ("upgrade", "h2c"),
            ("date", "now"),
            ("x-request-id", "theirs"),
            ("x-kept", "1"),
        ]
        await site.endpoint("/", replying("response", b"body", headers=headers))
        response = await site.http.get("/", headers={"x-request-id": "ours"})
        given = dict(response.headers)
        assert given.pop("date", None) != "now"  # the server's own, where there is one
        assert given == {"content-length": "4", "x-kept": "1", "x-request-id": "ours"}

    @pytest.mark.parametrize("status", [204, 304])
    async def test_some_statuses_have_no_body(self, site: Site, status: int) -> None:
        await site.endpoint("/", replying("response", b"no", status, [("etag", '"x"')]))
        response = await site.http.get("/")
        assert (response.status_code, response.content) == (status, b"")
        assert response.headers["etag"] == '"x"'
        assert "content-length" not in response.headers

    @pytest.mark.parametrize(
        "headers", [[("x", "a\r\nset-cookie: b=1")], [("a b", "1")], [("x", "☃")], [("x\n", "1")], [("", "1")]]
    )
    async def test_headers_that_http_cannot_carry_are_an_error_of_the_backend(self, site: Site, headers: Pairs) -> None:
        await site.endpoint("/", replying("response", b"", headers=headers))
        response = await site.http.get("/")
        assert response.status_code == 500
        assert "header" in response.json()["error"]["message"]
        assert "set-cookie" not in response.headers

    async def test_a_status_that_is_not_final_is_an_error_of_the_backend(self, site: Site) -> None:
        await site.endpoint("/", replying("response", b"", 101))
        response = await site.http.get("/")
        assert response.status_code == 500
        assert "101" in response.json()["error"]["message"]

    async def test_a_value_that_only_python_can_read_is_an_error_that_names_allow_pickle(self, site: Site) -> None:
        await site.endpoint("/", replying("pickle", b"\x80\x04."))
        response = await site.http.get("/")
        assert response.status_code == 500
        message = response.json()["error"]["message"]
        assert re.search(r"is pickled, and was not read.*allow_pickle", message), message

    async def test_head_gets_the_response_without_the_body(self, site: Site) -> None:
        await site.endpoint("/", replying("text", b"hello"))
        response = await site.http.head("/")
        assert response.status_code == 200
        assert response.content == b""
        assert response.headers["content-length"] == "5"
        assert site.started[0].header.method == "HEAD"

    async def test_head_keeps_the_content_length_of_an_omitted_body(self, site: Site) -> None:
        await site.endpoint("/", replying("response", b"", headers=[("content-length", "77")]))
        assert (await site.http.head("/")).headers["content-length"] == "77"
        assert (await site.http.get("/")).headers["content-length"] == "0"


class TestErrors:
    async def test_an_unknown_route_is_a_404(self, site: Site) -> None:
        response = await site.http.get("/nowhere/☃")
        assert response.status_code == 404
        assert response.json() == {"error": {"type": "NotFound", "message": "no endpoint has a route for '/nowhere/☃'"}}

    async def test_a_method_that_is_not_allowed_is_a_405_with_allow(self, site: Site) -> None:
        await site.endpoint("/a", methods=("GET", "PUT"))
        for method in ("DELETE", "OPTIONS"):
            response = await site.http.request(method, "/a")
            assert response.status_code == 405
            assert response.headers["allow"] == "GET, HEAD, PUT"
            assert response.json()["error"]["type"] == "MethodNotAllowed"

    async def test_an_extra_slash_is_redirected(self, site: Site) -> None:
        await site.endpoint("/a/{x}")
        response = await site.http.get("/a/%C3%A9/?q=%20")
        assert response.status_code == 307
        assert response.headers["location"] == "/a/%C3%A9?q=%20"

    async def test_an_exception_of_user_code_is_a_500_without_its_traceback(self, site: Site) -> None:
        await site.endpoint("/", failing(BackendError("ZeroDivisionError", "division by zero", "Traceback: secret")))
        response = await site.http.get("/")
        assert response.status_code == 500
        assert response.json() == {"error": {"type": "ZeroDivisionError", "message": "division by zero"}}
        assert "secret" not in response.text

    async def test_the_headers_of_an_error_reach_the_client(self, site: Site) -> None:
        error = to_wire(BackendError("HTTPException", "who are you?", "", 401))
        headers = [("www-authenticate", 'Basic realm="é"'), ("content-type", "text/html"), ("retry-after", "7")]
        headers += [("connection", "x-hop"), ("x-hop", "1"), ("content-length", "1"), ("content-encoding", "gzip")]
        await site.endpoint("/", lambda entry: Reply(entry.id, 401, "none", headers, error))
        response = await site.http.get("/")
        assert (response.status_code, response.json()["error"]["message"]) == (401, "who are you?")
        assert response.headers["www-authenticate"] == 'Basic realm="é"'
        assert response.headers["retry-after"] == "7"
        assert response.headers.get_list("content-type") == ["application/json"]
        assert not {"x-hop", "content-encoding"} & set(response.headers)

    async def test_headers_of_an_error_cannot_end_the_head_early(self, site: Site) -> None:
        error = to_wire(BackendError("HTTPException", "no", "", 401))
        await site.endpoint("/", lambda entry: Reply(entry.id, 401, "none", [("x-a", "1\r\nx-b: 2")], error))
        response = await site.http.get("/")
        assert response.status_code == 500
        assert "which HTTP cannot carry" in response.json()["error"]["message"]
        assert "x-b" not in response.headers

    async def test_debug_shows_the_traceback(self, redis_url: str) -> None:
        async with running(redis_url, debug=True) as site:
            await site.endpoint("/", failing(BackendError("KeyError", "'x'", "Traceback: here")))
            assert (await site.http.get("/")).json()["error"]["traceback"] == "Traceback: here"

    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (BackendError("HTTPException", "teapot", status=418), 418),
            (BackendError("HTTPException", "not even an error", status=200), 500),
            (MalformedBody("no JSON at 7"), 400),
            (DeliveryLimitExceeded("e", "1", 3, 3), 500),
            (PenstockError("whatever"), 500),
        ],
    )
    async def test_each_error_has_its_status(self, site: Site, error: PenstockError, status: int) -> None:
        await site.endpoint("/", failing(error))
        response = await site.http.get("/")
        assert response.status_code == status
        assert set(response.json()["error"]) == {"type", "message"}

    async def test_a_full_queue_is_a_503_with_retry_after(self, site: Site) -> None:
        await site.endpoint("/", None, max_queued_requests=1)
        waiting = asyncio.ensure_future(site.http.get("/"))
        await wait_until_async(site.queued)
        response = await site.http.get("/")
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] == "Overloaded"
        assert "max_queued_requests is 1" in response.json()["error"]["message"]
        waiting.cancel()

    async def test_a_queue_without_room_for_bytes_is_a_503_with_retry_after(self, site: Site) -> None:
        await site.endpoint("/", None, max_queued_bytes=1024 * 1024)
        waiting = [asyncio.ensure_future(site.http.post("/", content=bytes(LARGE + 1))) for _ in range(3)]
        await wait_until_async(lambda: _has(site, 3))
        response = await site.http.post("/", content=bytes(LARGE + 1))
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] == "Overloaded"
        assert "max_queued_bytes is 1048576" in response.json()["error"]["message"]
        response = await site.http.post("/", content=bytes(1024 * 1024))
        assert response.status_code == 413
        assert "max_queued_bytes of 'e' is 1048576" in response.json()["error"]["message"]
        for one in waiting:
            one.cancel()
        await wait_until_async(site.is_empty)

    async def test_retry_after_is_rounded_up_to_whole_seconds(self, site: Site) -> None:
        await site.endpoint("/", failing(Overloaded("e", 5, 5, 1.2)))
        assert (await site.http.get("/")).headers["retry-after"] == "2"

    async def test_a_request_that_expires_is_a_504(self, redis_url: str) -> None:
        async with running(redis_url, request_timeout_s=0.2) as site:
            await site.endpoint("/", None)
            response = await site.http.get("/")
            assert response.status_code == 504
            assert response.json()["error"]["type"] == "RequestTimeout"
            await wait_until_async(site.is_empty)

    async def test_an_endpoint_without_its_backend_is_an_error(self, site: Site) -> None:
        await site.change(Change({}, {"e": EndpointRecord(name="e", route="/", traffic={"gone": 1.0})}))
        response = await site.http.get("/")
        assert response.json()["error"]["type"] == "BackendNotFound"

    async def test_an_exception_in_the_proxy_is_logged_and_not_shown(
        self, site: Site, caplog: pytest.LogCaptureFixture
    ) -> None:
        await site.endpoint("/")
        client = Connected(site, client=("no port",), headers=[(b"x-request-id", b"find-me")])
        await client.served
        assert client.sent[0]["status"] == 500
        assert json.loads(client.sent[1]["body"])["error"] == {
            "type": "InternalServerError",
            "message": "the proxy failed with IndexError; see its log",
        }
        assert "find-me" in caplog.text


class TestOtherScopes:
    async def test_websockets_are_closed_before_they_open(self, site: Site) -> None:
        client = Connected(site, type="websocket")
        await client.served
        assert [message["type"] for message in client.sent] == ["websocket.close"]

    async def test_lifespan_messages_are_confirmed(self, site: Site) -> None:
        messages = iter(["lifespan.startup", "lifespan.shutdown"])
        sent: list[str] = []

        async def receive() -> Any:
            return {"type": next(messages)}

        async def send(message: Any) -> None:
            sent.append(message["type"])

        await site.app({"type": "lifespan"}, receive, send)
        assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.text(st.characters(exclude_categories=[])),
    method=st.sampled_from(["GET", "POST", "HEAD", "BREW"]),
    headers=st.lists(
        st.tuples(
            st.one_of(
                st.sampled_from(
                    [b"x-request-id", b"connection", b"x-serve-shard-key", b"x-serve-call-method", b"x-any", b"host"]
                ),
                st.binary(min_size=1, max_size=5),
            ),
            st.binary(max_size=20),
        ),
        max_size=6,
    ),
)
async def test_no_request_makes_the_application_fail(
    site: Site, path: str, method: str, headers: list[tuple[bytes, bytes]]
) -> None:
    client = Connected(site, path="/" + path, method=method, headers=headers, query_string=b"\xff%zz")
    await asyncio.wait_for(client.served, 10)
    assert client.sent[0]["status"] in (200, 307, 400, 404, 405)
    assert client.sent[-1]["type"] == "http.response.body"


async def _has(site: Site, queued: int) -> bool:
    return await site.queued() == queued
