import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from penstock.broker.connection import Connection
from penstock.broker.figures import Tally, add
from penstock.broker.registry import Change, EndpointRecord
from penstock.broker.wire import Entry, Pairs, Reply
from penstock.handles.errors import (
    BackendError,
    DeliveryLimitExceeded,
    MalformedBody,
    Overloaded,
    PenstockError,
    to_wire,
)
from tests.proxy.site import Answerer, Site, running, text
from tests.waiting import wait_until_async


def replying(codec: str, body: bytes = b"", status: int = 200, headers: Pairs | None = None) -> Answerer:
    return lambda entry: Reply(entry.id, status, codec, headers or [], body=body)


def failing(error: PenstockError) -> Answerer:
    return lambda entry: Reply(entry.id, error=to_wire(error))


class TestTheRequestThatABackendGets:
    async def test_path_parameters_are_typed(self, site: Site) -> None:
        await site.endpoint("/api/{user_id:int}/{number:float}")
        told = (await site.http.get("/api/123/3.14")).json()
        assert told["params"] == {"user_id": ["int", "123"], "number": ["float", "3.14"]}
        assert (await site.http.get("/api/abc/3.14")).status_code == 404

    async def test_everything_that_http_says_reaches_it(self, site: Site) -> None:
        await site.endpoint("/{x}")
        headers = [(b"X-Two", b"1"), (b"x-two", b"2"), (b"content-type", b"text/csv"), (b"x-odd", b"caf\xe9")]
        response = await site.http.post("/h%C3%A9?a=1&b=%20", content=b"1,2", headers=headers)
        told = response.json()
        assert told["endpoint"] == "e"
        assert told["method"] == "POST"
        assert told["path"] == "/hé"
        assert told["params"] == {"x": ["str", "hé"]}
        assert told["query"] == "a=1&b=%20"
        assert told["size"] == 3
        assert told["call"] == "__call__"
        assert re.fullmatch(r"127\.0\.0\.1:\d+", told["client"])
        sent = [tuple(pair) for pair in told["headers"]]
        assert [value for name, value in sent if name == "x-two"] == ["1", "2"]
        assert ("content-type", "text/csv") in sent
        assert ("x-odd", "caf\xe9") in sent

    async def test_what_speaks_of_the_connection_does_not(self, site: Site) -> None:
        await site.endpoint("/")
        headers = {"connection": "close, X-Mine", "x-mine": "1", "te": "trailers", "upgrade": "h2c", "x-kept": "1"}
        told = (await site.http.get("/", headers=headers)).json()
        names = {name for name, _ in told["headers"]}
        assert names.isdisjoint({"connection", "x-mine", "te", "upgrade"})
        assert {"x-kept", "host"} <= names

    async def test_the_codec_is_never_one_that_a_client_could_choose(self, site: Site) -> None:
        await site.endpoint("/")
        for content_type in ("application/python-pickle", "pickle", "application/x-pickle"):
            told = (await site.http.post("/", content=b"\x80\x04.", headers={"content-type": content_type})).json()
            assert told["codec"] == ""

    async def test_its_deadline_is_that_of_the_broker_s_clock(self, redis_url: str) -> None:
        async with running(redis_url, request_timeout_s=30) as site:
            await site.endpoint("/")
            seconds, _ = await site.redis.time()
            told = (await site.http.get("/")).json()
            assert 0 <= told["deadline_ms"] - (seconds + 30) * 1000 < 3000

    async def test_a_method_of_its_class_may_be_named(self, site: Site) -> None:
        await site.endpoint("/")
        for name in ("predict", "__call__"):
            assert (await site.http.get("/", headers={"x-serve-call-method": name})).json()["call"] == name

    @pytest.mark.parametrize("name", ["_private", "__init__", "a b", "a.b", "", "1"])
    async def test_but_no_private_one(self, site: Site, name: str) -> None:
        await site.endpoint("/")
        response = await site.http.get("/", headers={"x-serve-call-method": name})
        assert response.status_code == 400
        assert repr(name) in response.json()["error"]["message"]
        assert not site.started

    async def test_a_shard_key_picks_the_backend(self, site: Site) -> None:
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


