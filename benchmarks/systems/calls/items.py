"""Protocol of the programs that call without HTTP: a line of JSON for each way of calling.

The work is ``items`` small integers; the function adds one to each, and the program holds all results in order at
the end. Time runs from the first item published to the last result held; a tenth as many are done before, unmeasured.
Memory is how far the most that the caller ever held has risen meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
from harness import processes, reaper


def parse() -> int:
    """Return the number of items."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=100_000)
    return int(parser.parse_args().items)


def add_one(number: int) -> int:
    return number + 1


def measure(what: str, items: int, run: Callable[[int], Sequence[object]]) -> None:
    """Run once small, once in full, and print what ``harness.calls`` reads."""
    run(max(100, items // 10))
    all_before, most_before_kib = _cpu_s(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, cpu_before = time.perf_counter(), time.process_time()
    results = run(items)
    took_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_before
    used: dict[str, float] = {}
    for pid, (name, after_s) in _cpu_s().items():
        if pid != os.getpid():
            used[name] = used.get(name, 0.0) + (after_s - all_before.get(pid, (name, 0.0))[1]) / items * 1e6
    seen = {
        "what": what,
        "items": items,
        "seconds": took_s,
        "caller_cpu_us": cpu_s / items * 1e6,
        "caller_grew_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most_before_kib) / 1024,
        "others_cpu_us": {name: us for name, us in sorted(used.items(), key=lambda one: -one[1]) if us >= 0.5},
        "wrong": sum(1 for number in range(items) if number >= len(results) or results[number] != number + 1),
    }
    print("\n@@" + json.dumps(seen), flush=True)  # whatever was printed before may lack its line end


def _cpu_s() -> dict[int, tuple[str, float]]:
    return processes.cpu_s_below(int(os.environ[reaper.PID]))


async def at_once(items: int, count: int, call: Callable[[int], Awaitable[object]]) -> list[object]:
    """All items through ``count`` coroutines, each with one call in flight."""
    results: list[object] = [None] * items
    numbers = iter(range(items))

    async def work() -> None:
        for number in numbers:
            results[number] = await call(number)

    await asyncio.gather(*(work() for _ in range(min(count, items))))
    return results


def by_threads(items: int, count: int, call: Callable[[int], object]) -> list[object]:
    """All items through ``count`` threads, each with one call in flight."""
    results: list[object] = [None] * items

    def work(first: int) -> None:
        for number in range(first, items, count):
            results[number] = call(number)

    with ThreadPoolExecutor(count) as threads:
        list(threads.map(work, range(count)))
    return results
