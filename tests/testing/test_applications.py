"""ASGI applications in the process of a test, and the examples of docs/asgi.md that need no Ray."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from penstock import handles, serve
from penstock.broker.registry.records import Snapshot
from penstock.serve.deploy.manifest import read
from penstock.testing import Local, local
from tests.handles.site import INSTANCE, Site

PAGE = (Path(__file__).parents[2] / "docs" / "asgi.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def worked() -> list[str]:
    return []


@pytest.fixture
def backend(worked: list[str]) -> Iterator[Local]:
    async def show(request: Request) -> JSONResponse:
        task = BackgroundTask(worked.append, "done")
        return JSONResponse({"path": request.url.path, "body": (await request.body()).decode()}, background=task)

    app = Starlette(routes=[Route("/show", show, methods=["GET", "POST"])])
    with local(serve.asgi(app), route="/api/{path:path}", methods=serve.ALL_METHODS) as backend:
        yield backend


async def test_an_application_is_called_over_http_and_through_a_handle(backend: Local, worked: list[str]) -> None:
    transport = httpx.ASGITransport(backend.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        assert (await http.post("/api/show", content=b"a")).json() == {"path": "/api/show", "body": "a"}
    show = backend.async_handle.options(http_path="/show", http_method="POST")
    assert (await (await show.remote("b"))).json() == {"path": "/show", "body": "b"}
    backend.close()
    assert worked == ["done", "done"]


def test_the_test_of_the_page_passes(tmp_path: Path) -> None:
    web, *_, test = blocks("python")
    (tmp_path / "web.py").write_text(web)
    (tmp_path / "test_page.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--asyncio-mode=auto", "--rootdir", "."]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0, ran.stdout
    assert "1 passed" in ran.stdout


def test_the_handles_of_the_page_call_its_application(redis_url: str) -> None:
    names: dict[str, Any] = {}
    exec(compile(blocks("python")[0], "web.py", "exec"), names)
    (program,) = [block for block in blocks("python") if "handles.connect" in block]
    site = Site(redis_url)
    try:
        site.serve(serve.asgi(names["app"]), "api", tag="api")
        exec(compile(dedent(program), "docs/asgi.md", "exec"), {"redis_url": site.url})
        with handles.connect(site.url, INSTANCE) as connection:
            refused = connection.get_handle("api").options(method_name="predict").remote()
            with pytest.raises(serve.errors.BackendError, match="call it with a method and a path of HTTP"):
                refused.result(timeout=10)
    finally:
        site.close()


def test_the_application_of_the_page_shows_its_progress(redis_url: str) -> None:
    names: dict[str, Any] = {}
    (program,) = [block for block in blocks("python") if "report_progress" in block]
    exec(compile(program, "docs/asgi.md", "exec"), names)
    app = Starlette(routes=[Route("/", names["transcribe"], methods=["POST"])])
    site = Site(redis_url)
    try:
        site.serve(serve.asgi(app), "api", tag="api")
        with handles.connect(site.url, INSTANCE) as connection:
            handle = connection.get_handle("api").options(http_method="POST")
            submitted = handle.submit()
            assert submitted.result(timeout=10).json() == {"text": "hello"}
            assert submitted.status().progress == {"done": 30, "of": 60}
            # The progress of a request whose status nobody can read is checked and dropped.
            assert handle.remote().result(timeout=10).json() == {"text": "hello"}
    finally:
        site.close()


def test_the_file_of_the_page_declares_its_application() -> None:
    (text,) = blocks("yaml")
    manifest, mistakes = read(text, Snapshot())
    assert mistakes == []
    assert repr(manifest.backends["api"].deployable) == "asgi('web:app')"
    assert manifest.endpoints["api"].methods == serve.ALL_METHODS
