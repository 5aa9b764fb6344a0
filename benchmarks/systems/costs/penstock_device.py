"""Utilization of a simulated GPU with one and with two concurrent batches, and the waits of other requests.

Runs by itself, without Ray and without a GPU. A call gives its batch to the device and waits. The device computes the
batches in this order, for 20 ms each, without the interpreter lock; before and after that, the code needs the processor
for 3 ms and 1 ms. First the queue of one
replica is kept full. Then requests reach two replicas at random moments, at half of what two devices can compute.
Prints a table, and all it has seen as lines of JSON.
"""

# ruff: noqa: RUF001  (dashes in tables)

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))
from harness.report import Figure, table

from penstock import serve

INSTANCE, BACKEND = "default", "images"
BATCH_SIZE = 64
PREPARE_S, COMPUTE_S, FINISH_S = 0.003, 0.020, 0.001
IN_FLIGHT = 256
WARM_UP_S = 2.0
WAITED_S = 0.001
"""A batch that waited longer than this for its device counts as one that waited."""


def use_processor(seconds: float) -> None:
    """Hold the interpreter lock like Python code that computes, for this much CPU time."""
    ends = time.thread_time() + seconds
    while time.thread_time() < ends:
        pass


class Device:
    """A queue of batches, each of which takes `COMPUTE_S`."""

    def __init__(self) -> None:
        self._launching = threading.Lock()
        self._free_at_s = 0.0

    def compute(self) -> tuple[float, float]:
        """Wait until the device has computed a batch; return when it began and ended."""
        with self._launching:
            begins_s = max(time.monotonic(), self._free_at_s)
            self._free_at_s = ends_s = begins_s + COMPUTE_S
        time.sleep(max(0.0, ends_s - time.monotonic()))
        return begins_s, ends_s


class Images:
    """Answers each request with the fields of the `Batch` that it was in."""

    def __init__(self) -> None:
        self.device = Device()

    @serve.accept_batch
    def __call__(self, requests: list[Any]) -> list[list[float]]:
        entered_s = time.monotonic()
        use_processor(PREPARE_S)
        ready_s = time.monotonic()
        computed_from_s, computed_to_s = self.device.compute()
        use_processor(FINISH_S)
        batch = [os.getpid(), len(requests), entered_s, ready_s, computed_from_s, computed_to_s, time.monotonic()]
        return [batch] * len(requests)


@dataclass(frozen=True, slots=True, order=True)
class Batch:
    """One batch, in seconds of the clock that all processes share."""

    replica: int
    size: int
    entered_s: float
    ready_s: float
    computed_from_s: float
    computed_to_s: float
    left_s: float


@dataclass(frozen=True, slots=True)
class Seen:
    """One load on one configuration."""

    load: str
    at_a_time: int
    items_per_s: float
    mean_batch: float
    busy: float
    """Share of the time in which a device computed."""
    between_ms: float
    """Mean time from the end of a call to the begin of the next, where the queue was full."""
    p50_ms: float
    p99_ms: float
    held_up: float
    """Share of requests whose batch waited for its device although another replica was idle."""


async def host(url: str, number: int) -> None:
    """Run one replica in this process until its standard input ends."""
    from penstock.workers.serving import Serving

    await Serving(url, INSTANCE, BACKEND, f"{BACKEND}#{number}").ready()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    os._exit(0)


@contextmanager
def replicas(url: str, count: int) -> Generator[None]:
    running: list[subprocess.Popen[str]] = []
    try:
        for number in range(count):
            command = [sys.executable, __file__, "--host", url, "--number", str(number)]
            running.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        for process in running:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise SystemExit("a replica did not start")
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


async def declare(url: str, at_a_time: int) -> None:
    from penstock.broker.registry.records import BackendRecord, BackendSpec, Change, EndpointRecord
    from penstock.broker.registry.store import Registry
    from penstock.broker.transport.connection import RedisConnection
    from penstock.broker.wire.keys import Keys
    from penstock.workers.executing.user_code import dump

    connection = await RedisConnection(url).open()
    registry = Registry(connection, Keys(INSTANCE))
    code = await registry.put_code(dump(Images))
    config = BackendSpec(max_batch_size=BATCH_SIZE, max_concurrent_queries=at_a_time if at_a_time > 1 else None)
    record = BackendRecord(tag=BACKEND, version="1", code=code, config=config)
    endpoint = EndpointRecord(name=BACKEND, traffic={BACKEND: 1.0})
    await registry.change(lambda seen: Change({BACKEND: record}, {BACKEND: endpoint}))
    await connection.close()


