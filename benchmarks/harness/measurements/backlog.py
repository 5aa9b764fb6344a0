"""Web traffic beside a backlog of batch items, in Penstock alone, and its table."""
# ruff: noqa: RUF001  (multiplication signs and dashes in tables)

from __future__ import annotations

from dataclasses import dataclass

from ..json_program import JsonProgram
from ..report import Figure, ms, table

PROGRAM = JsonProgram("backlog", "Penstock", "costs/penstock_backlog.py", is_peer=False)


@dataclass(frozen=True, slots=True)
class Beside:
    """Response times of one kind of work over HTTP, on an idle system and beside a batch."""

    work: str
    service_ms: float
    """How long one batch occupies its replica."""
    when: str
    queued: int
    """Batch items, at the end."""
    p50_ms: float
    p99_ms: float
    not_2xx: int
    unanswered: int


def run(items: int, seconds: float) -> list[Beside]:
    """Run it once.

    Raises:
        ProgramFailed: it failed, took too long or printed no result.
    """
    results = PROGRAM.run("--items", str(items), "--seconds", str(seconds), within_s=14 * seconds)
    return [Beside(**line) for line in results]


def markdown(seen: list[Beside]) -> str:
    """One line for each kind of work and each moment: medians over the rounds."""
    groups: dict[tuple[str, str], list[Beside]] = {}
    for one in seen:
        groups.setdefault((one.work, one.when), []).append(one)
    p99s = {key: Figure.of([one.p99_ms for one in runs]) for key, runs in groups.items()}
    lines = []
    for (work, when), runs in groups.items():
        p99, idle, service_ms = p99s[work, when], p99s[work, "idle"], Figure.of([one.service_ms for one in runs]).median
        limit = "" if when == "idle" else ms(1.5 * idle.median + service_ms)
        lines.append([
            work, ms(service_ms), when, f"{min(one.queued for one in runs):,}",
            ms(Figure.of([one.p50_ms for one in runs]).median), f"{ms(p99.median)} ({ms(p99.low)}–{ms(p99.high)})",
            limit, str(sum(one.not_2xx for one in runs)), str(sum(one.unanswered for one in runs)),
        ])  # fmt: skip
    head = ["work", "ms for a batch", "when", "queued at the end", "p50 ms", "p99 ms (lowest–highest)",
            "1.5 × idle + a batch", "not 2xx", "unanswered"]  # fmt: skip
    return "## Web traffic beside a batch\n\n" + table(head, lines)
