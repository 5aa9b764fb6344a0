from typing import Any

import httpx
import pytest
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.proxy.middleware import wrap
from tests.proxy.site import running, text


class Adds:
    """Adds a header to each response."""

    def __init__(self, app: ASGIApp, mark: str) -> None:
        self.app, self.mark = app, mark

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def marked(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-mark", self.mark.encode())]}
            await send(message)

        await self.app(scope, receive, marked)


class Guard(BaseHTTPMiddleware):
    """Responds to some requests itself, or raises."""

    async def dispatch(self, request: Request, call_next: Any) -> Response:
        match request.url.path:
            case "/refused":
                return PlainTextResponse("no", 401)
            case "/raised":
                raise HTTPException(403, "not you", {"WWW-Authenticate": "Basic"})
            case "/moved":
                raise HTTPException(307, "elsewhere", {"Location": "/é"})
            case "/same":
                raise HTTPException(304, headers={"ETag": '"1"'})
            case "/broken":
                raise RuntimeError("secret")
            case _:
                return await call_next(request)  # type: ignore[no-any-return]


def test_without_middlewares_the_application_is_not_wrapped() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None: ...

    assert wrap(app, ()) is app


async def test_the_first_middleware_is_outermost(redis_url: str) -> None:
    async with running(redis_url, middlewares=(Middleware(Adds, mark="a"), Middleware(Adds, mark="b"))) as site:
        await site.endpoint("/", text("x"))
        assert (await site.http.get("/")).headers.get_list("x-mark") == ["b", "a"]


async def test_middlewares_of_starlette_work(redis_url: str) -> None:
    cors = Middleware(CORSMiddleware, allow_origins=["http://here"], allow_methods=["PUT"])
    async with running(redis_url, middlewares=(cors, Middleware(GZipMiddleware, minimum_size=100))) as site:
        await site.endpoint("/", text("x" * 1000), methods=("GET", "PUT"))
        response = await site.http.get("/", headers={"origin": "http://here", "accept-encoding": "gzip"})
        assert response.headers["access-control-allow-origin"] == "http://here"
        assert response.headers["content-encoding"] == "gzip"
        assert response.text == "x" * 1000
        asked = {"origin": "http://here", "access-control-request-method": "PUT"}
        assert (await site.http.options("/", headers=asked)).status_code == 200


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        ("/", 200, "fine"),
        ("/refused", 401, "no"),
        ("/raised", 403, '{"error":{"type":"Forbidden","message":"not you"}}'),
        ("/broken", 500, '{"error":{"type":"InternalServerError","message":"a middleware failed with RuntimeError"}}'),
        ("/none", 404, '{"error":{"type":"NotFound","message":"no endpoint has a route for \'/none\'"}}'),
    ],
)
async def test_responses_of_middlewares_have_a_request_id(redis_url: str, path: str, status: int, body: str) -> None:
    async with running(redis_url, middlewares=(Middleware(Guard),)) as site:
        await site.endpoint("/", text("fine"))
        for given in ("mine", None):
            headers = {} if given is None else {"x-request-id": given}
            response: httpx.Response = await site.http.get(path, headers=headers)
            assert (response.status_code, response.text) == (status, body)
            (request_id,) = response.headers.get_list("x-request-id")
            assert request_id == given if given else request_id
            assert response.headers["content-length"] == str(len(body))


async def test_an_exception_of_a_middleware_keeps_its_headers(redis_url: str) -> None:
    async with running(redis_url, way="direct", middlewares=(Middleware(Guard),)) as site:
        await site.endpoint("/", text("fine"))
        refused = await site.http.get("/raised")
        assert (refused.status_code, refused.headers["www-authenticate"]) == (403, "Basic")
        moved = await site.http.get("/moved")
        assert (moved.status_code, moved.headers["location"]) == (307, "/é")
        same = await site.http.get("/same")
        assert (same.status_code, same.headers["etag"], same.content) == (304, '"1"', b"")
        assert "content-type" not in same.headers


async def test_the_backend_gets_the_same_request_id(redis_url: str) -> None:
    async with running(redis_url, middlewares=(Middleware(Guard),)) as site:
        await site.endpoint("/")
        response = await site.http.post("/", content=b"body")
        assert response.json()["request_id"] == response.headers["x-request-id"]
        assert response.json()["size"] == 4
