"""HTTP options: location, port, middlewares and limits."""

from __future__ import annotations

from collections.abc import Callable

from httpx import Client as HTTPClient
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock import serve
from tests.serve.backends import SMALL, answering

StartClient = Callable[..., serve.Client]


class Stamp:
    def __init__(self, app: ASGIApp, mark: str) -> None:
        self.app, self.mark = app, mark

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def stamped(message: dict[str, object]) -> None:
            if message["type"] == "http.response.start":
                headers = message["headers"]
                assert isinstance(headers, list)
                message = {**message, "headers": [*headers, (b"x-stamp", self.mark.encode())]}
            await send(message)

        await self.app(scope, receive, stamped)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_without_a_server_there_is_no_url(client: serve.Client) -> None:
    assert client.http_url is None
    assert client.status()["proxies"] == {}


def test_every_node_has_its_proxies_and_they_share_the_port(start: StartClient) -> None:
    client = start(http_options={"port": 0, "location": "EveryNode", "proxies_per_node": 2})
    proxies = client.status()["proxies"].values()
    assert {proxy["url"] for proxy in proxies} == {client.http_url}
    assert len({proxy["pid"] for proxy in proxies}) == 2


def test_middlewares_and_limits_are_applied(start: StartClient) -> None:
    options = serve.HTTPOptions(
        port=0, middlewares=[Middleware(Stamp, mark="seen")], max_body_bytes=10, root_path="/api", request_timeout_s=0.5
    )
    client = start(http_options=options)
    client.create_backend("f", answering("here"), ray_actor_options=SMALL)
    client.create_endpoint("e", backend="f", route="/e", methods=["POST"])
    with HTTPClient(base_url=str(client.http_url)) as http:
        answer = http.post("/api/e", content=b"short")
        assert (answer.text, answer.headers["x-stamp"]) == ("here", "seen")
        assert http.post("/e", content=b"much too long").status_code == 413


def test_tracebacks_are_shown_only_with_debug(start: StartClient) -> None:
    def fails(request: serve.Request) -> None:
        raise RuntimeError("deep inside")

    for debug in (True, False):
        client = start(http_options={"port": 0, "debug": debug}, instance=f"debug-{debug}")
        client.create_backend("f", fails, ray_actor_options=SMALL)
        client.create_endpoint("e", backend="f", route="/e")
        with HTTPClient() as http:
            answer = http.get(f"{client.http_url}/e")
        assert answer.status_code == 500
        assert ("in fails" in answer.text) is debug
