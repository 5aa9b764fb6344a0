"""The snippets of ``docs/requests.md``, run as a reader runs them."""

import os
import re
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.handles.site import Site
from tests.proxy.pages.submitting import proxies, route
from tests.support.waiting import wait_until

PAGE = (Path(__file__).parents[3] / "docs" / "requests.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def url(redis_url: str) -> Iterator[str]:
    """A proxy with the backend of the page."""
    code: dict[str, Any] = {}
    (backend,) = [snippet for snippet in snippets("python") if "report_progress" in snippet]
    exec(f"from penstock import serve\n{backend}", code)
    site = Site(redis_url)
    try:
        site.serve(code["transcribe"], "transcribe")
        route(site, "/transcribe", "transcribe")
        with proxies(redis_url) as started:
            url = started.start()
            wait_until(lambda: "/transcribe" in httpx.get(f"{url}/-/routes").json())
            yield url
    finally:
        site.close()


@pytest.mark.parametrize("snippet", snippets("sh"), ids=lambda snippet: snippet.split()[0])
def test_the_commands_of_the_page_work(url: str, snippet: str, tmp_path: Path) -> None:
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", snippet],
        cwd=tmp_path,
        env={**os.environ, "URL": url},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr + ran.stdout
    assert '{"text":"talk.wav, in words"}' in ran.stdout


@pytest.mark.parametrize(
    "snippet",
    [snippet for snippet in snippets("python") if "report_progress" not in snippet],
    ids=["http", "handle", "key"],
)
def test_the_programs_of_the_page_work(url: str, redis_url: str, snippet: str) -> None:
    exec(textwrap.dedent(snippet), {"url": url, "redis_url": redis_url})