class TestTheAnswer:
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

    async def test_a_whole_response_stays_as_it_is(self, site: Site) -> None:
        headers = [("Content-Type", "image/png"), ("set-cookie", "a=1"), ("set-cookie", "b=2"), ("etag", '"x"')]
        await site.endpoint("/", replying("response", b"png", 201, headers))
        response = await site.http.get("/")
        assert response.status_code == 201
        assert response.content == b"png"
        assert response.headers["content-type"] == "image/png"
        assert response.headers.get_list("set-cookie") == ["a=1", "b=2"]

    async def test_but_for_what_speaks_of_a_connection(self, site: Site) -> None:
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

    async def test_a_value_that_only_python_reads_is_an_error_that_says_so(self, site: Site) -> None:
        await site.endpoint("/", replying("pickle", b"\x80\x04."))
        response = await site.http.get("/")
        assert response.status_code == 500
        assert "'pickle', which only a Python handle can read" in response.json()["error"]["message"]

    async def test_head_has_all_of_it_but_the_body(self, site: Site) -> None:
        await site.endpoint("/", replying("text", b"hello"))
        response = await site.http.head("/")
        assert response.status_code == 200
        assert response.content == b""
        assert response.headers["content-length"] == "5"
        assert site.started[0].header.method == "HEAD"

    async def test_head_has_the_length_that_a_backend_gave_for_a_body_it_left_out(self, site: Site) -> None:
        await site.endpoint("/", replying("response", b"", headers=[("content-length", "77")]))
        assert (await site.http.head("/")).headers["content-length"] == "77"
        assert (await site.http.get("/")).headers["content-length"] == "0"


class TestErrors:
    async def test_no_such_route(self, site: Site) -> None:
        response = await site.http.get("/nowhere/☃")
        assert response.status_code == 404
        assert response.json() == {"error": {"type": "NotFound", "message": "no endpoint has a route for '/nowhere/☃'"}}

    async def test_another_method(self, site: Site) -> None:
        await site.endpoint("/a", methods=("GET", "PUT"))
        for method in ("DELETE", "OPTIONS"):
            response = await site.http.request(method, "/a")
            assert response.status_code == 405
            assert response.headers["allow"] == "GET, HEAD, PUT"
            assert response.json()["error"]["type"] == "MethodNotAllowed"

    async def test_a_slash_too_many_is_mended_by_the_client(self, site: Site) -> None:
        await site.endpoint("/a/{x}")
        response = await site.http.get("/a/%C3%A9/?q=%20")
        assert response.status_code == 307
        assert response.headers["location"] == "/a/%C3%A9?q=%20"

    async def test_code_that_raised(self, site: Site) -> None:
        await site.endpoint("/", failing(BackendError("ZeroDivisionError", "division by zero", "Traceback: secret")))
        response = await site.http.get("/")
        assert response.status_code == 500
        assert response.json() == {"error": {"type": "ZeroDivisionError", "message": "division by zero"}}
        assert "secret" not in response.text

    async def test_its_traceback_is_for_debugging_only(self, redis_url: str) -> None:
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

    async def test_a_full_queue_says_when_to_come_again(self, site: Site) -> None:
        await site.endpoint("/", None, max_queued_requests=1)
        waiting = asyncio.ensure_future(site.http.get("/"))
        await wait_until_async(site.queued)
        response = await site.http.get("/")
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] == "Overloaded"
        assert "max_queued_requests is 1" in response.json()["error"]["message"]
        waiting.cancel()

    async def test_when_to_come_again_is_in_whole_seconds_rounded_up(self, site: Site) -> None:
        await site.endpoint("/", failing(Overloaded("e", 5, 5, 1.2)))
        assert (await site.http.get("/")).headers["retry-after"] == "2"

    async def test_a_deadline_that_passes(self, redis_url: str) -> None:
        async with running(redis_url, request_timeout_s=0.2) as site:
            await site.endpoint("/", None)
            response = await site.http.get("/")
            assert response.status_code == 504
            assert response.json()["error"]["type"] == "RequestTimeout"
            await wait_until_async(lambda: _is_empty(site))

    async def test_an_endpoint_whose_backend_is_gone(self, site: Site) -> None:
        await site.change(Change({}, {"e": EndpointRecord(name="e", route="/", traffic={"gone": 1.0})}))
        response = await site.http.get("/")
        assert response.json()["error"]["type"] == "BackendNotFound"

    async def test_what_fails_in_the_proxy_is_logged_and_kept_there(
        self, site: Site, caplog: pytest.LogCaptureFixture
    ) -> None:
        await site.endpoint("/")
        client = Connected(site, client=("no port",), headers=[(b"x-request-id", b"find-me")])
        await client.served
        assert client.sent[0]["status"] == 500
        assert json.loads(client.sent[1]["body"])["error"] == {
            "type": "InternalServerError",
            "message": "the proxy failed with IndexError; its log says more",
        }
        assert "find-me" in caplog.text


