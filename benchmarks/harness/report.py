"""Medians, spreads and ratios of the samples, as JSON and as Markdown."""
# ruff: noqa: RUF001  (multiplication signs and dashes in tables)

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from .cases import Case
from .catalogue import SYSTEMS
from .measure import Sample, Visit

COMPARED_WITH = (("ray-haproxy", "Ray HAProxy"), ("ray", "Ray default"), ("mosec", "Mosec"))


@dataclass(frozen=True, slots=True)
class Figure:
    """A median of rounds, and how far they lay apart."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Row:
    """One system at one number of connections, over all rounds."""

    system: str
    connections: int
    rounds: int
    per_s: Figure
    p50_ms: Figure
    p99_ms: Figure
    p999_ms: Figure
    not_2xx: int
    socket_errors: int
    cpu_us: dict[str, float]
    wrk_cores: float
    others_cores: float
    ready_s: float


Rows = Mapping[tuple[str, int], Row]


def rows_of(visits: Sequence[Visit]) -> dict[tuple[str, int], Row]:
    """Rows by system and connections, in the order in which they were first seen."""
    seen: dict[tuple[str, int], list[tuple[Visit, Sample]]] = {}
    for visit in visits:
        for sample in visit.samples:
            seen.setdefault((visit.system, sample.connections), []).append((visit, sample))
    return {key: _row(key[0], key[1], pairs) for key, pairs in seen.items()}


def _row(system: str, connections: int, pairs: Sequence[tuple[Visit, Sample]]) -> Row:
    samples = [sample for _, sample in pairs]

    def figure(of: Callable[[Sample], float]) -> Figure:
        return Figure.of([of(sample) for sample in samples])

    names = dict.fromkeys(name for sample in samples for name in sample.cpu_us)
    return Row(
        system,
        connections,
        len(samples),
        figure(lambda sample: sample.load.per_s),
        figure(lambda sample: sample.load.p50_ms),
        figure(lambda sample: sample.load.p99_ms),
        figure(lambda sample: sample.load.p999_ms),
        sum(sample.load.not_2xx for sample in samples),
        sum(sample.load.socket_errors for sample in samples),
        {name: median(sample.cpu_us.get(name, 0.0) for sample in samples) for name in names},
        figure(lambda sample: sample.load.wrk_cpu_s / sample.load.seconds).median,
        figure(lambda sample: sample.others_cores).median,
        median(visit.ready_s for visit, _ in pairs),
    )


def ratio(rows: Rows, system: str, connections: int, beside: str, of: Callable[[Row], float]) -> float | None:
    """``system``'s figure over that of ``beside``; None if either was not measured or the latter is zero."""
    ours, theirs = rows.get((system, connections)), rows.get((beside, connections))
    return of(ours) / of(theirs) if ours and theirs and of(theirs) else None


def per_s(row: Row) -> float:
    return row.per_s.median


def p50(row: Row) -> float:
    return row.p50_ms.median


def case_markdown(case: Case, rows: Rows, order: Sequence[str]) -> str:
    """The table of one case, and where the CPU time went."""
    head = [
        "system", "c", "requests/s (min–max)", *(f"× {title}" for _, title in COMPARED_WITH),
        "p50 ms", "p50 × Ray HAProxy", "p99 ms", "p99.9 ms", "not 2xx", "socket errors", "CPU µs/request",
        "others' cores",
    ]  # fmt: skip
    lines, stages = [], []
    for name, connections in sorted(rows, key=lambda key: (key[1], order.index(key[0]))):
        row = rows[name, connections]
        title = SYSTEMS[name].title
        beside = [_times(ratio(rows, name, connections, other, per_s)) for other, _ in COMPARED_WITH]
        lines.append([
            f"**{title}**" if not SYSTEMS[name].is_peer else title, str(connections),
            f"{row.per_s.median:,.0f} ({row.per_s.low:,.0f}–{row.per_s.high:,.0f})", *beside,
            ms(row.p50_ms.median), _times(ratio(rows, name, connections, "ray-haproxy", p50)),
            ms(row.p99_ms.median), ms(row.p999_ms.median), str(row.not_2xx), str(row.socket_errors),
            f"{sum(row.cpu_us.values()):,.0f}", f"{row.others_cores:.2f}",
        ])  # fmt: skip
        if connections == max(case.connections) or connections == max(c for _, c in rows):
            top = list(row.cpu_us.items())[:5]
            stages.append([title, str(connections), ", ".join(f"{stage} {us:,.0f}" for stage, us in top)])
    return "\n\n".join(
        [f"## {case.title}", table(head, lines), table(["system", "c", "CPU µs per request, by process"], stages)]
    )


