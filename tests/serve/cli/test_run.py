"""``penstock run`` with what it cannot serve. None of this starts Ray."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from penstock.broker.embedded.server import EmbeddedServer
from tests.serve.cli.command_line import command_line
from tests.serve.cli.conftest import Penstock, environment, running
from tests.serve.cli.test_status import declare


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.py"], "there is no file"),
        (["none.yaml"], "there is no file"),
        (
            ["--http-port", "9000", "app.py"],
            "app.py chooses its own HTTP options: serve.start(http_options={'port': 9000})",
        ),
        (["json:loads", "argument"], "only a script takes arguments: argument"),
        (["app"], "neither a script ('app.py')"),
    ],
)
def test_a_program_that_cannot_be_served_is_refused(penstock: Penstock, arguments: list[str], said: str) -> None:
    refused = penstock("run", *arguments)
    assert (refused.code, refused.out) == (2, "")
    assert said in refused.err
    assert "Ray" not in refused.err


def test_a_script_that_raises_is_its_traceback_and_exit_code_1(penstock: Penstock, tmp_path: Path) -> None:
    script = tmp_path / "app.py"
    script.write_text("raise RuntimeError('no weights')\n")
    failed = penstock("run", script)
    assert failed.code == 1
    assert failed.err.splitlines()[-1] == "RuntimeError: no weights"
    assert "program.py" not in failed.err


def test_a_script_that_starts_nothing_is_told_what_to_do(penstock: Penstock, tmp_path: Path) -> None:
    script = tmp_path / "app.py"
    script.write_text("def greet(request): return 'hi'\n")
    failed = penstock("run", script)
    assert failed.code == 2
    assert "has started no instance: call serve.start() in it and leave it open" in failed.err
    assert "penstock run app:NAME" in failed.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_script_that_waits_ends_with_exit_code_0_after_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "app.py"
    script.write_text("from penstock import serve\nclient = serve.connect()\nclient.wait()\nprint('after')\n")
    with EmbeddedServer.start() as server:
        asyncio.run(declare(server.url))
        with running(command_line("run", str(script)), environment(server.url)) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "serving without HTTP\n"
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "after\n", "")
