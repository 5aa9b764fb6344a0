"""Trace context: from callers through the stream into replicas, and into the calls that their code makes."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from penstock import handles, serve
from penstock.handles.calls import tracing
from penstock.handles.connection import Connection
from penstock.handles.errors import ConfigError
from penstock.proxy.proxy import Proxy
from tests.handles.site import INSTANCE, Site

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


def seen(request: Any) -> Any:
    """Code of a backend that answers with the trace context of its request."""
    return request.headers.get("traceparent")


def test_the_trace_context_of_a_handle_reaches_the_replica(site: Site, connected: Connection) -> None:
    site.serve(seen)
    handle = connected.get_handle("ask")
    assert handle.remote().result(20) is None
    assert handle.options(http_headers={"Traceparent": TRACEPARENT}).remote().result(20) == TRACEPARENT


async def test_the_trace_context_of_http_reaches_the_replica(site: Site) -> None:
    await asyncio.to_thread(site.serve, seen)
    await asyncio.to_thread(site.declare, route="/ask")
    proxy = Proxy(site.url, INSTANCE, "p", {"port": 0})
    url = (await proxy.ready())["url"]
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"{url}/ask", headers={"traceparent": TRACEPARENT})).text == TRACEPARENT
    await proxy.drain(0.2)


@pytest.mark.parametrize("kind", ["blocking", "async", "generator", "application"])
def test_calls_that_code_makes_belong_to_the_trace_of_its_request(site: Site, connected: Connection, kind: str) -> None:
    site.serve(seen, "inner", tag="inner")

    def blocking(request: Any) -> Any:
        with handles.connect(site.url, INSTANCE) as connection:
            return connection.get_handle("inner").remote().result(20)

    async def asynchronous(request: Any) -> Any:
        return await (await connected.get_handle("inner", sync=False).remote())

    def generator(request: Any) -> Any:
        yield blocking(request)

    async def endpoint(request: Any) -> JSONResponse:
        return JSONResponse(await asynchronous(request))

    application = serve.asgi(Starlette(routes=[Route("/", endpoint)]))
    kinds: dict[str, Any] = {
        "blocking": blocking,
        "async": asynchronous,
        "generator": generator,
        "application": application,
    }
    site.serve(kinds[kind], "outer", tag="outer")
    outer = connected.get_handle("outer")
    for traceparent in (TRACEPARENT, None):
        headers = {} if traceparent is None else {"traceparent": traceparent}
        if kind == "generator":
            assert list(outer.options(http_headers=headers, stream=True).remote()) == [traceparent]
        elif kind == "application":
            assert outer.options(http_headers=headers).remote().result(20).json() == traceparent
        else:
            assert outer.options(http_headers=headers).remote().result(20) == traceparent


def test_items_of_a_batch_belong_to_the_trace_in_which_it_was_made(site: Site, connected: Connection) -> None:
    site.serve(seen)

    def score(request: Any) -> Any:
        with handles.connect(site.url, INSTANCE) as connection:
            return [result.value for result in connection.batch("ask").map([1, 2])]

    site.serve(score, "score", tag="score")
    handle = connected.get_handle("score").options(http_headers={"traceparent": TRACEPARENT})
    assert handle.remote().result(20) == [TRACEPARENT] * 2


def test_a_malformed_trace_context_is_not_passed_on(site: Site, connected: Connection) -> None:
    site.serve(seen, "inner", tag="inner")

    def outer(request: Any) -> Any:
        with handles.connect(site.url, INSTANCE) as connection:
            return connection.get_handle("inner").remote().result(20)

    site.serve(outer, "outer", tag="outer")
    for malformed in ("", "00-zz", f"00-{'0' * 32}-b7ad6b7169203331-01"):
        headers = {"traceparent": malformed}
        assert connected.get_handle("outer").options(http_headers=headers).remote().result(20) is None


@pytest.mark.parametrize("value", ["no.such.module:setup", "sys:no_such_function", "nonsense"])
def test_a_wrong_setting_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setattr(tracing, "spans", None)
    with pytest.raises(ConfigError, match=f"PENSTOCK_TRACES is '{value}'"):
        tracing.configure("tests", value)
