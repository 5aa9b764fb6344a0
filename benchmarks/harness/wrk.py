"""Closed-loop load by wrk: every connection asks, waits for the answer, and asks again."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).with_name("wrk.lua")
TIMEOUT_S = 10
"""An answer that takes longer counts as a socket error."""


class LoadFailed(Exception):
    """wrk itself could not run."""


@dataclass(frozen=True, slots=True)
class Target:
    """One request: where to, and what. ``body`` names a file."""

    url: str
    method: str
    body: Path | None = None
    content_type: str = "application/json"


@dataclass(frozen=True, slots=True)
class Load:
    """The results of one run of wrk."""

    requests: int
    seconds: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float
    not_2xx: int
    """Answers with a status of 400 or above: wrk counts no others as wrong."""
    socket_errors: int
    wrk_cpu_s: float

    @property
    def per_s(self) -> float:
        return self.requests / self.seconds


def require() -> None:
    """Raise ``LoadFailed``, with the command that installs wrk, if there is none."""
    if shutil.which("wrk") is None:
        raise LoadFailed("wrk is not installed; on Debian and Ubuntu: apt-get install wrk")


def load(target: Target, *, connections: int, seconds: float, threads: int = 1) -> Load:
    """Ask as fast as ``connections`` connections get answers, for ``seconds`` (whole ones, at least 1)."""
    whole_s = max(1, round(seconds))
    command = [
        "wrk", "-t", str(threads), "-c", str(connections), "-d", f"{whole_s}s", "--timeout", f"{TIMEOUT_S}s",
        "-s", str(SCRIPT), target.url, "--", target.method, str(target.body or ""), target.content_type,
    ]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        ran = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=whole_s + TIMEOUT_S + 20
        )
    except subprocess.TimeoutExpired:
        raise LoadFailed(f"wrk did not end {TIMEOUT_S + 20} s after its time: {' '.join(command)}") from None
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = next((line for line in ran.stdout.splitlines() if line.startswith("@@")), None)
    if ran.returncode != 0 or line is None:
        raise LoadFailed(f"wrk left with {ran.returncode}: {ran.stdout}{ran.stderr}")
    said: dict[str, int] = json.loads(line[2:])
    return Load(
        requests=said["requests"],
        seconds=said["duration_us"] / 1e6,
        p50_ms=said["p50_us"] / 1e3,
        p90_ms=said["p90_us"] / 1e3,
        p99_ms=said["p99_us"] / 1e3,
        p999_ms=said["p999_us"] / 1e3,
        max_ms=said["max_us"] / 1e3,
        not_2xx=said["not_2xx"],
        socket_errors=sum(said[kind] for kind in ("connect_errors", "read_errors", "write_errors", "timeouts")),
        wrk_cpu_s=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    )
