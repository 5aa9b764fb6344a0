"""Table of results, one row for each scenario."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it loads Ray
    from tests.faults.load.traffic import Outcomes

_KEPT = Path("build/faults")
_HEAD = ("scenario", "s", "sent", "answered", "refused", "cut off", "lost", "run twice", "p50 ms", "p99 ms", "and")


@dataclass(frozen=True)
class Row:
    """One scenario as it ended."""

    scenario: str
    seconds: float
    sent: int = 0
    answered: int = 0
    refused: dict[str, int] = field(default_factory=dict[str, int])
    cut: int = 0
    lost: int = 0
    twice: int = 0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    notes: str = ""

    @classmethod
    def of(cls, scenario: str, seconds: float, seen: Outcomes, *, twice: int = 0, notes: str = "") -> Row:
        return cls(
            scenario,
            seconds,
            seen.sent,
            len(seen.answered),
            dict(seen.refused),
            len(seen.cut),
            seen.lost,
            twice,
            round(seen.quantile_s(0.5) * 1000, 1),
            round(seen.quantile_s(0.99) * 1000, 1),
            notes,
        )

    def cells(self) -> tuple[str, ...]:
        refused = ", ".join(f"{count} {name}" for name, count in sorted(self.refused.items())) or "0"
        counts = (self.sent, self.answered, refused, self.cut, self.lost, self.twice, self.p50_ms, self.p99_ms)
        return (self.scenario, f"{self.seconds:.0f}", *map(str, counts), self.notes)


class Table:
    """The rows of one run. Each is kept on disk as its scenario ends, so that nothing is lost with the run."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        self.rows.append(row)
        _KEPT.mkdir(parents=True, exist_ok=True)
        with (_KEPT / f"rows-{os.getpid()}.jsonl").open("a") as kept:
            kept.write(json.dumps(asdict(row)) + "\n")
        (_KEPT / "table.md").write_text(self.markdown() + "\n")

    def markdown(self) -> str:
        lines = [_HEAD, tuple("---" for _ in _HEAD), *(row.cells() for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLE = Table()
"""The table of this run."""
