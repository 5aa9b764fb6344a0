"""A FastAPI application whose code calls a backend, examples/web.py: results, and refusals as HTTP has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from starlette.testclient import TestClient

from penstock import handles
from tests.clients.proxies import quick_start
from tests.clients.serving import example
from tests.handles.site import Site


@pytest.fixture
def site(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("PENSTOCK_REDIS_URL", redis_url)
    site = Site(redis_url)
    yield site
    site.close()


def test_a_page_calls_the_backend_of_the_quick_start(site: Site) -> None:
    site.serve(quick_start()({"good": 1, "bad": -1}), "sentiment")
    with cast("Any", TestClient(example("web").app)) as http:
        response = http.get("/reviews", params={"text": "a good day"})
        assert response.json() == {"text": "a good day", "score": 1}
        assert http.get("/reviews").status_code == 422  # FastAPI validates


def test_a_full_queue_is_503_with_retry_after(site: Site) -> None:
    site.declare("sentiment", max_queued_requests=1)
    with handles.connect() as connection:
        connection.get_handle("sentiment").submit({"text": "queued"})
    with cast("Any", TestClient(example("web").app)) as http:
        response = http.get("/reviews", params={"text": "good"})
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert "max_queued_requests is 1" in response.json()["error"]


def test_the_application_needs_no_package_that_serves() -> None:
    text = (Path(__file__).parents[2] / "examples" / "web.py").read_text(encoding="utf-8")
    assert "serve" not in [line.split()[-1] for line in text.splitlines() if "import" in line]
