"""From nothing to the first answer, step by step, and what processes take that do nothing."""
# ruff: noqa: RUF001  (multiplication signs and dashes in tables)

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

from ..json_program import JsonProgram
from ..processes import ProgramFailed
from ..report import Figure, table

BARE = "bare Ray actor"


@dataclass(frozen=True, slots=True)
class Starter(JsonProgram):
    """Starts up, tells about it, and ends."""

    until_first_answer: tuple[str, ...] = ()
    """The steps of a user who has Ray imported and starts all of it in one call."""


STARTERS = {
    starter.name: starter
    for starter in (
        Starter("penstock", "Penstock", "startup/penstock_startup.py", False,
                ("ray.init", "serve.start", "create_backend", "create_endpoint", "first answer")),
        Starter("ray", "Ray Serve, default", "startup/ray_startup.py", True,
                ("ray.init", "serve.start", "serve.run", "first answer")),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one process."""

    process: str
    rss_mib: float
    pss_mib: float
    uss_mib: float


@dataclass(frozen=True, slots=True)
class Started:
    """One start-up."""

    starter: str
    steps_s: dict[str, float]
    memory: list[Memory]


def run(starter: Starter) -> Started:
    """Run one program to its end.

    Raises:
        ProgramFailed: it failed, took too long or left a step out.
    """
    results = starter.run()
    steps = {line["what"]: line["seconds"] for line in results if "what" in line}
    if missing := [step for step in starter.until_first_answer if step not in steps]:
        raise ProgramFailed(f"did not tell of {', '.join(missing)}, but of {', '.join(steps)}")
    return Started(starter.name, steps, [Memory(**line) for line in results if "process" in line])


def markdown(seen: list[Started]) -> str:
    """The steps, and the memory."""
    steps, memory = [], []
    for name, starter in STARTERS.items():
        mine = [one for one in seen if one.starter == name]
        if not mine:
            continue
        whole = Figure.of([sum(one.steps_s[step] for step in starter.until_first_answer) for one in mine])
        steps.append([f"**{starter.title}**", "from `ray.init` to the first answer", _seconds(whole)])
        steps += [
            [starter.title, step, _seconds(Figure.of([one.steps_s[step] for one in mine]))] for step in mine[0].steps_s
        ]
        memory += _memory_lines(starter.title, mine)
    head = ["system", "process", "RSS MiB", "PSS MiB", "USS MiB", "RSS over bare", "PSS over bare", "USS over bare"]
    return "\n\n".join([
        "## Start-up and size",
        table(["system", "step", "seconds (lowest–highest)"], steps),
        table(head, memory),
    ])  # fmt: skip


def _memory_lines(title: str, seen: list[Started]) -> list[list[str]]:
    def backend_stats(process: str) -> list[float]:
        # There may be several of a kind in one start-up: their mean, and the median of that over the rounds.
        return [
            median(mean(of(one) for one in each.memory if one.process == process) for each in seen)
            for of in (lambda one: one.rss_mib, lambda one: one.pss_mib, lambda one: one.uss_mib)
        ]

    lines = []
    bare = backend_stats(BARE)
    for process in dict.fromkeys(one.process for one in seen[0].memory):
        mine = backend_stats(process)
        over = [f"{ours - theirs:+.1f}" for ours, theirs in zip(mine, bare, strict=True)]
        more = over if process not in (BARE, "broker") else [""] * 3
        lines.append([title, process, *(f"{mib:.1f}" for mib in mine), *more])
    return lines


def as_json(seen: list[Started]) -> list[dict[str, Any]]:
    return [asdict(one) for one in seen]


def _seconds(figure: Figure) -> str:
    return f"{figure.median:.3f} ({figure.low:.3f}–{figure.high:.3f})"
