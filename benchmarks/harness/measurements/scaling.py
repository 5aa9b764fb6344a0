"""Replicas and proxies in several numbers: throughput, CPU by process, commands to Redis, and a model's prediction.

The model is that of ``docs/scaling.md``. A stage of ``n`` processes, each of which runs on one core at a time, carries
at most ``n / c`` requests a second, where ``c`` is the CPU time that it spends on one; all of them together carry what
the cores of the machine have for the sum of all. The least of these is predicted. ``c`` depends on the connections per
process, and is fitted to the simplest configuration in the same sitting, so that the others are predicted and not
described.
"""
# ruff: noqa: RUF001  (multiplication signs and dashes in tables)

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import linear_regression, median
from typing import Any, cast

import redis

from ..cases import CASES
from ..catalogue import SYSTEMS
from ..measure import SETTLE_S, WARM_UP_S, Sample, sample, serving
from ..processes import ProgramFailed
from ..report import Figure, table
from ..wrk import load

CONNECTIONS = (32, 100)
FEWER_CONNECTIONS = (8, 16)
"""What the simplest layout is loaded with as well: a process of a larger one has so many to itself."""
STAGES = {"ray HTTPProxy": "proxy", "ray ReplicaActor": "replica", "valkey-server": "Redis"}
WRK, REST = "wrk", "rest"
AIM = 0.15


@dataclass(frozen=True, slots=True)
class Layout:
    """A number of replicas and of proxies."""

    replicas: int
    proxies: int

    @property
    def name(self) -> str:
        return f"{self.replicas}x{self.proxies}"

    @property
    def loads(self) -> tuple[int, ...]:
        """The numbers of connections that it is measured with."""
        return (*FEWER_CONNECTIONS, *CONNECTIONS) if self.name == SIMPLEST else CONNECTIONS

    def count(self, stage: str) -> int:
        """How many cores the stage can use at a time, as far as it is ours to say."""
        return {"proxy": self.proxies, "replica": self.replicas}.get(stage, 1)


SIMPLEST = "1x1"
LAYOUTS = {
    layout.name: layout
    for layout in (Layout(1, 1), Layout(2, 1), Layout(4, 1), Layout(1, 2), Layout(2, 2), Layout(4, 2))
}


@dataclass(frozen=True, slots=True)
class Scaled:
    """One layout under one load."""

    layout: str
    connections: int
    per_s: float
    p50_ms: float
    p99_ms: float
    not_2xx: int
    stages_us: dict[str, float]
    """CPU µs per request of each stage, of wrk, and of all the rest of it."""
    commands: dict[str, float]
    """To Redis, per request; those that a script sends too."""
    others_cores: float


def visit(layout: Layout, *, seconds: float, threads: int, say: Callable[[str], None]) -> list[Scaled]:
    """Serve a no-op in one layout, and load it.

    Raises:
        ProgramFailed: see ``measure.serving``.
        LoadFailed: wrk did not run.
    """
    ours = SYSTEMS["penstock"]
    system = replace(ours, env={**ours.env, "PENSTOCK_BENCH_PROXIES": str(layout.proxies)})
    case = replace(CASES["noop"], replicas=layout.replicas)
    seen = []
    with serving(system, [case]) as served:
        program, target = served.program, served.targets[case.name]
        url = (program.scratch / "redis-url").read_text()
        load(target, connections=max(CONNECTIONS), seconds=WARM_UP_S, threads=threads)
        with redis.Redis.from_url(url) as broker:
            for connections in layout.loads:
                load(target, connections=connections, seconds=SETTLE_S, threads=threads)
                before = _calls(broker)
                taken = sample(program, target, connections=connections, seconds=seconds, threads=threads)
                after = _calls(broker)
                seen.append(_scaled(layout, taken, {name: n - before.get(name, 0) for name, n in after.items()}))
                say(f"c={connections} {seen[-1].per_s:,.0f}/s")
    return seen


def _calls(broker: redis.Redis) -> dict[str, int]:
    """Return the number of calls of each command so far."""
    stats = cast("dict[str, dict[str, Any]]", broker.info("commandstats"))
    return {name.removeprefix("cmdstat_"): int(one["calls"]) for name, one in stats.items()}


def _scaled(layout: Layout, taken: Sample, calls: Mapping[str, int]) -> Scaled:
    requests = taken.load.requests
    if requests == 0:
        raise ProgramFailed(f"answered nothing with {layout.replicas} replicas and {layout.proxies} proxies")
    stages = dict.fromkeys(STAGES.values(), 0.0) | {WRK: taken.load.wrk_cpu_s / requests * 1e6, REST: 0.0}
    for process, us in taken.cpu_us.items():
        stages[STAGES.get(process, REST)] += us
    commands = {name: count / requests for name, count in sorted(calls.items(), key=lambda one: -one[1]) if count > 0}
    return Scaled(
        layout.name, taken.connections, taken.load.per_s, taken.load.p50_ms, taken.load.p99_ms, taken.load.not_2xx,
        stages, commands, taken.others_cores,
    )  # fmt: skip


BUSY = 0.9
"""Of cores that several processes share, how much is ever busy: they wait for each other now and then."""


