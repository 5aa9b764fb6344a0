"""The examples of pages that need no Ray, run as a user runs them."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from textwrap import indent
from typing import Any

import httpx
import pytest

from penstock import serve
from penstock.serve.start_arguments import StartArguments
from penstock.testing import local
from tests.handles.site import Site

DOCS = Path(__file__).parents[2] / "docs"
README = DOCS.parent / "README.md"


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_tests_of_the_page_about_testing_pass(tmp_path: Path) -> None:
    threads, http, _ = blocks("testing.md")
    (tmp_path / "test_page.py").write_text(threads)
    (tmp_path / "test_page_http.py").write_text(http)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pytest_asyncio.plugin", "--asyncio-mode=auto"]
    env = {
        **os.environ,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }  # other plugins load for longer than these tests run
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stdout
    assert "3 passed" in ran.stdout


def test_the_example_of_multiplexing_answers() -> None:
    code, call = blocks("multiplexing.md")
    names: dict[str, Any] = {}
    exec(compile(code, "docs/multiplexing.md", "exec"), names)
    with local(names["Translator"]) as backend:
        handle = backend.handle
        future = eval(call, {"handle": handle})
        assert future.result() == {"model": "de-en", "data": "Wasser"}


def test_the_examples_of_streaming_print_the_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    class Generator:
        async def generate(self, prompt: str) -> AsyncIterator[str]:
            for word in (prompt, " is", " streamed"):
                yield word

    code, reading = blocks("streaming.md")
    names: dict[str, Any] = {"serve": serve, "model": Generator()}
    exec(compile(code, "docs/streaming.md", "exec"), names)
    with local(names["tell"]) as backend:
        names.update(handle=backend.handle, ahandle=backend.async_handle)
        exec(compile(f"async def read():\n{indent(reading, '    ')}", "docs/streaming.md", "exec"), names)
        asyncio.run(names["read"]())
    assert capsys.readouterr().out == 2 * "prompt is streamed"


def test_the_examples_of_retries_are_answered_after_errors_that_pass() -> None:
    answers: list[Any] = [ConnectionError("refused"), "short"]

    def ask_another_service(data: object) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    class Creates:
        def create_backend(self, tag: str, code: Any, config: dict[str, Any]) -> None:
            self.code, self.config = code, config

    configured, asked = blocks("retries.md")
    client = Creates()
    names: dict[str, Any] = {"serve": serve, "client": client, "ask_another_service": ask_another_service}
    exec(compile(configured, "docs/retries.md", "exec"), names)
    with local(
        client.code, config={**client.config, "retry": {**client.config["retry"], "backoff_s": 0.01}}
    ) as backend:
        assert backend.handle.remote("long").result(timeout=30) == "short"
    exec(compile(asked, "docs/retries.md", "exec"), names)
    answers[:] = [httpx.Response(429, headers={"retry-after": "0"}), httpx.Response(200, text="short")]
    with local(names["summarise"]) as backend:
        assert backend.handle.remote("long").result(timeout=30) == "short"


def test_the_thin_client_of_the_readme_calls_the_backend_of_its_first_example(
    redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, thin = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(first.partition("with serve.start")[0], "README.md", "exec"), names)
    site = Site(redis_url)
    try:
        site.serve(names["greet"], "greet")
        exec(compile(thin.replace("redis://broker:6379", redis_url), "README.md", "exec"), {})
    finally:
        site.close()
    assert capsys.readouterr().out == "{'hello': 'thin client'}\n"


@pytest.mark.parametrize("number", [0, 1])
def test_the_starts_of_the_page_on_security_have_valid_arguments(number: int) -> None:
    checked: list[StartArguments] = []

    class Checks:
        def start(self, **given: Any) -> None:
            defaults = dict.fromkeys(inspect.signature(StartArguments.checked).parameters)
            arguments: dict[str, Any] = {**defaults, "detached": False, **given}
            checked.append(StartArguments.checked(**arguments))

    exec(compile(blocks("security.md")[number], "docs/security.md", "exec"), {"serve": Checks()})
    assert len(checked) == 1