class TestBodies:
    async def test_small_and_large_ones_arrive_whole(self, site: Site) -> None:
        await site.endpoint("/")
        for size in (0, 1, 65_536, 300_000):
            assert (await site.http.post("/", content=b"x" * size)).json()["size"] == size

    async def test_chunked_ones_arrive_whole(self, site: Site) -> None:
        await site.endpoint("/")

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b"x" * 10

        assert (await site.http.post("/", content=chunks())).json()["size"] == 30

    async def test_one_that_says_that_it_is_too_long_is_refused_unread(self, redis_url: str) -> None:
        async with running(redis_url, max_body_bytes=10) as site:
            await site.endpoint("/")
            assert (await site.http.post("/", content=b"x" * 10)).status_code == 200

            async def unread() -> AsyncIterator[bytes]:
                yield pytest.fail("it was read")

            for length in ("11", "9" * 30):
                response = await site.http.post("/", content=unread(), headers={"content-length": length})
                assert response.status_code == 413
                assert response.headers["connection"] == "close"
                assert response.json()["error"]["type"] == "PayloadTooLarge"
                assert "max_body_bytes is 10" in response.json()["error"]["message"]
            assert len(site.started) == 1

    async def test_one_that_turns_out_to_be_too_long_is_read_no_further(self, redis_url: str) -> None:
        async with running(redis_url, max_body_bytes=10) as site:
            await site.endpoint("/")
            sent = 0

            async def chunks() -> AsyncIterator[bytes]:
                nonlocal sent
                while True:
                    sent += 1
                    yield b"x" * 4

            assert (await site.http.post("/", content=chunks())).status_code == 413
            assert sent == 3

    async def test_one_whose_length_is_no_number_is_malformed(self, redis_url: str) -> None:
        async with running(redis_url) as site:  # a server would have refused it before
            await site.endpoint("/")
            response = await site.http.post("/", content=b"x", headers={"content-length": "-1"})
            assert response.status_code == 400
            assert "'-1'" in response.json()["error"]["message"]

    async def test_one_that_does_not_come_in_time_is_given_up(self, redis_url: str) -> None:
        async with running(redis_url, request_timeout_s=0.2) as site:
            await site.endpoint("/")

            async def slow() -> AsyncIterator[bytes]:
                yield b"x" * 3
                await asyncio.sleep(60)

            response = await asyncio.wait_for(site.http.post("/", content=slow()), 5)
            assert response.status_code == 408
            assert response.headers["connection"] == "close"
            assert "3 bytes" in response.json()["error"]["message"]
            assert not site.started


class TestRequestIds:
    async def test_one_that_the_client_gives_is_echoed_and_travels(self, site: Site) -> None:
        await site.endpoint("/")
        response = await site.http.get("/", headers={"x-request-id": "abc-1 2"})
        assert response.headers.get_list("x-request-id") == ["abc-1 2"]
        assert response.json()["request_id"] == "abc-1 2"

    @pytest.mark.parametrize("given", [None, b"", b"x" * 129, b"a\tb", b"\xff", "ü".encode()])
    async def test_one_that_could_forge_a_log_line_is_replaced(self, site: Site, given: bytes | None) -> None:
        await site.endpoint("/")
        headers = {} if given is None else {b"x-request-id": given}
        response = await site.http.get("/", headers=headers)
        assert re.fullmatch(r"[0-9a-f]{16}-[0-9a-f]+", made := response.headers["x-request-id"])
        assert response.json()["request_id"] == made

    async def test_one_that_could_colour_a_terminal_is_replaced(self, redis_url: str) -> None:
        async with running(redis_url) as site:  # a server would have refused it before
            await site.endpoint("/")
            response = await site.http.get("/", headers={b"x-request-id": b"a\x1b[31m"})
            assert re.fullmatch(r"[0-9a-f]{16}-[0-9a-f]+", response.headers["x-request-id"])

    async def test_errors_and_the_proxy_s_own_pages_have_it_too(self, site: Site) -> None:
        await site.endpoint("/a")
        for method, path in [
            ("GET", "/none"),
            ("PUT", "/a"),
            ("GET", "/-/healthz"),
            ("GET", "/-/none"),
            ("GET", "/a/"),
        ]:
            response = await site.http.request(method, path, headers={"x-request-id": "me"})
            assert response.headers["x-request-id"] == "me"

    async def test_no_two_are_the_same(self, site: Site) -> None:
        made = {(await site.http.get("/")).headers["x-request-id"] for _ in range(100)}
        assert len(made) == 100


