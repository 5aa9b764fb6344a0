"""The examples of docs/testing.md and docs/multiplexing.md, run as a user runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from penstock.testing import local

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_tests_of_the_page_about_testing_pass(tmp_path: Path) -> None:
    threads, http, _ = blocks("testing.md")
    (tmp_path / "test_page.py").write_text(threads)
    (tmp_path / "test_page_http.py").write_text(http)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--asyncio-mode=auto", "--rootdir", "."]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0, ran.stdout
    assert "3 passed" in ran.stdout


def test_the_example_of_multiplexing_answers() -> None:
    code, _ = blocks("multiplexing.md")
    names: dict[str, Any] = {}
    exec(compile(code, "docs/multiplexing.md", "exec"), names)
    with local(names["Translator"]) as backend:
        handle = backend.handle
        assert handle.options(model_id="de-en").remote("Wasser").result() == {"model": "de-en", "data": "Wasser"}