class Caller:
    """Calls the backend, and keeps what its answers tell of the time after the warm-up."""

    def __init__(self, url: str, seconds: float) -> None:
        from penstock import handles

        self._handle: Any = handles.connect(url).get_handle(BACKEND, sync=False)
        self.begins_s = time.monotonic() + WARM_UP_S
        self.ends_s = self.begins_s + seconds
        self.took_s: list[float] = []
        self.batches: set[Batch] = set()

    async def call(self) -> None:
        sent_s = time.monotonic()
        batch = Batch(*await (await self._handle.remote("x")))
        if self.begins_s <= batch.entered_s and batch.left_s <= self.ends_s:
            self.took_s.append(time.monotonic() - sent_s)
            self.batches.add(batch)

    async def closed_loop(self, in_flight: int) -> None:
        async def one_at_a_time() -> None:
            while time.monotonic() < self.ends_s:
                await self.call()

        await asyncio.gather(*(one_at_a_time() for _ in range(in_flight)))

    async def open_loop(self, per_s: float, seed: int) -> None:
        choose, calls = random.Random(seed), list[asyncio.Task[None]]()
        at_s = time.monotonic()
        while at_s < self.ends_s:
            at_s += choose.expovariate(per_s)
            if (early_s := at_s - time.monotonic()) > 0:
                await asyncio.sleep(early_s)
            calls.append(asyncio.create_task(self.call()))
        await asyncio.gather(*calls)


def measure(at_a_time: int, count: int, seconds: float, seed: int) -> Seen:
    from penstock.broker.embedded.server import EmbeddedServer

    with EmbeddedServer.start() as server:
        asyncio.run(declare(server.url, at_a_time))
        with replicas(server.url, count):
            return asyncio.run(load(server.url, at_a_time, count, seconds, seed))


async def load(url: str, at_a_time: int, count: int, seconds: float, seed: int) -> Seen:
    caller = Caller(url, seconds)
    if count == 1:
        name = f"full queue, {IN_FLIGHT} in flight"
        await caller.closed_loop(IN_FLIGHT)
    else:
        name = f"{count} replicas, half of capacity"
        # Batches are as large as the load makes them: this many requests of one each would fill half of the devices.
        await caller.open_loop(count / COMPUTE_S / 2, seed)
    batches = sorted(caller.batches, key=lambda batch: batch.entered_s)
    if not batches:
        raise SystemExit("no batch ended in time")
    items = sum(batch.size for batch in batches)
    between_s = [later.entered_s - batch.left_s for batch, later in pairwise(batches)]
    *_, p99_s = quantiles(caller.took_s, n=100)
    return Seen(
        name,
        at_a_time,
        items / seconds,
        items / len(batches),
        sum(batch.computed_to_s - batch.computed_from_s for batch in batches) / seconds / count,
        1000 * sum(between_s) / len(between_s) if count == 1 and at_a_time == 1 else 0.0,
        1000 * median(caller.took_s),
        1000 * p99_s,
        sum(batch.size for batch in batches if held_up(batch, batches, count)) / items,
    )


def held_up(batch: Batch, batches: list[Batch], count: int) -> bool:
    """Return whether a batch waited for its device although another replica ran nothing when it began."""
    if batch.computed_from_s - batch.ready_s <= WAITED_S:
        return False
    busy = {other.replica for other in batches if other.entered_s <= batch.entered_s < other.left_s}
    return len(busy) < count


def markdown(seen: list[Seen]) -> str:
    """One line for each load and configuration: medians over the rounds."""
    groups: dict[tuple[str, int], list[Seen]] = {}
    for one in seen:
        groups.setdefault((one.load, one.at_a_time), []).append(one)
    lines = []
    for (name, at_a_time), runs in groups.items():
        busy = Figure.of([one.busy for one in runs])
        lines.append([
            name, str(at_a_time), f"{Figure.of([one.items_per_s for one in runs]).median:,.0f}",
            f"{Figure.of([one.mean_batch for one in runs]).median:.1f}",
            f"{busy.median:.3f} ({busy.low:.3f}–{busy.high:.3f})",
            f"{Figure.of([one.between_ms for one in runs]).median:.2f}" if at_a_time == 1 and "full" in name else "",
            f"{Figure.of([one.p50_ms for one in runs]).median:.1f}",
            f"{Figure.of([one.p99_ms for one in runs]).median:.1f}",
            f"{Figure.of([one.held_up for one in runs]).median:.0%}" if "full" not in name else "",
        ])  # fmt: skip
    head = ["load", "batches at a time", "items/s", "mean batch", "device busy (lowest–highest)", "ms between calls",
            "p50 ms", "p99 ms", "held up"]  # fmt: skip
    return table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--host", metavar="URL", help="be a replica; the program starts these itself")
    parser.add_argument("--number", type=int, default=0)
    asked = parser.parse_args()
    if asked.host:
        asyncio.run(host(asked.host, asked.number))
        return
    seen = []
    for round_number in range(asked.rounds):
        for count in (1, 2):
            for at_a_time in (1, 2):
                seen.append(measure(at_a_time, count, asked.seconds, round_number))
                print("@@" + json.dumps(asdict(seen[-1])), flush=True)
    best = COMPUTE_S / (PREPARE_S + COMPUTE_S + FINISH_S)
    print(f"\nOne batch at a time keeps the device busy for {best:.3f} of the time at best.\n\n{markdown(seen)}")


if __name__ == "__main__":
    main()
