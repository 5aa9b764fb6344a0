"""Applications as code to deploy: what is accepted, and what is refused by name."""

from __future__ import annotations

import functools
from collections.abc import Awaitable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint

from penstock.broker.registry.records import BackendSpec
from penstock.handles.errors import BackendError, ConfigError
from penstock.serve import ALL_METHODS, asgi
from penstock.workers.executing.runner import Runner
from penstock.workers.executing.user_code import LoadedCode, dump
from tests.workers.asgi.apps import body, head
from tests.workers.requests import from_http
from tests.workers.running import Start


async def raw(scope: Any, receive: Any, send: Any) -> None:
    await send(head())
    await send(body(b"raw"))


class Instance:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await raw(scope, receive, send)

    async def bound(self, scope: Any, receive: Any, send: Any) -> None:
        await raw(scope, receive, send)


async def with_settings(settings: str, scope: Any, receive: Any, send: Any) -> None:
    await raw(scope, receive, send)


def not_async(scope: Any, receive: Any, send: Any) -> Awaitable[None]:
    return raw(scope, receive, send)


module_app = Instance()


@pytest.mark.parametrize(
    "app",
    [raw, Instance(), Instance().bound, functools.partial(with_settings, "s"), not_async, f"{__name__}:module_app"],
)
async def test_anything_that_is_called_as_an_application_is_one(start: Start, app: Any) -> None:
    assert (await (await start(asgi(app))).call(from_http())).body == b"raw"


class Page(HTTPEndpoint):
    async def get(self, request: Any) -> Any:
        from starlette.responses import PlainTextResponse

        return PlainTextResponse("a class")


async def test_a_class_whose_instances_are_awaited_is_an_application(start: Start) -> None:
    assert (await (await start(asgi(Page))).call(from_http(method="GET"))).body == b"a class"


def wsgi(environ: Any, start_response: Any) -> None: ...
def asgi2(scope: Any) -> None: ...
def factory() -> None: ...
def unary(request: Any) -> None: ...


@pytest.mark.parametrize(
    ("app", "message"),
    [
        (3, "a int cannot be called"),
        (None, "a NoneType cannot be called"),
        (Instance, "Instance is a class: pass an instance of it"),
        (wsgi, "a WSGI application is wrapped first"),
        (asgi2, "an ASGI 2 application is wrapped first"),
        (factory, "a function that makes the application is called first"),
        (unary, r"takes scope, receive and send; .*unary has the signature \(request: 'Any'\)"),
    ],
)
def test_anything_else_is_refused_by_name(app: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        asgi(app)


def test_a_malformed_import_path_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must look like 'package\.module:Name'"):
        asgi("web.api")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"{__name__}:factory", "a function that makes the application is called first"),
        (f"{__name__}:nothing", "has no attribute 'nothing'"),
        ("tests.no_such_module:app", "No module named 'tests.no_such_module'"),
    ],
)
async def test_a_path_that_leads_to_no_application_fails_the_replica(path: str, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        await Runner.start("b", "b#1", dump(asgi(path)), BackendSpec())


def test_an_application_behind_a_plain_import_path_is_refused_with_the_way_out() -> None:
    with pytest.raises(TypeError, match=r"deploy it as serve\.asgi\('.*:module_app'\)"):
        LoadedCode.load(dump(f"{__name__}:module_app"))


async def test_a_configuration_for_other_code_fails_the_replica() -> None:
    configs = (BackendSpec(max_batch_size=2), "max_batch_size"), (BackendSpec(user_config=1), "no method reconfigure")
    for config, message in configs:
        with pytest.raises(ConfigError, match=message):
            await Runner.start("b", "b#1", dump(asgi(raw)), config)


def test_all_methods_are_those_of_an_endpoint() -> None:
    assert {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} <= set(ALL_METHODS)


def test_its_repr_names_it() -> None:
    assert repr(asgi("web.api:app")) == "asgi('web.api:app')"
    assert repr(asgi(Starlette())) == "asgi(<Starlette>)"
