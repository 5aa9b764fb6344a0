"""Calls without HTTP: handles, and batches of small items with all their results."""
# ruff: noqa: RUF001  (multiplication signs and dashes in tables)

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from ..json_program import JsonProgram
from ..report import Figure, table

SLOWEST_PER_S = 150.0
"""A caller that is slower than this is given up on."""

BATCH = "batch"


@dataclass(frozen=True, slots=True)
class Caller(JsonProgram):
    """Serves and calls itself, and tells of each way of calling."""

    share: float = 1.0
    """Of the items asked for. Ray's handle makes a few hundred calls a second: a tenth shows its rate."""


CALLERS = {
    caller.name: caller
    for caller in (
        Caller("penstock", "Penstock", "calls/penstock_calls.py", is_peer=False),
        Caller("ray", "Ray Serve handle", "calls/ray_calls.py", share=0.1),
        Caller("taskiq", "taskiq, Redis streams", "calls/taskiq_items.py"),
        Caller("celery", "Celery, Redis", "calls/celery_items.py"),
    )
}


@dataclass(frozen=True, slots=True)
class Called:
    """One way of calling, once."""

    caller: str
    what: str
    items: int
    seconds: float
    caller_cpu_us: float
    caller_grew_mib: float
    others_cpu_us: dict[str, float]
    """By process."""
    wrong: int


def run(caller: Caller, items: int) -> list[Called]:
    """Run one caller to its end.

    Raises:
        ProgramFailed: it failed, took too long or printed no result.
    """
    items = max(1, round(items * caller.share))
    results = caller.run("--items", str(items), within_s=3 * items / SLOWEST_PER_S)
    return [Called(caller.name, **line) for line in results]


def markdown(seen: list[Called]) -> str:
    """One line for each caller and way of calling."""
    groups: dict[tuple[str, str], list[Called]] = {}
    for called in seen:
        groups.setdefault((called.what, called.caller), []).append(called)
    speeds = {key: Figure.of([one.items / one.seconds for one in calls]) for key, calls in groups.items()}
    taskiq = speeds.get((BATCH, "taskiq"))
    lines = []
    for (what, name), calls in sorted(groups.items()):
        figure = speeds[what, name]
        beside = f"{figure.median / taskiq.median:.1f}" if taskiq and what == BATCH else ""
        lines.append([
            what, CALLERS[name].title, f"{calls[0].items:,}",
            f"{figure.median:,.0f} ({figure.low:,.0f}–{figure.high:,.0f})", beside,
            f"{median(one.caller_cpu_us for one in calls):,.1f}", _others(calls),
            f"{median(one.caller_grew_mib for one in calls):.1f}", str(sum(one.wrong for one in calls)),
        ])  # fmt: skip
    head = ["how", "system", "items", "items/s (lowest–highest)", "× taskiq", "caller's CPU µs/item",
            "others' CPU µs/item", "caller grew by MiB", "wrong results"]  # fmt: skip
    return "## Calls without HTTP, all results held\n\n" + table(head, lines)


def _others(calls: list[Called]) -> str:
    names = dict.fromkeys(name for one in calls for name in one.others_cpu_us)
    medians = {name: median(one.others_cpu_us.get(name, 0.0) for one in calls) for name in names}
    return ", ".join(f"{name} {us:,.1f}" for name, us in medians.items() if us >= 0.5)
