"""The command in forks of a process that has imported what it needs.

The imports take a second of processor time, longer than most commands run.
"""

from __future__ import annotations

from tests.support.forks import shared_forks
from tests.support.ray_workers import forks_with_ray

CODE = "from penstock.serve.cli import main; main()"

_IMPORTS = (
    *("starlette.requests", "pydantic", "pyarrow.parquet"),
    *(f"penstock.serve.cli.{name}" for name in ("batch", "call", "dead", "deploy", "lifetime", "requests", "status")),
    "penstock.handles.files.rows",
)
_WITH_RAY = ("run", "start")


def command_line(*arguments: str) -> list[str]:
    """Return what runs the command with these arguments."""
    forks = forks_with_ray() if arguments and arguments[0] in _WITH_RAY else shared_forks(*_IMPORTS)
    return [str(forks.python), "-c", CODE, *arguments]
