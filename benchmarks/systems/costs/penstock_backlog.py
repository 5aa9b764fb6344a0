"""Penstock with web traffic beside a batch: what that costs the web.

One replica behind HTTP takes batches of 64, as a no-op and then 5 ms for each. First it tells how long a batch
occupies it: the 5 ms, and the CPU time of its process. Then it is asked 100 times a second in an open loop: idle,
beside a batch with the window that a producer chooses, and beside one that is queued as a whole. All parts share the
machine: proxy, replica, Redis, the generator of the load, and the producer, a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).resolve().parents[2]))
from harness.measurements import rates
from harness.wrk import Target

if TYPE_CHECKING:
    from penstock import serve

BATCH_SIZE = 64
SERVICE_S = 0.005
RATE_PER_S = 100


def noop(requests: list[Any]) -> list[float]:
    """Answer with the CPU time of the replica so far."""
    return [time.process_time()] * len(requests)


def sleep(requests: list[Any]) -> list[float]:
    time.sleep(SERVICE_S)
    return noop(requests)


def batch_cpu_s(client: serve.Client, endpoint: str, seconds: float) -> float:
    """Send batches and nothing else; return the CPU time that each of `BATCH_SIZE` takes its replica."""
    ends = time.monotonic() + seconds
    items = iter(lambda: time.monotonic() < ends, False)
    cpu_s = sorted(result.get() for result in client.batch(endpoint).as_completed(items))
    return (cpu_s[-1] - cpu_s[0]) / len(cpu_s) * BATCH_SIZE


def produce(url: str, endpoint: str, window: int) -> None:
    """Send items until ended, at the priority that `penstock batch` gives itself."""
    from penstock import handles

    os.nice(19)
    producer = handles.connect(url).batch(endpoint, window=window or None)
    for done, _ in enumerate(producer.as_completed(iter(int, 1))):
        if done == BATCH_SIZE:
            print("begun", flush=True)


@contextmanager
def producing(url: str, endpoint: str, window: int) -> Generator[None]:
    command = [sys.executable, __file__, "--produce", url, endpoint, str(window)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as producer:
        assert producer.stdout is not None
        producer.stdout.readline()
        yield
        producer.kill()


def main() -> None:
    """Print a line of JSON for each kind of work and each moment."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--produce", nargs=3)
    asked = parser.parse_args()
    if asked.produce:
        url, endpoint, window = asked.produce
        produce(url, endpoint, int(window))
        return
    from penstock import serve

    with serve.start(http_options={"port": 0}) as client:
        for name, function, service_s in (("no-op", noop, 0.0), ("sleep", sleep, SERVICE_S)):
            config = {"max_batch_size": BATCH_SIZE, "max_queued_requests": 2 * asked.items}
            client.create_backend(name, serve.accept_batch(function), config=config)
            client.create_endpoint(name, backend=name, route=f"/{name}", methods=["GET"])
            target = Target(f"{client.http_url}/{name}", "GET", None, "")

            def queued(name: str = name) -> int:
                return int(client.status()["backends"][name]["queued"])

            rates.pace("warming up", target, rate=RATE_PER_S, seconds=2.0, seed=0, servers=0)
            occupied_ms = (service_s + batch_cpu_s(client, name, asked.seconds / 2)) * 1e3

            def pace(when: str, name: str = name, target: Target = target, occupied_ms: float = occupied_ms) -> None:
                seen = rates.pace(when, target, rate=RATE_PER_S, seconds=asked.seconds, seed=1, servers=0)
                line = {
                    "work": name, "service_ms": occupied_ms, "when": when, "queued": queued(),
                    "p50_ms": seen.p50_ms, "p99_ms": seen.p99_ms,
                    "not_2xx": seen.not_2xx, "unanswered": seen.unanswered,
                }  # fmt: skip
                print("\n@@" + json.dumps(line), flush=True)

            pace("idle")
            with producing(client.redis_url, name, 0):
                pace("beside a batch")
            with producing(client.redis_url, name, asked.items):
                give_up = time.monotonic() + 30.0
                while queued() < 0.9 * asked.items and time.monotonic() < give_up:
                    time.sleep(0.2)
                pace("all of it queued")
            client.delete_endpoint(name)
            client.delete_backend(name, force=True)


if __name__ == "__main__":
    main()
