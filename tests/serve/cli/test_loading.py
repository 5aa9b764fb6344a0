"""How the command is loaded: no more of it than is asked for, and an interruption meanwhile ends it quietly."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.cli.conftest import COMMAND, environment

WHAT_WAS_LOADED = """
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
    pass  # some do that while they are loaded
"""


def loaded_by(*arguments: str) -> set[str]:
    command = [sys.executable, "-c", WHAT_WAS_LOADED, *arguments]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stderr.split())


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_load_no_command(option: str) -> None:
    assert not loaded_by(option) & {"ray", "redis", "rich", "pydantic", "starlette", "orjson"}


@pytest.mark.parametrize("command", ["batch", "call", "dead"])
def test_what_needs_nothing_but_redis_loads_no_ray(command: str) -> None:
    loaded = loaded_by(command, "--help")
    assert f"penstock.serve.cli.{command}" in loaded
    assert not loaded & {"ray", "pydantic", "starlette", "uvicorn"}


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("click", ["--help"]), ("redis", ["call", "ask"]), ("rich", ["batch", "ask", "-", "-o", "-"]), ("ray", ["start"])],
)
def test_an_interruption_while_it_is_loaded_ends_it_quietly(module: str, arguments: list[str], tmp_path: Path) -> None:
    """Of modules that are loaded at different times, each in turn is one that sends SIGINT in the middle of it."""
    (tmp_path / f"{module}.py").write_text(INTERRUPTS)
    env = {**environment("redis://127.0.0.1:1"), "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=100, check=False, env=env)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "interrupted\n")


def test_an_interruption_is_ignored_where_that_is_wished(tmp_path: Path) -> None:
    """As in what a shell has put into the background."""
    (tmp_path / "click.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT); os._exit(7)")
    ran = subprocess.run(
        COMMAND,
        timeout=100,
        check=False,
        env={**environment(""), "PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert ran.returncode == 7
