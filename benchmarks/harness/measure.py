"""One system, started, loaded at each number of connections, and ended again."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from .cases import Case
from .catalogue import System
from .processes import Program, ProgramFailed, busy_s
from .wrk import Load, Target, load

WARM_UP_S = 1.5
SETTLE_S = 0.5


@dataclass(frozen=True, slots=True)
class Sample:
    """One load, and the CPU time of the processes meanwhile."""

    connections: int
    load: Load
    cpu_us: dict[str, float]
    """CPU microseconds per request, by process."""
    others_cores: float
    """Cores that other processes of this machine used meanwhile: the more, the less the figures are worth."""


@dataclass(frozen=True, slots=True)
class Visit:
    """One system's turn in one round."""

    system: str
    ready_s: float
    samples: list[Sample]


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(target: Target, timeout_s: float = 5.0) -> tuple[int, bytes]:
    """Ask once. A server that does not answer is status 0."""
    parts = urlsplit(target.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    body = target.body.read_bytes() if target.body else None
    try:
        connection.request(
            target.method, parts.path, body, {"Content-Type": target.content_type} if body is not None else {}
        )
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        return 0, str(error).encode()
    finally:
        connection.close()


def check(target: Target, case: Case) -> None:
    """Raises ``ProgramFailed`` unless the answer is the one that the workload is defined by."""
    status, said = ask(target, timeout_s=30.0)
    if status != 200 or b"".join(said.split()) != case.answer():
        raise ProgramFailed(f"{target.url} answered {status} {said[:200]!r}")


@dataclass(frozen=True, slots=True)
class Served:
    """A system that answers, and what to ask it in each case that it was started for."""

    system: System
    program: Program
    targets: Mapping[str, Target]
    ready_s: float


@contextlib.contextmanager
def serving(system: System, cases: Sequence[Case], *, method: str = "POST") -> Iterator[Served]:
    """Start the system for ``cases`` of one workload and one number of replicas, and end it.

    Raises:
        ProgramFailed: it did not start, or did not answer as it should before or after what was done to it.
    """
    port = free_port()
    command = system.command(port=port, workload=cases[0].workload, replicas=cases[0].replicas)
    with Program(command, env=system.env) as program:
        targets = {case.name: _target(system, case, port, method, program.scratch) for case in cases}
        first = targets[cases[0].name]
        ready_s = program.wait_until(lambda: ask(first)[0] == 200, within_s=system.ready_within_s)
        for case in cases:
            check(targets[case.name], case)
        yield Served(system, program, targets, ready_s)
        for case in cases:
            check(targets[case.name], case)


def _target(system: System, case: Case, port: int, method: str, folder: Path) -> Target:
    method = method if system.get else "POST"
    body: Path | None = None
    if method != "GET":
        body = folder / f"body-of-{case.name}"
        body.write_bytes(case.body())
    kind = "application/octet-stream" if case.workload == "echo" else "application/json"
    return Target(f"http://127.0.0.1:{port}{system.path}", method, body, kind)


def visit(
    served: Served,
    case: Case,
    *,
    connections: Sequence[int],
    seconds: float,
    threads: int,
    say: Callable[[str], None] = lambda _: None,
) -> Visit:
    """One system's turn in a closed loop.

    Raises:
        LoadFailed: wrk did not run.
    """
    target = served.targets[case.name]
    load(target, connections=max(connections), seconds=WARM_UP_S, threads=threads)
    samples = []
    for count in connections:
        time.sleep(SETTLE_S)
        samples.append(sample(served.program, target, connections=count, seconds=seconds, threads=threads))
        say(f"c={count} {samples[-1].load.per_s:,.0f}/s")
    return Visit(served.system.name, served.ready_s, samples)


def sample(program: Program, target: Target, *, connections: int, seconds: float, threads: int) -> Sample:
    """Load once, and account for the machine's CPU time meanwhile."""
    before, busy_before, began = program.cpu_s(), busy_s(), time.monotonic()
    seen = load(target, connections=connections, seconds=seconds, threads=min(threads, connections))
    after, busy_after, took_s = program.cpu_s(), busy_s(), time.monotonic() - began
    used: dict[str, float] = {}
    for pid, (name, cpu_s) in after.items():
        used[name] = used.get(name, 0.0) + cpu_s - before.get(pid, (name, 0.0))[1]
    others = busy_after - busy_before - sum(used.values()) - seen.wrk_cpu_s
    per_request = {name: cpu_s / max(seen.requests, 1) * 1e6 for name, cpu_s in used.items() if cpu_s > 0}
    return Sample(
        connections, seen, dict(sorted(per_request.items(), key=lambda item: -item[1])), max(0.0, others / took_s)
    )


def versions(python: Path, names: Sequence[str]) -> dict[str, str]:
    """The installed versions of ``names`` in an environment; none if there is no such Python."""
    if not python.exists():
        return {}
    code = (
        "import importlib.metadata as m, json, sys\n"
        "seen = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: seen[n] for n in sys.argv[1:] if n in seen}))"
    )
    ran = subprocess.run([str(python), "-c", code, *names], capture_output=True, text=True, timeout=60, check=True)
    found: dict[str, str] = json.loads(ran.stdout)
    return found