class TestItsOwnPages:
    async def test_routes(self, site: Site) -> None:
        await site.endpoint("/a/{x:int}", name="a", methods=("GET",))
        await site.endpoint("/b", name="b", methods=("POST",))
        await site.endpoint(None, name="c")
        assert (await site.http.get("/-/routes")).json() == {
            "/a/{x:int}": {"endpoint": "a", "methods": ["GET", "HEAD"]},
            "/b": {"endpoint": "b", "methods": ["POST"]},
        }

    async def test_routes_follow_the_registry(self, site: Site) -> None:
        await site.endpoint("/a", text("a"))
        assert (await site.http.get("/a")).text == "a"
        await site.change(Change({}, {"e": EndpointRecord(name="e", route="/b", traffic={"e": 1.0})}))
        assert (await site.http.get("/a")).status_code == 404
        assert (await site.http.get("/b")).text == "a"
        await site.change(Change({}, {"e": None}))
        assert (await site.http.get("/b")).status_code == 404

    async def test_health(self, site: Site) -> None:
        response = await site.http.get("/-/healthz")
        assert (response.status_code, response.text) == (200, "ok")
        site.app.draining = True
        response = await site.http.get("/-/healthz")
        assert (response.status_code, response.text) == (503, "draining")
        assert response.headers["connection"] == "close"

    async def test_metrics(self, site: Site) -> None:
        await site.endpoint("/a", name="alpha")
        for path in ("/a", "/a", "/none"):
            await site.http.get(path)
        response = await site.http.get("/-/metrics")
        assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        lines = response.text.splitlines()
        assert 'penstock_http_requests_total{endpoint="alpha",status="200"} 2' in lines
        assert 'penstock_http_requests_total{endpoint="",status="404"} 1' in lines
        assert 'penstock_http_request_duration_seconds_bucket{endpoint="alpha",le="+Inf"} 2' in lines
        assert 'penstock_http_request_duration_seconds_count{endpoint="alpha"} 2' in lines
        assert "penstock_http_requests_in_flight 0" in lines
        assert 'penstock_backend_requests_queued{backend="alpha"} 0' in lines
        assert 'penstock_backend_served_total{backend="alpha"} 0' in lines  # nobody but a replica says so
        assert (await site.http.head("/-/metrics")).headers["content-type"] == response.headers["content-type"]

    async def test_metrics_of_backends_are_the_brokers(self, site: Site) -> None:
        await site.endpoint("/a", None, name="alpha")
        pending = asyncio.create_task(site.http.get("/a"))

        async def is_queued() -> bool:
            return await site.queued("alpha") == 1

        await wait_until_async(is_queued)
        connection = await Connection(site.caller.url).open()
        try:
            await add(connection, site.keys, "alpha", Tally(3, 2, 12.5, 7, {1: 1, 4: 2}))
            await add(connection, site.keys, "alpha", Tally(1, run_ms=2.5))
        finally:
            await connection.close()
        lines = (await site.http.get("/-/metrics")).text.splitlines()
        assert [line for line in lines if line.startswith("penstock_backend_")] == [
            'penstock_backend_requests_queued{backend="alpha"} 1',
            'penstock_backend_requests_in_progress{backend="alpha"} 0',
            'penstock_backend_dead_letters{backend="alpha"} 0',
            'penstock_backend_served_total{backend="alpha"} 4',
            'penstock_backend_failed_total{backend="alpha"} 2',
            'penstock_backend_run_seconds_total{backend="alpha"} 0.015',
            'penstock_backend_batch_size_bucket{backend="alpha",le="1"} 1',
            'penstock_backend_batch_size_bucket{backend="alpha",le="4"} 3',
            'penstock_backend_batch_size_bucket{backend="alpha",le="+Inf"} 3',
            'penstock_backend_batch_size_sum{backend="alpha"} 7',
            'penstock_backend_batch_size_count{backend="alpha"} 3',
        ]
        pending.cancel()
        await asyncio.gather(pending, return_exceptions=True)

    async def test_others_are_not_there_whatever_the_routes_say(self, site: Site) -> None:
        await site.endpoint("/{rest:path}")
        assert (await site.http.get("/-/secrets")).status_code == 404
        assert (await site.http.get("/-/")).status_code == 404
        response = await site.http.post("/-/healthz")
        assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD")
        assert (await site.http.get("/x")).status_code == 200