def wide_markdown(rows: Rows, order: Sequence[str]) -> str:
    """The no-op in the shape of the design's table: one line per system."""
    counts = sorted({connections for _, connections in rows})
    head = ["system", f"c={counts[0]} p50 ms", *(f"c={count} requests/s" for count in counts), "ready after s"]
    lines = []
    for name in order:
        mine = [rows.get((name, count)) for count in counts]
        first = next((row for row in mine if row), None)
        if first is not None:
            lines.append([
                SYSTEMS[name].title, f"{mine[0].p50_ms.median:.2f}" if mine[0] else "",
                *(f"{row.per_s.median:,.0f}" if row else "" for row in mine), f"{first.ready_s:.1f}",
            ])  # fmt: skip
    return table(head, lines)


@dataclass(frozen=True, slots=True)
class Aim:
    """One figure to reach, as a ratio in one run."""

    connections: int
    beside: str
    at_least: float | None = None
    at_most: float | None = None
    only: str = ""
    """Whose figure it is, if not that of all of ours."""

    def verdict(self, rows: Rows, system: str) -> list[str] | None:
        """A table line, or None where one of the two was not measured or it is not for ``system``."""
        if self.only not in ("", system):
            return None
        of = per_s if self.at_least is not None else p50
        found = ratio(rows, system, self.connections, self.beside, of)
        if found is None:
            return None
        if self.at_least is not None:
            what, asked, met = "requests/s", f"≥ {self.at_least:g} ×", found >= self.at_least
        else:
            limit = self.at_most or 0.0
            what, asked, met = "p50", f"≤ {limit:g} ×", found <= limit
        title = f"c={self.connections} {what} beside {SYSTEMS[self.beside].title}"
        return [SYSTEMS[system].title, title, asked, f"{found:.2f} ×", "met" if met else "**not met**"]


AIMS = (
    Aim(1, "ray-haproxy", at_most=0.7, only="penstock-async"),
    Aim(1, "mosec", at_most=2.0, only="penstock-async"),
    Aim(32, "mosec", at_least=1.2, only="penstock-async"),
    Aim(100, "ray-haproxy", at_least=5.0, only="penstock-async"),
    Aim(100, "mosec", at_least=1.8, only="penstock-async"),
    Aim(100, "ray", at_least=15.0),
    # The row "Penstock" is a `def`, beside Ray's `async def`.
    Aim(1, "ray-haproxy", at_most=1.0, only="penstock"),
)


def aims_markdown(rows: Rows) -> str:
    """Return the aims for the no-op beside the figures that were measured; empty without Penstock."""
    ours = [name for name, system in SYSTEMS.items() if not system.is_peer]
    lines = [line for name in ours for aim in AIMS if (line := aim.verdict(rows, name))]
    return table(["system", "figure", "wanted", "found", ""], lines) if lines else ""


BARE_COST_AT_MOST = 0.15


def bare_markdown(visits: Sequence[Visit]) -> str:
    """The cost of the defaults over the bare paths: medians of each round's ratios. Empty unless both were measured.

    The machine drifts by more than this cost; two systems of the same round are a minute apart.
    """
    lines = []
    ours = [visit for visit in visits if visit.system == "path"]
    for name in ("path-xadd", "path-script"):
        bare = [visit for visit in visits if visit.system == name]
        pairs = [
            (one, other)
            for visit, beside in zip(ours, bare, strict=False)
            for one, other in zip(visit.samples, beside.samples, strict=True)
        ]
        for what, costs in (
            ("requests/s lost", [1 - one.load.per_s / other.load.per_s for one, other in pairs]),
            ("CPU µs/request more", [_cpu_us(one) / _cpu_us(other) - 1 for one, other in pairs]),
        ):
            if costs:
                cost = Figure.of(costs)
                lines.append([
                    SYSTEMS[name].title, what, f"{cost.median:.1%} ({cost.low:.1%} to {cost.high:.1%})",
                    f"≤ {BARE_COST_AT_MOST:.0%}", _bare_verdict(cost),
                ])  # fmt: skip
    return table(["over", "cost of the defaults", "found", "wanted", ""], lines) if lines else ""


def _bare_verdict(cost: Figure) -> str:
    verdict = "met" if cost.median <= BARE_COST_AT_MOST else "**not met**"
    agree = cost.high <= BARE_COST_AT_MOST or cost.low > BARE_COST_AT_MOST
    return verdict if agree else f"{verdict}, but rounds lie on both sides"


def _cpu_us(sample: Sample) -> float:
    return sum(sample.cpu_us.values())


def as_json(visits: Sequence[Visit], rows: Rows) -> dict[str, Any]:
    """Everything, raw and condensed."""
    return {"rows": [asdict(row) for row in rows.values()], "visits": [asdict(visit) for visit in visits]}


def ms(value: float) -> str:
    """Milliseconds to three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    numeric = ["---" if index == 0 else "---:" for index in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, numeric, *lines])
