"""The command in forks of a process that has imported what it needs.

The imports take a second of processor time, longer than most commands run. Ray is among them for ``start`` alone.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.forks import ForkServer
from tests.ray_workers import forks_with_ray

_IMPORTS = (
    *("starlette.requests", "pydantic", "pyarrow.parquet"),
    *(f"penstock.serve.cli.{name}" for name in ("batch", "call", "dead", "deploy", "lifetime", "requests", "status")),
    "penstock.handles.files.rows",
)
_CODE = "from penstock.serve.cli import main; main()"


class CommandServer:
    """Runs commands in forks of one process, which ends with `close`."""

    def __init__(self, directory: Path) -> None:
        self._forks = ForkServer(directory, _IMPORTS, scripts=("-c",))
        self.command = (str(self._forks.python), "-c", _CODE)
        """All commands but those that use Ray."""

    def run(
        self, arguments: Sequence[str], environ: Mapping[str, str], stdin: bytes, timeout_s: float
    ) -> tuple[int, bytes, bytes]:
        """Run the command; return its exit code and what it wrote to stdout and stderr.

        Raises:
            subprocess.TimeoutExpired: it did not end in time, and was killed.
        """
        command = (str(forks_with_ray().python), "-c", _CODE) if arguments[:1] == ["start"] else self.command
        ran = subprocess.run(
            [*command, *arguments], input=stdin, capture_output=True, check=False, env=environ, timeout=timeout_s
        )
        return ran.returncode, ran.stdout, ran.stderr

    def close(self) -> None:
        """End the process."""
        self._forks.close()
