"""The Python snippets of the README and of docs/ pass pyright in strict mode, as in a reader's editor."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

CONTEXT = """
from collections.abc import AsyncIterator
from typing import TypeVar

import httpx as _httpx

from penstock import handles, serve
from penstock.handles import AsyncServeHandle, Connection, ServeHandle

T = TypeVar("T")
__all__ = ["handles", "serve"]

class Generator:
    async def generate(self, prompt: str) -> AsyncIterator[str]:
        yield prompt

def ask_another_service(data: object) -> _httpx.Response:
    raise NotImplementedError

def some(kind: type[T]) -> T:
    raise NotImplementedError

client, connection, handle, ahandle = some(serve.Client), some(Connection), some(ServeHandle), some(AsyncServeHandle)
model, url, redis_url = some(Generator), some(str), some(str)
"""
NAMES = {
    "ahandle",
    "ask_another_service",
    "client",
    "connection",
    "handle",
    "handles",
    "model",
    "redis_url",
    "serve",
    "url",
}
"""What the pages leave out: names that a snippet uses and the text around it introduces."""


def snippets() -> dict[str, str]:
    """Return the snippets by the names of files for them."""
    found: dict[str, str] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL), 1):
            found[f"{page.stem.replace('-', '_').lower()}_{number}.py"] = code
    return found


def in_context(code: str) -> str:
    if re.search(r"^(await|async (for|with)|\w+ = await)\b", code, re.MULTILINE):
        code = "async def snippet() -> None:\n" + indent(code, "    ")
    nodes = list(ast.walk(ast.parse(code)))
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    defined = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    defined |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.alias)}
    missing = sorted(used & NAMES - defined)
    return f"from context import {', '.join(missing)}\n\n{code}" if missing else code


def test_every_snippet_can_be_compiled() -> None:
    assert len(snippets()) > 20
    for name, code in snippets().items():
        compile(in_context(code), name, "exec")


def test_every_snippet_passes_pyright_in_strict_mode(tmp_path: Path) -> None:
    pytest.importorskip("pyright")
    for name, code in snippets().items():
        (tmp_path / name).write_text(in_context(code))
    (tmp_path / "context.py").write_text(CONTEXT)
    (tmp_path / "app.py").write_text(snippets()["quickstart_1.py"])
    settings = {
        "include": ["."],
        "extraPaths": [str(ROOT / ".imports")],
        "typeCheckingMode": "strict",
        "pythonVersion": "3.10",
        "reportUnknownMemberType": False,  # as in our own configuration
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "--project", "."]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    report = json.loads(ran.stdout)
    wrong = [
        f"{Path(found['file']).name}:{found['range']['start']['line'] + 1}: {found['message']} ({found.get('rule')})"
        for found in report["generalDiagnostics"]
        if found["severity"] == "error"
    ]
    assert wrong == [], "\n".join(wrong)
    assert report["summary"]["filesAnalyzed"] > len(snippets())
