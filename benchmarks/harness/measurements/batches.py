"""Batches at a full queue: their sizes, and items per second as a share of the most that the calls allow.

One replica takes batches of up to 64 and sleeps for each. With a full queue it can answer 64 / call time items per
second. Each program leaves the sizes of its batches in its scratch folder.
"""

# ruff: noqa: RUF001  (dashes in tables)

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..cases import Case
from ..catalogue import SYSTEMS
from ..json_program import JsonProgram
from ..measure import SETTLE_S, WARM_UP_S, Served, serving
from ..processes import Program, ProgramFailed, busy_s
from ..report import Figure, table
from ..wrk import load

BATCH_SIZE = 64
CALLS_MS = (3, 10, 20, 50)
IN_FLIGHT = (128, 256, 512)
BY_HTTP = ("penstock", "ray", "ray-haproxy", "litserve", "mosec")
HTTP, HANDLE = "HTTP", "asyncio handle"
CALLER = JsonProgram("penstock", "Penstock", "calls/penstock_in_flight.py", is_peer=False)


@dataclass(frozen=True, slots=True)
class Batched:
    """One system under one load."""

    system: str
    how: str
    call_ms: int
    in_flight: int
    per_s: float
    mean_size: float
    others_cores: float
    """Cores that were busy with neither the server nor the load."""
    not_answered: int

    @property
    def share(self) -> float:
        """Items per second, divided by those that one replica answers with full batches."""
        return self.per_s * self.call_ms / 1000 / BATCH_SIZE


def visit(name: str, *, in_flight: tuple[int, ...], seconds: float, say: Callable[[str], None]) -> list[Batched]:
    """Put one system through calls of every length.

    Raises:
        ProgramFailed: see ``measure.serving``; or it ran no batch.
        LoadFailed: wrk did not run.
    """
    seen = []
    for call_ms in CALLS_MS:
        case = Case(name=f"batch-{call_ms}", title="", workload=f"batch-{call_ms}", systems=BY_HTTP)
        with serving(SYSTEMS[name], [case]) as served:
            load(served.targets[case.name], connections=max(in_flight), seconds=WARM_UP_S)
            for how in (HTTP, HANDLE) if name == "penstock" else (HTTP,):
                for count in in_flight:
                    time.sleep(SETTLE_S)
                    seen.append(_sample(served, case, how, call_ms, count, seconds))
                    say(f"{call_ms} ms {how} {count}: {seen[-1].mean_size:.0f}, {seen[-1].share:.2f}")
    return seen


def _sample(served: Served, case: Case, how: str, call_ms: int, in_flight: int, seconds: float) -> Batched:
    program = served.program
    sizes_before, cpu_before, busy_before, began = _sizes(program), _cpu_s(program), busy_s(), time.monotonic()
    if how == HTTP:
        seen = load(served.targets[case.name], connections=in_flight, seconds=seconds)
        per_s, load_cpu_s, wrong = seen.per_s, seen.wrk_cpu_s, seen.not_2xx + seen.socket_errors
    else:
        url = (served.program.scratch / "redis-url").read_text()
        words = ["--url", url, "--endpoint", case.workload, "--in-flight", str(in_flight), "--seconds", str(seconds)]
        (result,) = CALLER.run(*words, within_s=seconds)
        per_s, load_cpu_s, wrong = result["answered"] / result["seconds"], result["cpu_s"], 0
    took_s = time.monotonic() - began
    sizes = _sizes(served.program)[len(sizes_before) :]
    if not sizes:
        raise ProgramFailed(f"{served.system.name} ran no batch")
    ours_s = _cpu_s(served.program) - cpu_before + load_cpu_s
    others = max(0.0, (busy_s() - busy_before - ours_s) / took_s)
    return Batched(served.system.name, how, call_ms, in_flight, per_s, sum(sizes) / len(sizes), others, wrong)


def _sizes(program: Program) -> list[int]:
    file = program.scratch / "batch-sizes"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def _cpu_s(program: Program) -> float:
    return sum(cpu_s for _, cpu_s in program.cpu_s().values())


def markdown(seen: list[Batched]) -> str:
    """One line for each length of call, way, number in flight and system: medians over the rounds."""
    groups: dict[tuple[int, str, int, str], list[Batched]] = {}
    for one in seen:
        groups.setdefault((one.call_ms, one.how, one.in_flight, one.system), []).append(one)
    lines = []
    for (call_ms, how, in_flight, name), runs in sorted(groups.items()):
        per_s, share = Figure.of([one.per_s for one in runs]), Figure.of([one.share for one in runs])
        lines.append([
            str(call_ms), how, str(in_flight), SYSTEMS[name].title,
            f"{Figure.of([one.mean_size for one in runs]).median:.1f}",
            f"{per_s.median:,.0f} ({per_s.low:,.0f}–{per_s.high:,.0f})",
            f"{share.median:.2f} ({share.low:.2f}–{share.high:.2f})",
            f"{Figure.of([one.others_cores for one in runs]).median:.2f}", str(sum(one.not_answered for one in runs)),
        ])  # fmt: skip
    head = ["ms for a call", "how", "in flight", "system", "mean batch", "items/s (lowest–highest)",
            "of 64 / call time", "others' cores", "not answered"]  # fmt: skip
    return "## Batches of up to 64, one replica, the queue kept full\n\n" + table(head, lines)
