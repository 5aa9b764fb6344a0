"""Cost of a fleet of replicas to Redis: many replicas in a few processes, without Ray, idle and under load.

Runs by itself and as a case of ``run.py``. Each replica is the class that a replica's actor is made of, with its own
connections and its own lease; its code is a no-op. Prints a line of JSON for each layout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from redis import Redis

INSTANCE = "default"
SETTLE_S = 4.0
"""Between the start and the measurement: leases are trusted, first scans are over."""


async def answer(request: Any) -> None:
    """Do nothing."""


def tags(backends: int) -> list[str]:
    return [f"b{n}" for n in range(backends)]


async def host(url: str, replicas: int, backends: int, first: int) -> None:
    """Run replicas in this process until its standard input ends."""
    from penstock.workers.serving import Serving

    # From the beginning: if its parent is killed meanwhile, it must not go on starting.
    threading.Thread(target=end_with_parent, daemon=True).start()
    names = tags(backends)
    served = [
        Serving(url, INSTANCE, names[(first + n) % backends], f"{names[(first + n) % backends]}#{first + n}")
        for n in range(replicas)
    ]
    for start in range(0, replicas, 20):
        await asyncio.gather(*(one.ready() for one in served[start : start + 20]))
    print("ready", flush=True)
    await asyncio.Event().wait()


def end_with_parent() -> None:
    """End this process with its standard input."""
    sys.stdin.read()
    os._exit(0)


async def declare(url: str, backends: int) -> None:
    from penstock.broker.registry.records import BackendRecord, Change, EndpointRecord
    from penstock.broker.registry.store import Registry
    from penstock.broker.transport.connection import RedisConnection
    from penstock.broker.wire.keys import Keys
    from penstock.workers.executing.user_code import dump

    connection = await RedisConnection(url).open()
    registry = Registry(connection, Keys(INSTANCE))
    code = await registry.put_code(dump(answer))
    records = {tag: BackendRecord(tag=tag, version="1", code=code) for tag in tags(backends)}
    endpoints = {tag: EndpointRecord(name=tag, traffic={tag: 1.0}) for tag in records}
    await registry.change(lambda seen: Change(records, endpoints))
    await connection.close()


async def call(url: str, backends: int, in_flight: int, seconds: float) -> int:
    """Call the backends in turn, again and again; return how many answers came."""
    from penstock import handles

    connection = handles.connect(url)
    called: list[Any] = [connection.get_handle(tag, sync=False) for tag in tags(backends)]
    ends_s, answered = time.monotonic() + seconds, 0

    async def one_at_a_time(n: int) -> None:
        nonlocal answered
        while time.monotonic() < ends_s:
            await (await called[n % backends].remote())
            answered += 1
            n += in_flight

    await asyncio.gather(*(one_at_a_time(n) for n in range(in_flight)))
    return answered


@contextmanager
def hosts(url: str, replicas: int, backends: int, processes: int) -> Generator[list[subprocess.Popen[str]]]:
    running: list[subprocess.Popen[str]] = []
    try:
        first = 0
        for n in range(min(processes, replicas)):
            share = replicas // processes + (n < replicas % processes) if replicas > processes else 1
            command = [sys.executable, __file__, "--host", url, "--replicas", str(share), "--backends", str(backends)]
            running.append(
                subprocess.Popen(
                    [*command, "--first", str(first)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            first += share
        for process in running:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise SystemExit("a host of replicas did not start")
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


class Seen:
    """Counters of Redis and of the hosts, now."""

    def __init__(self, redis: Redis, running: list[subprocess.Popen[str]]) -> None:
        cpu: Any = redis.info("cpu")
        stats: Any = redis.info("commandstats")
        self.at_s = time.monotonic()
        self.redis_s = float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"])
        self.commands = {name.removeprefix("cmdstat_"): int(stat["calls"]) for name, stat in stats.items()}
        self.hosts_s = sum(_cpu_s(process.pid) for process in running)

    def since(self, before: Seen) -> dict[str, float]:
        seconds = self.at_s - before.at_s
        commands = sum(self.commands.values()) - sum(before.commands.values())
        return {
            "seconds": seconds,
            "commands_per_s": commands / seconds,
            "redis_cores": (self.redis_s - before.redis_s) / seconds,
            "host_cores": (self.hosts_s - before.hosts_s) / seconds,
        }

    def commands_since(self, before: Seen) -> dict[str, int]:
        found = {name: count - before.commands.get(name, 0) for name, count in self.commands.items()}
        return dict(sorted(((name, count) for name, count in found.items() if count), key=lambda item: -item[1]))


def _cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(replicas: int, backends: int, processes: int, seconds: float, in_flight: int) -> dict[str, Any]:
    from penstock.broker.embedded.server import EmbeddedServer

    with EmbeddedServer.start() as server, Redis.from_url(server.url) as redis:
        asyncio.run(declare(server.url, backends))
        clients_before = int(redis.info("clients")["connected_clients"])  # type: ignore[index]
        with hosts(server.url, replicas, backends, processes) as running:
            time.sleep(SETTLE_S)
            connections = int(redis.info("clients")["connected_clients"]) - clients_before  # type: ignore[index]
            before = Seen(redis, running)
            time.sleep(seconds)
            after = Seen(redis, running)
            idle, idle_commands = after.since(before), after.commands_since(before)
            before = Seen(redis, running)
            answered = asyncio.run(call(server.url, backends, in_flight, seconds))
            after = Seen(redis, running)
            load, load_commands = after.since(before), after.commands_since(before)
    return {
        "replicas": replicas,
        "backends": backends,
        "connections_per_replica": connections / replicas,
        "idle": idle,
        "load": {**load, "answered": answered, "in_flight": in_flight},
        "commands": {"idle": idle_commands, "load": load_commands},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=100)
    parser.add_argument("--backends", type=int, default=1)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--host", metavar="URL", help="be a host of replicas; the program starts these itself")
    parser.add_argument("--first", type=int, default=0)
    asked = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if asked.host:
        asyncio.run(host(asked.host, asked.replicas, asked.backends, asked.first))
        return
    seen = measure(asked.replicas, asked.backends, asked.processes, asked.seconds, asked.in_flight)
    print("\n@@" + json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
