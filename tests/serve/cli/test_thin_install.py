"""Installations that lack an extra: what needs only Redis works, and the message for the rest names the extra."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from redis import Redis

from tests.handles.site import Site, echo
from tests.serve.cli.conftest import environment
from tests.serve.cli.test_status import declare

WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""
"""Makes packages impossible to import, as if they were not installed."""

SERVE = {"ray", "starlette", "uvicorn", "uvloop", "httptools", "pydantic", "pydantic_core", "yaml", "virtualenv"}
CLI = {"click", "rich"}


def run_without(packages: set[str], code: str, url: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT.format(missing=sorted(packages)) + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment(url), timeout=100)


def run_command_without(packages: set[str], url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = f"sys.argv = ['penstock', *{arguments!r}]\nfrom penstock.serve.cli import main\nmain()"
    return run_without(packages, code, url)


def test_the_thin_installation_names_the_extra_that_serving_needs() -> None:
    ran = run_without(SERVE | CLI, "from penstock import serve\nserve.start()")
    assert ran.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: penstock.serve needs the package starlette: pip install 'penstock[serve]'"
    )


def test_a_start_without_ray_names_its_extra_and_leaves_no_key(redis_url: str) -> None:
    start = "from penstock import serve\nserve.start(http_options={'port': 0}, instance='thin')"
    ran = run_without({"ray"}, start, redis_url)
    assert ran.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: serve.start needs the package ray: pip install 'penstock[serve]'"
    )
    with Redis.from_url(redis_url) as redis:
        assert redis.keys("penstock:thin:*") == []


def test_the_thin_installation_names_the_extra_that_the_command_needs() -> None:
    ran = run_command_without(SERVE | CLI, "", "--help")
    assert ran.returncode == 2
    assert ran.stderr == "Error: this command needs the package click: pip install 'penstock[cli]'\n"


@pytest.mark.parametrize("arguments", [["start"], ["shutdown"]])
def test_commands_that_need_ray_name_its_extra(arguments: list[str], redis_url: str) -> None:
    ran = run_command_without(SERVE, redis_url, *arguments)
    assert ran.returncode == 2
    assert ran.stderr.startswith("Error: this command needs the package ")
    assert ran.stderr.endswith(": pip install 'penstock[serve]'\n")


def test_a_module_that_belongs_to_no_extra_is_reported_as_it_is() -> None:
    ran = run_without({"orjson"}, "from penstock import serve\nserve.start")
    assert ran.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'orjson'"


def test_the_commands_that_need_only_redis_work_without_the_packages_that_serve(
    site: Site, redis_url: str, tmp_path: Path
) -> None:
    asyncio.run(declare(redis_url))
    site.serve(echo)

    def penstock(*arguments: str) -> str:
        ran = run_command_without(SERVE, redis_url, *arguments)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    assert penstock("call", "ask", "[1]") == "[1]\n"
    id_ = penstock("call", "ask", "2", "--submit").strip()
    assert penstock("result", id_, "--wait") == "2\n"
    assert penstock("requests", "ask").splitlines()[1].split()[:2] == [id_, "succeeded"]
    assert penstock("dead", "list", "model") == "backend 'model' has no dead letters\n"
    assert penstock("status", "--json")
    (tmp_path / "rows.jsonl").write_text("1\n2\n")
    penstock("batch", "ask", str(tmp_path / "rows.jsonl"), "-o", str(tmp_path / "results.jsonl"))
    results = [orjson.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert sorted(line["result"] for line in results) == [1, 2]


def test_a_call_is_cancelled_without_the_packages_that_serve(site: Site, redis_url: str) -> None:
    site.declare()
    id_ = run_command_without(SERVE, redis_url, "call", "ask", "1", "--submit").stdout.strip()
    assert run_command_without(SERVE, redis_url, "cancel", id_).stdout == "cancelled\n"
