"""The benchmarks start: each program finds what it imports."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
# Those of peers need the peers' environment, and the one that measures the start-up runs only below the harness.
PROGRAMS = [
    FOLDER / "run.py",
    *sorted((FOLDER / "systems").glob("penstock_[!s]*.py")),
    FOLDER / "systems" / "penstock_server.py",
    FOLDER / "systems" / "path_server.py",
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_a_program_finds_what_it_imports(program: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(program), "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "usage: " in ran.stdout
