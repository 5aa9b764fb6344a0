"""Requests in an application: what it receives, what its messages become, and what its errors become."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from penstock.broker.wire.requests import Entry
from penstock.handles.errors import MalformedBody, RequestCancelled
from penstock.workers.asgi import calls
from tests.support.waiting import wait_until_async
from tests.workers.asgi.apps import body, deployed, head, http_only, sending
from tests.workers.requests import backend_error_of, error_of, from_handle, from_http
from tests.workers.running import Start

SeenScope = dict[str, Any]


async def scope_of(start: Start, entry: Entry) -> SeenScope:
    """Return the scope that an application gets for a request."""
    seen: list[SeenScope] = []

    @http_only
    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)
        await send(head())
        await send(body())

    await (await start(deployed(app))).call(entry)
    return seen[0]


class TestScope:
    async def test_it_is_that_of_the_request(self, start: Start) -> None:
        headers = [("x-a", "1"), ("x-a", "2")]
        entry = from_http(b"", method="PUT", path="/a b", query="q=1&q=2", headers=headers)
        scope = await scope_of(start, entry)
        assert (scope["type"], scope["method"], scope["path"]) == ("http", "PUT", "/a b")
        assert (scope["raw_path"], scope["query_string"], scope["root_path"]) == (b"/a%20b", b"q=1&q=2", "")
        assert scope["headers"] == [(b"host", b"example.org:8000"), (b"x-a", b"1"), (b"x-a", b"2")]
        assert (tuple(scope["client"]), scope["server"]) == (("192.0.2.7", 40000), ("example.org", 8000))
        assert scope["asgi"]["version"] == "3.0"
        assert "path_params" not in scope

    @pytest.mark.parametrize(
        ("path", "params", "root_path"),
        [
            ("/api/users/1", {"rest": "users/1"}, "/api"),
            ("/api/", {"rest": ""}, "/api"),
            ("/api//x", {"rest": "/x"}, "/api"),
            ("/x", {"rest": "x"}, ""),
            ("/outer/api/x", {"rest": "x"}, "/outer/api"),
        ],
    )
    async def test_what_precedes_the_mounted_path_is_the_root_path(
        self, start: Start, path: str, params: dict[str, str], root_path: str
    ) -> None:
        entry = from_http(path=path, path_params=params)
        entry.header.scope = {"mount": "rest"}
        scope = await scope_of(start, entry)
        assert (scope["root_path"], scope["path"]) == (root_path, path)

    async def test_the_parameters_before_the_mounted_path_stay(self, start: Start) -> None:
        entry = from_http(path="/t/7/users", path_params={"tenant": 7, "rest": "users"})
        entry.header.scope = {"mount": "rest"}
        scope = await scope_of(start, entry)
        assert (scope["root_path"], scope["path_params"]) == ("/t/7", {"tenant": 7})

    async def test_a_route_that_does_not_mount_leaves_the_path(self, start: Start) -> None:
        scope = await scope_of(start, from_http(path="/models/7", path_params={"name": "7"}))
        assert (scope["root_path"], scope["path"], scope["path_params"]) == ("", "/models/7", {"name": "7"})

    async def test_the_state_of_a_middleware_is_in_it(self, start: Start) -> None:
        entry = from_http()
        entry.header.scope = {"state": {"user": "ada"}}
        assert (await scope_of(start, entry))["state"] == {"user": "ada"}


class TestCallsOfHandles:
    async def test_the_body_is_described_by_headers(self, start: Start) -> None:
        headers = (await scope_of(start, from_handle({"n": 1})))["headers"]
        assert headers == [(b"content-type", b"application/json"), (b"content-length", b"7")]
        headers = (await scope_of(start, from_handle(b"text", codec="text")))["headers"]
        assert headers[0] == (b"content-type", b"text/plain; charset=utf-8")
        assert (await scope_of(start, from_handle(b"", codec="none")))["headers"] == []

    async def test_given_headers_stay(self, start: Start) -> None:
        entry = from_handle({"n": 1})
        entry.header.headers = [("content-type", "application/merge-patch+json")]
        headers = (await scope_of(start, entry))["headers"]
        assert headers == [(b"content-type", b"application/merge-patch+json"), (b"content-length", b"7")]

    async def test_keyword_arguments_are_the_query(self, start: Start) -> None:
        assert (await scope_of(start, from_handle(None, q="a b", n=1)))["query_string"] == b"q=a+b&n=1"

    async def test_a_pickled_body_is_refused(self, start: Start) -> None:
        replica = await start(deployed(sending(head(), body())), config={"allow_pickle": True})
        error = error_of(await replica.call(from_handle(b"pickled", codec="pickle")))
        assert isinstance(error, MalformedBody)
        assert "send None, bytes, a str or a JSON value" in str(error)

    async def test_an_application_has_no_methods(self, start: Start) -> None:
        error = backend_error_of(await (await start(deployed(sending()))).call(from_handle(call="predict")))
        assert (error.type_name, error.status) == ("AttributeError", 404)
        assert "has no method 'predict': call it with a method and a path of HTTP" in error.message


class TestResponses:
    async def test_status_headers_and_body_are_those_that_were_sent(self, start: Start) -> None:
        cookies = ((b"set-cookie", b"a=1; Path=/"), (b"set-cookie", b"b=2"))
        app = sending(head(201, *cookies, (b"x-latin", b"\xe4")), body(b"a", more=True), body(b"b", more=True), body())
        reply = await (await start(deployed(app))).call(from_http())
        assert (reply.status, reply.codec, reply.body) == (201, "response", b"ab")
        assert reply.headers == [("set-cookie", "a=1; Path=/"), ("set-cookie", "b=2"), ("x-latin", "ä")]

    async def test_names_of_headers_are_in_lower_case(self, start: Start) -> None:
        reply = await (await start(deployed(sending(head(200, (b"X-Upper", b"Kept")), body())))).call(from_http())
        assert reply.headers == [("x-upper", "Kept")]

    async def test_a_body_may_be_a_bytearray_or_a_memoryview(self, start: Start) -> None:
        app = sending(head(), body(bytearray(b"a"), more=True), body(memoryview(b"b")))
        assert (await (await start(deployed(app))).call(from_http())).body == b"ab"

    @pytest.mark.parametrize(
        ("messages", "type_name", "message"),
        [
            ((), "RuntimeError", "returned before it sent a response"),
            ((head(),), "RuntimeError", "returned before it sent the end of its body"),
            ((head(), body(b"a", more=True)), "RuntimeError", "returned before it sent the end of its body"),
            ((body(b"a"),), "RuntimeError", "cannot send 'http.response.body' before http.response.start"),
            ((head(), head()), "RuntimeError", "cannot send 'http.response.start' after http.response.start"),
            (({"type": "websocket.accept"},), "RuntimeError", "cannot send 'websocket.accept'"),
            ((head(99), body()), "ValueError", "must be an int of 200 to 599, not 99"),
            ((head("200"), body()), "ValueError", "not '200'"),
            ((head(200, ("x", "y")), body()), "TypeError", "must be bytes, not 'x': 'y'"),
            ((head(), body("text")), "TypeError", "must be bytes, not str"),
            ((head(200, (b"content-length", b"5")), body(b"abc")), "ValueError", "body of 5 bytes and has only 3"),
            ((head(200, (b"content-length", b"2")), body(b"abc")), "ValueError", "body of 2 bytes and has more than 2"),
            ((head(200, (b"content-length", b"x")), body()), "ValueError", "must be a number of bytes, not b'x'"),
            (
                (head(200, (b"content-length", b"1"), (b"content-length", b"2")), body(b"a")),
                "ValueError",
                "two lengths of its body: 1 and 2",
            ),
        ],
    )
    async def test_messages_against_the_protocol_are_errors(
        self, start: Start, messages: tuple[Any, ...], type_name: str, message: str
    ) -> None:
        reply = await (await start(deployed(sending(*messages)))).call(from_http())
        error = backend_error_of(reply)
        assert (error.type_name, error.status) == (type_name, 500)
        assert message in error.message

    @pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 304)])
    async def test_a_response_without_content_may_declare_a_length(
        self, start: Start, method: str, status: int
    ) -> None:
        app = sending(head(status, (b"content-length", b"1000")), body())
        reply = await (await start(deployed(app))).call(from_http(method=method))
        assert (reply.status, reply.headers) == (status, [("content-length", "1000")])

    async def test_a_message_after_the_response_is_refused_and_the_response_stays(
        self, start: Start, caplog: pytest.LogCaptureFixture
    ) -> None:
        reply = await (await start(deployed(sending(head(), body(b"all"), body(b"more"))))).call(from_http())
        assert (reply.status, reply.body) == (200, b"all")
        assert "cannot send 'http.response.body' after its response was complete" in caplog.text


class TestReceiving:
    async def test_the_body_comes_whole_and_then_the_end_of_the_response(self, start: Start) -> None:
        received: list[Any] = []

        @http_only
        async def app(scope: Any, receive: Any, send: Any) -> None:
            received.append(await receive())
            await send(head())
            await send(body(b"done"))
            received.append(await receive())

        assert (await (await start(deployed(app))).call(from_http(b"abc"))).body == b"done"
        assert received == [
            {"type": "http.request", "body": b"abc", "more_body": False},
            {"type": "http.disconnect"},
        ]


class TestErrors:
    async def test_an_exception_before_the_response_is_the_reply(self, start: Start) -> None:
        @http_only
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            raise KeyError("missing")

        error = backend_error_of(await (await start(deployed(app))).call(from_http()))
        assert (error.type_name, error.message, error.status) == ("KeyError", "'missing'", 500)
        assert "in app" in error.traceback
        assert "workers/asgi/calls.py" not in error.traceback

    async def test_an_exception_in_the_middle_of_a_whole_response_is_the_reply(self, start: Start) -> None:
        @http_only
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send(head())
            await send(body(b"half", more=True))
            raise RuntimeError("half way")

        assert backend_error_of(await (await start(deployed(app))).call(from_http())).message == "half way"

    @pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), StopIteration(1), GeneratorExit()])
    async def test_exceptions_that_end_programs_are_errors_of_their_request(
        self, start: Start, error: BaseException
    ) -> None:
        @http_only
        async def app(scope: Any, receive: Any, send: Any) -> None:
            raise error

        replica = await start(deployed(app))
        for _ in range(2):
            assert backend_error_of(await replica.call(from_http())).status == 500

    async def test_an_http_exception_keeps_its_status(self, start: Start) -> None:
        @http_only
        async def app(scope: Any, receive: Any, send: Any) -> None:
            raise HTTPException(418, "teapot")

        assert backend_error_of(await (await start(deployed(app))).call(from_http())).status == 418

    async def test_an_exception_after_the_response_is_logged(
        self, start: Start, caplog: pytest.LogCaptureFixture
    ) -> None:
        @http_only
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send(head(500))
            await send(body(b"Internal Server Error"))
            raise RuntimeError("as Starlette does")

        reply = await (await start(deployed(app))).call(from_http())
        assert (reply.status, reply.body, reply.error) == (500, b"Internal Server Error", None)
        assert "RuntimeError: as Starlette does" in caplog.text


def waiting(seen: list[str], release: asyncio.Event, *, heeds: bool = True) -> Callable[..., Any]:
    """Return an application that waits for its client to leave, and then for ``release``."""

    @http_only
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        seen.append("running")
        try:
            if heeds:
                seen.append((await receive())["type"])
            await release.wait()
            try:
                await send(head())
            except OSError:
                seen.append("OSError")
                raise
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    return app


class TestDisconnects:
    async def test_receive_and_send_report_that_the_client_has_left(self, start: Start) -> None:
        seen, release = list[str](), asyncio.Event()
        replica = await start(deployed(waiting(seen, release)))
        entry = from_http()
        running = replica.run(entry)
        await wait_until_async(lambda: seen)
        running.cancel(entry)
        await wait_until_async(lambda: len(seen) == 2)
        assert entry.id not in replica.replies, "the application still runs"
        release.set()
        assert isinstance(error_of(await replica.reply_to(entry)), RequestCancelled)
        assert seen == ["running", "http.disconnect", "OSError"]

    async def test_an_application_that_goes_on_is_cancelled(
        self, start: Start, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(calls, "DISCONNECT_GRACE_S", 0.01)
        seen = list[str]()
        replica = await start(deployed(waiting(seen, asyncio.Event(), heeds=False)))
        entry = from_http()
        running = replica.run(entry)
        await wait_until_async(lambda: seen)
        running.cancel(entry)
        assert isinstance(error_of(await replica.reply_to(entry)), RequestCancelled)
        assert seen == ["running", "cancelled"]

    async def test_a_request_that_is_cancelled_before_it_starts_never_runs(self, start: Start) -> None:
        seen = list[str]()
        replica = await start(deployed(waiting(seen, asyncio.Event())))
        entry = from_http()
        replica.run(entry).cancel(entry)
        assert isinstance(error_of(await replica.reply_to(entry)), RequestCancelled)
        await asyncio.sleep(0)
        assert seen == []

    async def test_a_request_whose_deadline_has_passed_never_runs(self, start: Start) -> None:
        seen = list[str]()
        replica = await start(deployed(waiting(seen, asyncio.Event())))
        replica.runner.attach(None, lambda: 2_000.0)
        entry = from_http()
        entry.header.deadline_ms = 1_000
        assert isinstance(error_of(await replica.call(entry)), RequestCancelled)
        assert seen == []

    async def test_a_disconnect_is_not_logged_as_a_failure(
        self, start: Start, caplog: pytest.LogCaptureFixture
    ) -> None:
        seen, release = list[str](), asyncio.Event()
        replica = await start(deployed(waiting(seen, release)))
        entry = from_http()
        running = replica.run(entry)
        await wait_until_async(lambda: seen)
        running.cancel(entry)
        release.set()
        await replica.reply_to(entry)
        assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


class TestStopping:
    async def test_requests_that_still_run_get_no_reply(self, start: Start) -> None:
        seen = list[str]()
        replica = await start(deployed(waiting(seen, asyncio.Event())))
        entry = from_http()
        replica.run(entry)
        await wait_until_async(lambda: seen)
        assert not await replica.runner.stop(0.01)
        assert entry.id not in replica.replies
