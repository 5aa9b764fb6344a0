"""Cost of many replicas to Redis, idle and under load, without Ray."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from ..json_program import JsonProgram
from ..report import table

PROGRAM = JsonProgram("penstock", "Penstock", "costs/penstock_fleet.py", False)

LAYOUTS = {
    f"{replicas} in {backends}": (replicas, backends)
    for replicas, backends in ((1, 1), (10, 1), (100, 1), (100, 10), (1_000, 1), (1_000, 100))
}
"""Replicas and backends, by name."""

_START_S = 600.0
"""A thousand replicas in a few processes start slowly."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """One measurement of one layout; ``idle`` and ``load`` are those of the program."""

    layout: str
    connections_per_replica: float
    idle: dict[str, float]
    load: dict[str, float]


def visit(layout: str, *, seconds: float) -> Fleet:
    """Measure one layout for ``seconds`` idle, and for as long under load.

    Raises:
        ProgramFailed: the program failed or took too long.
    """
    replicas, backends = LAYOUTS[layout]
    words = ("--replicas", str(replicas), "--backends", str(backends), "--seconds", str(seconds))
    (result,) = PROGRAM.run(*words, within_s=2 * seconds + _START_S)
    return Fleet(layout, result["connections_per_replica"], result["idle"], result["load"])


def markdown(seen: list[Fleet]) -> str:
    """One line for each layout."""
    lines: list[list[str]] = []
    for layout, (replicas, backends) in LAYOUTS.items():
        if mine := [one for one in seen if one.layout == layout]:
            lines.append(_line(replicas, backends, mine))
    head = [
        *("replicas", "backends", "connections per replica", "idle: commands/s", "per replica", "Redis, % of a core"),
        *("load: answers/s", "commands/s", "Redis, % of a core", "hosts, % of a core"),
    ]
    return "## A fleet of replicas, idle and under load\n\n" + table(head, lines)


def _line(replicas: int, backends: int, mine: list[Fleet]) -> list[str]:
    figures = [
        median(one.connections_per_replica for one in mine),
        median(one.idle["commands_per_s"] for one in mine),
        median(one.idle["commands_per_s"] / replicas for one in mine),
        median(100 * one.idle["redis_cores"] for one in mine),
        median(one.load["answered"] / one.load["seconds"] for one in mine),
        median(one.load["commands_per_s"] for one in mine),
        median(100 * one.load["redis_cores"] for one in mine),
        median(100 * one.load["host_cores"] for one in mine),
    ]
    numbers = (f"{figure:,.0f}" if figure >= 100 else f"{figure:.1f}" for figure in figures)
    return [f"{replicas:,}", f"{backends:,}", *numbers]


def as_json(seen: list[Fleet]) -> list[dict[str, Any]]:
    return [asdict(one) for one in seen]
