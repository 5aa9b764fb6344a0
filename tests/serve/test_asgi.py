"""ASGI applications through the public API, and the page about them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from httpx import Client as HTTPClient
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from penstock import serve
from tests.serve.backends import SMALL
from tests.support.ray_workers import forks_with_ray

PAGE = (Path(__file__).parents[2] / "docs" / "asgi.md").read_text(encoding="utf-8")


def test_an_application_serves_and_one_that_cannot_start_changes_nothing(web: serve.Client, http: HTTPClient) -> None:
    def app_with(version: str, *, fails: bool = False) -> Starlette:
        async def show(request: Request) -> PlainTextResponse:
            return PlainTextResponse(f"{request.state.version} {request.url_for('show')}")

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncGenerator[dict[str, Any]]:
            if fails:
                raise FileNotFoundError("no weights")
            yield {"version": version}

        return Starlette(routes=[Route("/show", show)], lifespan=lifespan)

    web.create_backend("api", serve.asgi(app_with("one")), ray_actor_options=SMALL)
    web.create_endpoint("api", backend="api", route="/api/{path:path}", methods=serve.ALL_METHODS)
    assert http.get("/api/show").text == f"one {http.base_url}/api/show"

    with pytest.raises(serve.errors.BackendError, match="FileNotFoundError: no weights") as raised:
        web.update_backend("api", serve.asgi(app_with("two", fails=True)), ray_actor_options=SMALL)
    assert 'raise FileNotFoundError("no weights")' in raised.value.traceback
    assert http.get("/api/show").text.startswith("one ")
    with pytest.raises(serve.errors.BackendError, match="no weights"):
        web.create_backend("other", serve.asgi(app_with("two", fails=True)), ray_actor_options=SMALL)
    assert list(web.list_backends()) == ["api"]

    web.update_backend("api", serve.asgi(app_with("two")), ray_actor_options=SMALL)
    assert http.get("/api/show").text.startswith("two ")


def test_the_program_of_the_page_prints_what_it_says(cluster: str, tmp_path: Path) -> None:
    web, program = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[:2]
    (output,) = re.findall(r"```\n(\{.*?)```", PAGE, re.DOTALL)
    (tmp_path / "web.py").write_text(web)
    ran = subprocess.run(
        [forks_with_ray().python, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "RAY_ADDRESS": cluster},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    printed = [line for line in ran.stdout.splitlines() if "Actor pid=" not in line]  # without what Ray forwards
    assert printed == output.splitlines()
