"""``penstock run`` with what it cannot serve. None of this starts Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serve.cli.conftest import Penstock


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