def limits_per_s(stages_us: Mapping[str, float], layout: Layout, cores: float) -> dict[str, float]:
    """The most requests per second of each stage, and of the machine as a whole."""
    limits = {stage: layout.count(stage) / us * 1e6 for stage, us in stages_us.items() if us > 0 and stage != REST}
    return {**limits, "all cores": BUSY * cores / sum(stages_us.values()) * 1e6}


@dataclass(frozen=True, slots=True)
class Cost:
    """The CPU time that a process spends on a request: its own, and a share of a wake-up that serves several."""

    work_us: float
    wakeup_us: float

    @classmethod
    def fit(cls, seen: Mapping[float, float]) -> Cost:
        """Return the least squares through ``seen``: µs per request by the connections per process."""
        if len(seen) == 1:
            return cls(next(iter(seen.values())), 0.0)
        slope, work_us = linear_regression([1 / connections for connections in seen], list(seen.values()))
        return cls(work_us, slope)

    def at(self, connections: float) -> float:
        """Return the µs per request of a process that has ``connections`` to itself."""
        return self.work_us + self.wakeup_us / connections


def stages_at(costs: Mapping[str, Cost], layout: Layout, connections: int) -> dict[str, float]:
    """Return the CPU µs per request of each stage. Redis serves as many wake-ups as its busiest kind of client has."""
    busiest = max(layout.proxies, layout.replicas)
    return {
        stage: cost.at(connections / (busiest if stage == "Redis" else layout.count(stage)))
        for stage, cost in costs.items()
    }


@dataclass(frozen=True, slots=True)
class Row:
    """One layout under one load, over all rounds."""

    layout: Layout
    connections: int
    per_s: Figure
    p50_ms: float
    p99_ms: float
    stages_us: dict[str, float]
    commands: dict[str, float]
    others_cores: float


def rows_of(seen: Sequence[Scaled]) -> list[Row]:
    groups: dict[tuple[int, str], list[Scaled]] = {}
    for one in seen:
        groups.setdefault((one.connections, one.layout), []).append(one)
    order = list(LAYOUTS)
    return [_row(groups[key]) for key in sorted(groups, key=lambda key: (key[0], order.index(key[1])))]


def _row(group: list[Scaled]) -> Row:
    commands = dict.fromkeys(name for one in group for name in one.commands)
    return Row(
        LAYOUTS[group[0].layout],
        group[0].connections,
        Figure.of([one.per_s for one in group]),
        median(one.p50_ms for one in group),
        median(one.p99_ms for one in group),
        {stage: median(one.stages_us[stage] for one in group) for stage in group[0].stages_us},
        {name: median(one.commands.get(name, 0.0) for one in group) for name in commands},
        median(one.others_cores for one in group),
    )


def markdown(seen: Sequence[Scaled]) -> str:
    """The table of measured figures beside the model's predictions."""
    rows = rows_of(seen)
    simplest = {row.connections: row.stages_us for row in rows if row.layout.name == SIMPLEST}
    stages = next(iter(simplest.values()), {})
    costs = {stage: Cost.fit({count: us[stage] for count, us in simplest.items()}) for stage in stages}
    cores = len(os.sched_getaffinity(0))
    measured, predicted, commands = [], [], []
    for row in rows:
        name = [str(row.connections), str(row.layout.replicas), str(row.layout.proxies)]
        measured.append([
            *name, f"{row.per_s.median:,.0f} ({row.per_s.low:,.0f}–{row.per_s.high:,.0f})",
            f"{row.p50_ms:.2f}", f"{row.p99_ms:.2f}",
            *(f"{row.stages_us[stage]:.1f}" for stage in (*STAGES.values(), REST, WRK)), f"{row.others_cores:.2f}",
        ])  # fmt: skip
        sent = [f"{command} {count:.2f}" for command, count in row.commands.items() if count >= 0.01]
        commands.append([*name, f"{sum(row.commands.values()):.2f}", ", ".join(sent)])
        if costs:
            fitted = stages_at(costs, row.layout, row.connections)
            predicted.append([*name, f"{row.per_s.median:,.0f}", *_predictions(row, fitted, cores)])
    head = ["c", "replicas", "proxies"]
    return "\n\n".join([
        "## Scaling: a no-op with several replicas and proxies",
        table([*head, "requests/s (lowest–highest)", "p50 ms", "p99 ms", "proxies µs", "replicas µs", "Redis µs",
               "rest µs", "wrk µs", "others' cores"], measured),
        table([*head, "measured", "predicted from 1 × 1", "limited by", "off by", "by its own CPU", "limited by",
               "off by", ""], predicted),
        table([*head, "Redis commands per request", "which"], commands),
    ])  # fmt: skip


def _predictions(row: Row, fitted: Mapping[str, float], cores: int) -> list[str]:
    cells, offs = [], []
    for stages in (fitted, row.stages_us):
        limits = limits_per_s(stages, row.layout, cores - row.others_cores)
        limit = min(limits, key=lambda stage: limits[stage])
        off = limits[limit] / row.per_s.median - 1
        offs.append(off)
        cells += [f"{limits[limit]:,.0f}", limit, f"{off:+.0%}"]
    return [*cells, "within 15 %" if abs(offs[0]) <= AIM else "**not within 15 %**"]


def as_json(seen: Sequence[Scaled]) -> list[dict[str, Any]]:
    return [asdict(one) for one in seen]
