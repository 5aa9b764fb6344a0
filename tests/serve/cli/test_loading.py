"""Imports of the command: only what it needs, and an interruption during them ends it quietly."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.cli.command_line import CODE, command_line
from tests.serve.cli.conftest import environment

COMMAND = (sys.executable, "-c", CODE)

PRINTS_IMPORTS = """
import atexit, sys
from penstock.serve.cli import main

atexit.register(lambda: print(*sys.modules, file=sys.stderr))
main()
"""

INTERRUPTS = """
import os, signal, time

try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except BaseException:
    pass  # some modules do that during their import
"""


def imported_by(*arguments: str) -> set[str]:
    command = [sys.executable, "-c", PRINTS_IMPORTS, *arguments]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stderr.split())


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_no_command(option: str) -> None:
    assert not imported_by(option) & {"ray", "redis", "rich", "pydantic", "starlette", "orjson"}


@pytest.mark.parametrize("command", ["batch", "call", "dead", "deploy", "run", "shutdown", "start", "status"])
def test_the_help_of_a_command_imports_no_ray(command: str) -> None:
    loaded = imported_by(command, "--help")
    assert "penstock.serve.cli.options" in loaded
    assert not loaded & {"ray", "pydantic", "starlette", "uvicorn"}


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("click", ["--help"]),
        ("redis", ["call", "ask"]),
        ("rich", ["batch", "ask", "-", "-o", "-"]),
        ("pydantic", ["start"]),
        ("ray", ["start", "--http-port", "0"]),
    ],
)
def test_an_interruption_during_an_import_ends_the_command_quietly(
    module: str, arguments: list[str], tmp_path: Path, redis_url: str
) -> None:
    """One of the modules that are imported at different times sends SIGINT during its import."""
    (tmp_path / f"{module}.py").write_text(INTERRUPTS)
    env = {**environment(redis_url), "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=100, check=False, env=env)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "interrupted\n")


def test_an_interruption_is_ignored_if_the_parent_process_ignores_it(tmp_path: Path) -> None:
    """As a shell does for a command in the background."""
    (tmp_path / "click.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT); os._exit(7)")
    ran = subprocess.run(
        COMMAND,
        timeout=100,
        check=False,
        env={**environment(""), "PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert ran.returncode == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["statuss"], "no command 'statuss'; did you mean 'status'?"),
        (["dead", "lst"], "no command 'lst'; did you mean 'list'?"),
        (["frobnicate"], "no command 'frobnicate'; the commands are start, run, deploy, status,"),
    ],
)
def test_a_mistyped_command_is_answered_with_a_similar_one(arguments: list[str], message: str) -> None:
    ran = subprocess.run(command_line(*arguments), capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert message in ran.stderr
