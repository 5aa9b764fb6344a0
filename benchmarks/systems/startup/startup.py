"""Shared parts of the programs that measure a start: a clock, memory, and lines that the harness reads."""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.append(str(Path(__file__).resolve().parents[2]))
from harness import processes, reaper

IDLE_S = 3.0
"""Memory of work just done may not have been returned yet; the idle size is read after this time."""
ANSWER_WITHIN_S = 30.0


class Clock:
    """Times the steps of a start-up, one after another."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def restart(self) -> None:
        """Let the next step begin here."""
        self._since = time.perf_counter()

    def step(self, what: str) -> None:
        """Print how long the step took that ends here."""
        now = time.perf_counter()
        print("\n@@" + json.dumps({"what": what, "seconds": now - self._since}), flush=True)
        self._since = time.perf_counter()


def first_answer(url: str) -> None:
    """Return when ``url`` answers 200."""
    parts = urlsplit(url)
    give_up = time.monotonic() + ANSWER_WITHIN_S
    while True:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=ANSWER_WITHIN_S)
        try:
            connection.request("GET", parts.path or "/")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        if time.monotonic() > give_up:
            raise TimeoutError(f"{url} did not answer 200 within {ANSWER_WITHIN_S:g} s")
        time.sleep(0.005)


def print_memory(clock: Clock, of: dict[str, str]) -> None:
    """Print what processes take when idle, beside an actor that does nothing.

    ``of`` has the titles of the processes, by their names.
    """
    import ray

    class Bare:  # inside, so that it travels by value: its process shall not import what this module does
        async def ready(self) -> None: ...

    bare: Any = ray.remote(num_cpus=0)(Bare).remote()
    ray.get(bare.ready.remote())
    clock.step("a bare actor")
    of = {**of, "Bare": "bare Ray actor"}
    time.sleep(IDLE_S)
    for pid in reaper.descendants(int(os.environ[reaper.PID])):
        name = processes.name_of(pid)
        if (title := next((title for part, title in of.items() if part in name), None)) is not None:
            print("\n@@" + json.dumps({"process": title, **memory_mib(pid)}), flush=True)
    clock.restart()


def memory_mib(pid: int) -> dict[str, float]:
    """RSS, PSS (shared pages divided among those who share them) and USS (what nobody shares)."""
    kib: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        field, value, *_ = line.split()
        kib[field.rstrip(":")] = int(value)
    uss = kib["Private_Clean"] + kib["Private_Dirty"]
    return {"rss_mib": kib["Rss"] / 1024, "pss_mib": kib["Pss"] / 1024, "uss_mib": uss / 1024}
