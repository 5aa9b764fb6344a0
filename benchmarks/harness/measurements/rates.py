"""Open-loop load on one system at rising rates, and its table."""
# ruff: noqa: RUF001  (multiplication signs and dashes in tables)

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from .. import open_loop
from ..cases import Case
from ..catalogue import SYSTEMS
from ..measure import SETTLE_S, WARM_UP_S, Served
from ..report import ms, table
from ..wrk import LoadFailed, Target

SERVICE_S = 0.010
"""The duration of a request of ``sleep``; see ``systems/http/program.py``."""

OVERWHELMED_MS = 1_000.0
"""A system whose 99th percentile is above this, or that leaves requests unanswered, is asked for no higher rate."""


@dataclass(frozen=True, slots=True)
class Paced:
    """The results of one run of the generator, in milliseconds."""

    system: str
    rate_per_s: int
    asked: int
    answered: int
    not_2xx: int
    unanswered: int
    cpu_s: float
    p50_ms: float
    p99_ms: float
    p999_ms: float
    lag_p50_ms: float
    lag_p99_ms: float
    lag_p999_ms: float
    optimum_p50_ms: float
    optimum_p99_ms: float
    optimum_p999_ms: float


def pace(system: str, target: Target, *, rate: int, seconds: float, seed: int, servers: int) -> Paced:
    """Run the generator once.

    Raises:
        LoadFailed: it left with an error or not in time.
    """
    words = (
        target.url, target.method, target.body or "", target.content_type, rate, seconds, seed, servers, SERVICE_S,
    )  # fmt: skip
    command = [sys.executable, open_loop.__file__, *map(str, words)]
    limit_s = seconds + open_loop.LAST_ANSWERS_WITHIN_S + 30
    try:
        ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise LoadFailed(f"the generator did not end within {limit_s:.0f} s at {rate}/s") from None
    if ran.returncode != 0:
        raise LoadFailed(f"the generator left with {ran.returncode} at {rate}/s: {ran.stderr[-2_000:]}")
    return Paced(system, rate, **json.loads(ran.stdout))


def visit(served: Served, case: Case, *, seconds: float, seed: int, say: Callable[[str], None]) -> list[Paced]:
    """One system's turn: rate after rate, until it is overwhelmed.

    Raises:
        LoadFailed: the generator failed.
    """
    name, target = served.system.name, served.targets[case.name]
    servers = case.replicas if case.workload == "sleep" else 0
    seen: list[Paced] = []
    pace(name, target, rate=min(100, *case.rates_per_s), seconds=WARM_UP_S, seed=0, servers=0)
    for rate in case.rates_per_s:
        time.sleep(SETTLE_S)
        one = pace(name, target, rate=rate, seconds=seconds, seed=seed, servers=servers)
        seen.append(one)
        say(f"{rate}/s p99 {ms(one.p99_ms)} ms")
        if one.unanswered or one.p99_ms > OVERWHELMED_MS:
            break
    return seen


def markdown(case: Case, seen: Sequence[Paced], order: Sequence[str]) -> str:
    """One line per rate and system: medians over the rounds."""
    has_optimum = any(one.optimum_p99_ms for one in seen)
    groups: dict[tuple[int, int], list[Paced]] = {}
    for one in seen:
        groups.setdefault((one.rate_per_s, order.index(one.system)), []).append(one)
    lines = []
    for (rate, _), runs in sorted(groups.items()):
        optimum = median(one.optimum_p99_ms for one in runs)
        line = [
            SYSTEMS[runs[0].system].title, f"{rate:,}", *(ms(median(values)) for values in (
                [one.p50_ms for one in runs], [one.p99_ms for one in runs], [one.p999_ms for one in runs],
            )), f"{ms(min(one.p99_ms for one in runs))}–{ms(max(one.p99_ms for one in runs))}",
        ]  # fmt: skip
        if has_optimum:
            line += [ms(optimum), f"{median(one.p99_ms / one.optimum_p99_ms for one in runs):.2f}"]
        line += [
            f"{sum(one.not_2xx for one in runs)}", f"{sum(one.unanswered for one in runs)}",
            f"{median(one.lag_p99_ms for one in runs):.2f}",
            f"{median(one.cpu_s / max(one.asked, 1) * 1e6 for one in runs):.0f}",
        ]  # fmt: skip
        lines.append(line)
    head = ["system", "rate/s", "p50 ms", "p99 ms", "p99.9 ms", "p99 lowest–highest"]
    if has_optimum:
        head += ["optimum's p99", "p99 × optimum"]
    head += ["not 2xx", "unanswered", "generator's lag p99 ms", "generator's CPU µs/request"]
    return f"## {case.title}\n\n" + table(head, lines)