class TestBelowAPrefix:
    async def test_it_may_be_stripped_before_us_or_not(self, redis_url: str) -> None:
        async with running(redis_url, root_path="/serve/") as site:
            await site.endpoint("/a/{x:int}")
            for path in ("/serve/a/1", "/a/1"):
                assert (await site.http.get(path)).json()["path"] == "/serve/a/1"
            assert (await site.http.get("/serve/a/1/")).headers["location"] == "/serve/a/1"
            assert (await site.http.get("/serve/-/healthz")).status_code == 200
            assert (await site.http.get("/served/a/1")).status_code == 404


class Connected:
    """An ASGI server's side of one request, whose client hangs up when a test says so."""

    def __init__(self, site: Site, **scope: Any) -> None:
        self.gone = asyncio.Event()
        self.sent: list[Any] = []
        self.received = 0
        base: dict[str, Any] = {
            "type": "http",
            "method": "GET",
            "path": "/",
            "query_string": b"",
            "headers": [],
            "client": None,
        }
        self.served = asyncio.ensure_future(site.app({**base, **scope}, self.receive, self.send))

    async def receive(self) -> Any:
        self.received += 1
        if self.received == 1:
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)


class TestAClientThatHangsUp:
    async def test_while_its_request_waits_it_is_never_started(self, site: Site) -> None:
        await site.endpoint("/", None)
        client = Connected(site)
        await wait_until_async(site.queued)
        client.gone.set()
        await asyncio.wait_for(client.served, 5)
        await wait_until_async(lambda: _is_empty(site))
        assert client.sent == []
        assert 'status="499"} 1' in site.app.metrics.render()

    async def test_costs_nothing_while_answers_are_fast(self, site: Site) -> None:
        await site.endpoint("/", text("fast"))
        client = Connected(site)
        await asyncio.wait_for(client.served, 5)
        assert client.received == 0

    async def test_in_the_middle_of_its_body_is_told_nothing(self, site: Site) -> None:
        await site.endpoint("/")

        async def receive() -> Any:
            return {"type": "http.disconnect"}

        client = Connected(site, method="GET")
        await client.served
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "query_string": b"",
            "headers": [(b"content-length", b"5")],
            "client": None,
        }
        await site.app(scope, receive, send)
        assert sent == []
        assert len(site.started) == 1

    async def test_a_request_whose_task_is_cancelled_is_withdrawn(self, site: Site) -> None:
        await site.endpoint("/", None)
        client = Connected(site)
        await wait_until_async(site.queued)
        client.served.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client.served
        await wait_until_async(lambda: _is_empty(site))

    async def test_leaves_no_task_behind(self, site: Site) -> None:
        release = asyncio.Event()

        async def later(entry: Entry) -> Reply:
            await release.wait()
            return Reply(entry.id)

        await site.endpoint("/", later)
        clients = [Connected(site) for _ in range(20)]
        await wait_until_async(lambda: all(client.received == 2 for client in clients))
        release.set()
        await asyncio.gather(*(client.served for client in clients))
        await wait_until_async(lambda: not any("_watch" in repr(task) for task in asyncio.all_tasks()))
        assert all(client.sent[0]["status"] == 200 for client in clients)


class TestOtherScopes:
    async def test_websockets_are_closed_before_they_open(self, site: Site) -> None:
        client = Connected(site, type="websocket")
        await client.served
        assert [message["type"] for message in client.sent] == ["websocket.close"]

    async def test_lifespan_is_answered(self, site: Site) -> None:
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
async def test_nothing_that_a_client_sends_makes_it_fail(
    site: Site, path: str, method: str, headers: list[tuple[bytes, bytes]]
) -> None:
    client = Connected(site, path="/" + path, method=method, headers=headers, query_string=b"\xff%zz")
    await asyncio.wait_for(client.served, 10)
    assert client.sent[0]["status"] in (200, 307, 400, 404, 405)
    assert client.sent[-1]["type"] == "http.response.body"


async def _is_empty(site: Site) -> bool:
    return await site.queued() == 0
