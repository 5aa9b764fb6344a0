"""Applications behind a proxy: a FastAPI application in a real replica, and raw ones for what FastAPI never does."""

import asyncio
import itertools
import json
import socket
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager
from functools import partial
from typing import Annotated, Any

import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, File, Form, HTTPException, Request, Response, UploadFile
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from pydantic import BaseModel
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware

from penstock.broker.registry.records import Change, EndpointRecord, RetrySpec
from penstock.handles import ServeHandle, connect
from penstock.serve import ALL_METHODS, asgi, get_current_backend_tag
from tests.handles.site import INSTANCE, Site
from tests.proxy.pages.submitting import Proxies, proxies
from tests.support.brokers import Brokers, clean
from tests.support.waiting import wait_until
from tests.workers.asgi.apps import App, body, head, http_only, sending


class Item(BaseModel):
    name: str
    price: float


class Events:
    """The events of an application in their order, and gates that it waits at."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.gate = threading.Event()


def fastapi_app(events: Events) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[dict[str, Any]]:
        yield {"greeting": "hello"}

    app = FastAPI(lifespan=lifespan)

    def current_user(request: Request) -> str:
        if (user := request.headers.get("x-user")) is None:
            raise HTTPException(401, "who are you?", headers={"WWW-Authenticate": "Basic"})
        return user

    @app.post("/items")
    async def create(item: Item) -> dict[str, Any]:
        return {"total": item.price * 2, "name": item.name}

    @app.get("/sync/{n}")
    def sync(n: int, q: str = "") -> dict[str, Any]:
        return {"n": n, "q": q, "thread": threading.current_thread() is not threading.main_thread()}

    @app.get("/me")
    async def me(request: Request, user: Annotated[str, Depends(current_user)]) -> dict[str, Any]:
        return {"user": user, "greeting": request.state.greeting, "backend": get_current_backend_tag()}

    @app.get("/count")
    async def count(n: int) -> StreamingResponse:
        async def numbers() -> AsyncIterator[str]:
            try:
                for i in range(n):
                    yield f"{i}\n"
                    if i == 0 and n > 3:
                        events.done.append("first")
                events.done.append("all")
            finally:
                events.done.append("closed")

        return StreamingResponse(numbers(), media_type="text/plain")

    @app.post("/upload")
    async def upload(file: Annotated[UploadFile, File()], note: Annotated[str, Form()]) -> dict[str, Any]:
        return {"name": file.filename, "bytes": len(await file.read()), "note": note}

    @app.get("/cookies")
    async def cookies(response: Response) -> None:
        response.set_cookie("a", "1")
        response.set_cookie("b", "2")
        response.status_code = 202
        response.headers["x-note"] = "kept"

    @app.get("/where", name="where")
    async def where(request: Request) -> dict[str, str]:
        return {"url": str(request.url_for("where")), "root": request.scope["root_path"]}

    @app.get("/moved")
    async def moved() -> RedirectResponse:
        return RedirectResponse("/elsewhere", status_code=303)

    @app.get("/fails")
    async def fails() -> None:
        raise ValueError("no such luck")

    @app.get("/breaks")
    async def breaks() -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"half"
            assert await asyncio.to_thread(events.gate.wait, 30)
            raise ValueError("no such luck")

        return StreamingResponse(chunks())

    @app.get("/later")
    async def later(tasks: BackgroundTasks) -> dict[str, str]:
        def work() -> None:
            assert events.gate.wait(30)
            events.done.append("worked")

        tasks.add_task(work)
        return {"status": "accepted"}

    return app


@pytest.fixture
def events() -> Iterator[Events]:
    events = Events()
    yield events
    events.gate.set()


@pytest.fixture(scope="module")
def site(brokers: Brokers) -> Iterator[Site]:
    """One for all tests, as is the proxy: each test has a backend and a route of its own."""
    with clean(brokers.url("embedded")) as url:
        site = Site(url)
        yield site
        site.close()


@pytest.fixture(scope="module")
def started(site: Site) -> Iterator[Proxies]:
    with proxies(site.url) as started:
        yield started


@pytest.fixture(scope="module")
def http(started: Proxies) -> Iterator[httpx.Client]:
    """A client of the proxy."""
    with httpx.Client(base_url=started.start(), timeout=30) as http:
        yield http


class Mounted:
    """An application below a route of its own, and its backend."""

    numbers = itertools.count(1)

    def __init__(
        self, site: Site, http: httpx.Client, app: App | FastAPI, route: str = "/{path:path}", **config: Any
    ) -> None:
        self.site, self._http = site, http
        self.tag = f"api{next(self.numbers)}"
        self.prefix = f"/{self.tag}"
        self._route = self.prefix + route
        site.serve(asgi(app), self.tag, tag=self.tag, **config)
        endpoint = EndpointRecord(name=self.tag, route=self._route, methods=ALL_METHODS, traffic={self.tag: 1.0})
        site.change(Change(endpoints={self.tag: endpoint}))
        self.wait_until_routed(http)

    def wait_until_routed(self, http: httpx.Client) -> None:
        wait_until(lambda: self._route in http.get("/-/routes").json())

    @property
    def unsettled(self) -> int:
        return self.site.depth(self.tag)

    def get(self, path: str = "/", **options: Any) -> httpx.Response:
        return self._http.get(self.prefix + path, **options)

    def post(self, path: str = "/", **options: Any) -> httpx.Response:
        return self._http.post(self.prefix + path, **options)

    def request(self, method: str, path: str = "/", **options: Any) -> httpx.Response:
        return self._http.request(method, self.prefix + path, **options)

    def stream(self, path: str = "/", **options: Any) -> AbstractContextManager[httpx.Response]:
        return self._http.stream("GET", self.prefix + path, **options)


Mount = Callable[..., Mounted]


@pytest.fixture
def mount(site: Site, http: httpx.Client) -> Mount:
    return partial(Mounted, site, http)


@pytest.fixture
def api(mount: Mount, events: Events) -> Mounted:
    """The FastAPI application."""
    return mount(fastapi_app(events))


class TestFastAPI:
    def test_bodies_are_validated(self, api: Mounted) -> None:
        assert api.post("/items", json={"name": "a", "price": 1.5}).json() == {"total": 3.0, "name": "a"}
        response = api.post("/items", json={"name": "a"})
        assert response.status_code == 422
        assert response.json()["detail"][0]["loc"] == ["body", "price"]
        assert api.post("/items", content=b"{", headers={"content-type": "application/json"}).status_code == 422

    def test_path_and_query_parameters_arrive_in_sync_functions(self, api: Mounted) -> None:
        assert api.get("/sync/7", params={"q": "ä b"}).json() == {"n": 7, "q": "ä b", "thread": True}
        assert api.get("/sync/seven").status_code == 422

    def test_dependencies_and_the_state_of_the_lifespan(self, api: Mounted) -> None:
        assert api.get("/me", headers={"x-user": "ada"}).json() == {
            "user": "ada",
            "greeting": "hello",
            "backend": api.tag,
        }
        response = api.get("/me")
        assert (response.status_code, response.headers["www-authenticate"]) == (401, "Basic")
        assert response.json() == {"detail": "who are you?"}

    def test_the_documentation_finds_its_schema_below_the_route(self, api: Mounted) -> None:
        page = api.get("/docs")
        assert page.headers["content-type"].startswith("text/html")
        assert f"url: '{api.prefix}/openapi.json'" in page.text
        schema = api.get("/openapi.json").json()
        assert "/items" in schema["paths"]
        assert schema["servers"] == [{"url": api.prefix}]

    def test_urls_that_it_makes_lead_back_to_it(self, api: Mounted, http: httpx.Client) -> None:
        made = api.get("/where").json()
        assert made == {"url": f"{http.base_url}{api.prefix}/where", "root": api.prefix}
        assert http.get(made["url"]).status_code == 200

    def test_uploads(self, api: Mounted) -> None:
        content = bytes(range(256)) * 4096
        response = api.post("/upload", files={"file": ("a.bin", content)}, data={"note": "n"})
        assert response.json() == {"name": "a.bin", "bytes": len(content), "note": "n"}

    def test_responses_stream(self, api: Mounted, events: Events) -> None:
        with api.stream("/count", params={"n": 3}) as response:
            assert "".join(response.iter_text()) == "0\n1\n2\n"
        wait_until(lambda: events.done == ["all", "closed"])

    def test_status_headers_and_repeated_cookies_pass_unchanged(self, api: Mounted) -> None:
        response = api.get("/cookies")
        assert (response.status_code, response.headers["x-note"]) == (202, "kept")
        assert response.headers.get_list("set-cookie") == ["a=1; Path=/; SameSite=lax", "b=2; Path=/; SameSite=lax"]
        moved = api.get("/moved")
        assert (moved.status_code, moved.headers["location"]) == (303, "/elsewhere")

    def test_its_own_404_and_405(self, api: Mounted) -> None:
        assert (api.get("/nothing").status_code, api.get("/nothing").json()) == (404, {"detail": "Not Found"})
        response = api.request("PUT", "/items")
        assert (response.status_code, response.headers["allow"]) == (405, "POST")

    def test_the_route_without_its_slash_redirects(self, api: Mounted) -> None:
        response = api.get("")
        assert (response.status_code, response.headers["location"]) == (307, f"{api.prefix}/")

    def test_head_and_options(self, mount: Mount) -> None:
        app = FastAPI()
        app.add_middleware(CORSMiddleware, allow_origins=["https://example.org"])

        @app.api_route("/x", methods=["GET", "HEAD"])
        async def x() -> JSONResponse:
            return JSONResponse({"a": 1})

        api = mount(app)
        response = api.request("HEAD", "/x")
        assert (response.status_code, response.content) == (200, b"")
        assert response.headers["content-length"] == str(len(api.get("/x").content))
        asked = {"origin": "https://example.org", "access-control-request-method": "GET"}
        response = api.request("OPTIONS", "/x", headers=asked)
        assert response.headers["access-control-allow-origin"] == "https://example.org"

    def test_an_exception_gets_the_response_of_the_framework(
        self, api: Mounted, caplog: pytest.LogCaptureFixture
    ) -> None:
        response = api.get("/fails")
        assert (response.status_code, response.text) == (500, "Internal Server Error")
        wait_until(lambda: "ValueError: no such luck" in caplog.text)

    def test_a_response_that_breaks_off_never_looks_complete(self, api: Mounted, events: Events) -> None:
        with api.stream("/breaks") as response:
            chunks = response.iter_bytes()
            assert next(chunks) == b"half"
            events.gate.set()
            with pytest.raises(httpx.RemoteProtocolError):
                next(chunks)

    def test_middlewares_of_the_application(self, mount: Mount) -> None:
        app = FastAPI()
        app.add_middleware(GZipMiddleware, minimum_size=100)

        async def tag(request: Request, call_next: Any) -> Any:
            response = await call_next(request)
            response.headers["x-tag"] = "seen"
            return response

        app.add_middleware(BaseHTTPMiddleware, dispatch=tag)

        @app.get("/long")
        async def long() -> JSONResponse:
            return JSONResponse({"text": "a" * 1000})

        api = mount(app)
        response = api.get("/long")
        assert (response.headers["content-encoding"], response.headers["x-tag"]) == ("gzip", "seen")
        assert response.json() == {"text": "a" * 1000}


class TestBackgroundTasks:
    def test_the_response_precedes_them_and_the_request_is_settled_after_them(
        self, api: Mounted, site: Site, events: Events
    ) -> None:
        assert api.get("/later").json() == {"status": "accepted"}
        assert api.unsettled == 1
        assert events.done == []
        events.gate.set()
        wait_until(lambda: api.unsettled == 0)
        assert events.done == ["worked"]

    def test_the_result_of_a_submitted_request_follows_them(
        self, api: Mounted, http: httpx.Client, events: Events
    ) -> None:
        submitted = api.get("/later", headers={"prefer": "respond-async"})
        assert submitted.status_code == 202
        result = submitted.headers["location"] + "/result"
        assert http.get(result).status_code == 202
        events.gate.set()
        wait_until(lambda: http.get(result).status_code == 200)
        assert http.get(result).json() == {"status": "accepted"}
        assert events.done == ["worked"]

    def test_a_streamed_response_may_have_some(self, mount: Mount, events: Events) -> None:
        app = FastAPI()

        @app.get("/")
        async def stream(tasks: BackgroundTasks) -> StreamingResponse:
            async def chunks() -> AsyncIterator[bytes]:
                yield b"a"
                await asyncio.sleep(0.005)
                yield b"b"

            def work() -> None:
                assert events.gate.wait(30)
                events.done.append("worked")

            tasks.add_task(work)
            return StreamingResponse(chunks(), background=tasks)

        api = mount(app)
        assert api.get("/").content == b"ab"
        assert api.unsettled == 1
        events.gate.set()
        wait_until(lambda: api.unsettled == 0)
        assert events.done == ["worked"]


class TestClients:
    def test_a_client_that_leaves_ends_a_streamed_response(self, api: Mounted, events: Events) -> None:
        with api.stream("/count", params={"n": 10_000_000}) as response:
            next(response.iter_bytes())
        wait_until(lambda: events.done == ["first", "closed"])

    def test_a_client_that_leaves_is_reported_to_the_application(self, mount: Mount, http: httpx.Client) -> None:
        seen: list[str] = []

        @http_only
        async def app(scope: Any, receive: Any, send: Any) -> None:
            seen.append((await receive())["type"])
            seen.append((await receive())["type"])

        api = mount(app)
        with socket.create_connection((http.base_url.host, http.base_url.port or 80)) as client:
            client.sendall(f"GET {api.prefix}/ HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            wait_until(lambda: seen == ["http.request"])
        wait_until(lambda: seen == ["http.request", "http.disconnect"])
        wait_until(lambda: api.unsettled == 0)

    def test_a_request_that_takes_too_long_is_answered_and_ends(self, mount: Mount, started: Proxies) -> None:
        seen: list[str] = []

        @http_only
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            seen.append((await receive())["type"])

        api = mount(app)
        with httpx.Client(base_url=started.start(request_timeout_s=1), timeout=30) as client:
            api.wait_until_routed(client)
            assert client.get(api.prefix + "/").status_code == 504
        wait_until(lambda: seen == ["http.disconnect"])

    def test_a_handshake_of_a_websocket_is_refused_with_a_sentence(self, api: Mounted) -> None:
        handshake = {
            "connection": "Upgrade",
            "upgrade": "websocket",
            "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
            "sec-websocket-version": "13",
        }
        response = api.get("/ws", headers=handshake)
        assert response.status_code == 501
        assert response.json()["error"]["type"] == "WebSocketRefused"
        assert response.json()["error"]["message"].startswith("WebSockets are not served here")
        assert api.request("OPTIONS", "/me", headers=handshake).status_code == 405
        assert api.post("/items", headers=handshake, json={"name": "a", "price": 1}).status_code == 200


class TestRoutes:
    @pytest.mark.parametrize(
        ("route", "path", "root_path", "params"),
        [
            ("/{path:path}", "/a/b", "{prefix}", {}),
            ("/v1/{tenant:int}/{rest:path}", "/v1/7/a/b", "{prefix}/v1/7", {"tenant": 7}),
            ("/models/{name}", "/models/m", "", {"name": "m"}),
            ("/fixed", "/fixed", "", {}),
        ],
    )
    def test_the_route_decides_what_the_root_path_is(
        self, mount: Mount, route: str, path: str, root_path: str, params: dict[str, Any]
    ) -> None:
        api = mount(show_scope, route)
        root_path = root_path.format(prefix=api.prefix)
        assert api.get(path).json() == {"root_path": root_path, "path": api.prefix + path, "params": params}

    def test_the_root_path_of_the_server_precedes_it(self, mount: Mount, started: Proxies) -> None:
        api = mount(show_scope)
        root_path = f"/outer{api.prefix}"
        with httpx.Client(base_url=started.start(root_path="/outer"), timeout=30) as client:
            api.wait_until_routed(client)
            whole: dict[str, Any] = {"root_path": root_path, "path": f"{root_path}/x", "params": {}}
            assert client.get(f"{root_path}/x").json() == whole
            assert client.get(f"{api.prefix}/x").json() == whole


@http_only
async def show_scope(scope: Any, receive: Any, send: Any) -> None:
    shown = {"root_path": scope["root_path"], "path": scope["path"], "params": scope.get("path_params", {})}
    await send(head(200, (b"content-type", b"application/json")))
    await send(body(json.dumps(shown).encode()))


class TestLengthsThatLie:
    def test_a_streamed_body_that_is_too_short_breaks_off(self, mount: Mount) -> None:
        @http_only
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send(head(200, (b"content-length", b"10")))
            for _ in range(3):
                await send(body(b"ab", more=True))
                await asyncio.sleep(0.005)
            await send(body())

        api = mount(app)
        with pytest.raises(httpx.RemoteProtocolError):
            api.get("/")

    def test_a_streamed_body_that_is_too_long_ends_at_its_declared_length(self, mount: Mount) -> None:
        @http_only
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send(head(200, (b"content-length", b"3")))
            await send(body(b"abc", more=True))
            await asyncio.sleep(0.005)
            await send(body(b"HTTP/1.1 200 OK\r\n"))

        api = mount(app)
        assert api.get("/").content == b"abc"

    def test_a_whole_body_of_another_length_is_an_error(self, mount: Mount) -> None:
        api = mount(sending(head(200, (b"content-length", b"10")), body(b"abc")))
        response = api.get("/")
        assert response.status_code == 500
        assert "body of 10 bytes and has only 3" in response.json()["error"]["message"]


class TestHandles:
    @pytest.fixture
    def handle(self, api: Mounted) -> Iterator[ServeHandle]:
        with connect(api.site.url, INSTANCE) as connection:
            yield connection.get_handle(api.tag)

    def test_a_call_has_method_path_query_and_body(self, handle: ServeHandle) -> None:
        items = handle.options(http_method="POST", http_path="/items")
        assert items.remote({"name": "a", "price": 2}).result(20).json() == {"total": 4.0, "name": "a"}
        sync = handle.options(http_path="/sync/3")
        assert sync.remote(q="x").result(20).json()["q"] == "x"

    def test_a_refusal_of_the_application_is_a_value(self, handle: ServeHandle) -> None:
        response = handle.options(http_path="/nothing").remote().result(20)
        assert (response.status_code, response.json()) == (404, {"detail": "Not Found"})

    def test_a_streamed_response_is_whole_unless_the_call_streams(self, handle: ServeHandle) -> None:
        count = handle.options(http_path="/count")
        assert count.remote(n=3).result(20).body == b"0\n1\n2\n"
        assert b"".join(count.options(stream=True).remote(n=3)) == b"0\n1\n2\n"


class TestRetries:
    def test_an_exception_that_the_framework_answers_is_retried_all_the_same(self, mount: Mount) -> None:
        app = FastAPI()
        attempts: list[int] = []

        @app.get("/")
        async def flaky(succeed_at: int) -> dict[str, int]:
            attempts.append(1)
            if len(attempts) < succeed_at:
                raise ConnectionError("not yet")
            return {"attempts": len(attempts)}

        api = mount(app, retry=RetrySpec(max_attempts=3, on=("ConnectionError",), backoff_s=0.01))
        assert api.get(params={"succeed_at": 3}).json() == {"attempts": 3}
        attempts.clear()
        response = api.get(params={"succeed_at": 9})
        assert (response.status_code, response.text, len(attempts)) == (500, "Internal Server Error", 3)
