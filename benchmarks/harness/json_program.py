"""Programs of ``systems/`` that run to their end and print their results as lines of JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import environment
from .catalogue import PROGRAMS, RAY_QUIET
from .processes import Program, ProgramFailed

START_WITHIN_S = 180.0
MARK = "@@"
"""The prefix of a line that holds a result."""


@dataclass(frozen=True, slots=True)
class JsonProgram:
    """One such program."""

    name: str
    title: str
    program: str
    is_peer: bool = True
    """It runs with the packages of the other systems."""

    def run(self, *arguments: str, within_s: float = 0.0) -> list[dict[str, Any]]:
        """Run it with these arguments and return its results.

        Args:
            *arguments: of its command line.
            within_s: the seconds that it may take after its start.

        Raises:
            ProgramFailed: it failed, took too long or printed no result.
        """
        python = environment.PYTHON if self.is_peer else Path(sys.executable)
        with Program([str(python), str(PROGRAMS / self.program), *arguments], env=RAY_QUIET) as program:
            printed = program.run_to_end(within_s=START_WITHIN_S + within_s)
        results = [json.loads(line.removeprefix(MARK)) for line in printed.splitlines() if line.startswith(MARK)]
        if not results:
            raise ProgramFailed(f"it printed no result:\n{printed[-2_000:]}")
        return results
