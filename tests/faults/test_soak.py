"""Memory, keys and connections are given back after a long load."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from redis import Redis

from penstock import serve
from penstock.broker.embedded.server import EmbeddedServer
from tests.faults.conftest import Scale, StartClient
from tests.faults.load import soaker
from tests.faults.load.backends import echo
from tests.faults.load.table import Row, Table
from tests.serve.backends import SMALL, replicas
from tests.support.waiting import wait_until

_PAGE = os.sysconf("SC_PAGE_SIZE")
_WEB_THREADS = 3
WARM_UPS = 3
"""At rest a process keeps more of what it no longer uses at one time and less at another, by how the last large bodies
lay. So its base is the most that it had after any of a few, and it has as many chances to come back to it.
"""
GROWTH = 0.10
REST_S = 25.0
"""At rest, a proxy and a replica give back what they do not need when their health is checked: every 5 and 10 s."""


def test_a_soak_leaves_memory_as_it_was(start: StartClient, broker: EmbeddedServer, scale: Scale, table: Table) -> None:
    """Bodies of all sizes, by claim check or not, in both directions."""
    client = start(http_options={"port": 0})
    client.create_backend("work", echo, ray_actor_options=SMALL)
    client.create_endpoint("work", backend="work", route="/job", methods=["POST"])
    (replica,), (proxy,) = replicas(client, "work").values(), client.status()["proxies"].values()
    with handle_process(client.redis_url) as handle, Redis.from_url(broker.url) as redis:
        pids = {"proxy": proxy["pid"], "replica": replica, "handle": handle.pid, "Redis": broker.pid or 0}

        def resting_mib() -> dict[str, float]:
            wait_until(lambda: not redis.keys("penstock:*:body:*"))
            return {part: resident_mib(pid) for part, pid in pids.items()}

        bases = list[dict[str, float]]()
        for _ in range(WARM_UPS):
            soak(client, handle, scale.soak_s / 5)
            bases.append(resting_mib())
        base = {part: max(one[part] for one in bases) for part in pids}
        calls = soak(client, handle, scale.soak_s)
        least = resting_mib()

        def is_back() -> bool:
            now = resting_mib()
            least.update({part: min(least[part], now[part]) for part in pids})
            return all(least[part] <= (1 + GROWTH) * base[part] for part in pids)

        for _ in range(WARM_UPS):
            with suppress(AssertionError):
                wait_until(is_back, REST_S)
                break
            soak(client, handle, 1.0)
    notes = ", ".join(f"{part} {base[part]:.0f} MiB x {least[part] / base[part]:.2f}" for part in pids)
    table.add(Row("soak, 1 B to 10 MiB", scale.soak_s, calls, calls, notes=notes))
    assert all(least[part] <= (1 + GROWTH) * base[part] for part in pids), notes


@contextmanager
def handle_process(url: str) -> Generator[subprocess.Popen[str]]:
    """A process of its own, so that its memory is its own."""
    command = [sys.executable, "-m", "tests.faults.load.soaker", url]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def soak(client: serve.Client, handle: subprocess.Popen[str], for_s: float) -> int:
    """Call from that process, and over HTTP from this one; return how often. All answers are what was sent."""
    assert handle.stdin is not None
    assert handle.stdout is not None
    handle.stdin.write(f"{for_s}\n")
    handle.stdin.flush()
    ends_s, counts = time.monotonic() + for_s, list[int]()

    def by_http() -> None:
        done = 0
        with httpx.Client(timeout=60) as web:
            while time.monotonic() < ends_s:
                sent = soaker.some_bytes()
                assert web.post(f"{client.http_url}/job", content=sent).content == sent
                done += 1
        counts.append(done)

    threads = [threading.Thread(target=by_http) for _ in range(_WEB_THREADS)]
    for thread in threads:
        thread.start()
    by_handle = int(handle.stdout.readline())
    for thread in threads:
        thread.join()
    assert len(counts) == _WEB_THREADS
    return by_handle + sum(counts)


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE / 2**20
