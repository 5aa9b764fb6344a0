"""Cost of bodies: images with a small reply, and an echo, through a proxy and a replica without Ray.

Runs by itself: ``python benchmarks/systems/costs/penstock_bodies.py --kib 150 --connections 32``. Prints requests/s and
the CPU of proxy, replica and Valkey per request. wrk is the client.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

ENDPOINT = "bodies"


async def echo(request: Any) -> Any:
    """Return the body."""
    return request.data


async def image(request: Any) -> dict[str, int]:
    """Return the number of bytes of the body."""
    return {"bytes": len(request.data)}


def cpu_us(pid: int) -> float:
    """Return the CPU time of all threads of a process, in µs."""
    return sum(int(task.read_text().split()[0]) for task in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1000


def load(url: str, script: str, connections: int, seconds: int) -> int:
    """Return how many requests were answered."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", script, url]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\d+) requests in", out)
    if found is None or "Non-2xx" in out or found[1] == "0":
        raise SystemExit(f"the load failed:\n{out}")
    return int(found[1])


async def run_replica(url: str) -> None:
    from penstock.workers.serving import Serving

    await Serving(url, "default", ENDPOINT, f"{ENDPOINT}#1").ready()
    await asyncio.Event().wait()


async def declare(url: str, workload: str) -> None:
    """Write the backend and its endpoint into the registry."""
    from penstock.broker.registry.records import BackendRecord, Change, EndpointRecord
    from penstock.broker.registry.store import Registry
    from penstock.broker.transport.connection import RedisConnection
    from penstock.broker.wire.keys import Keys
    from penstock.workers.executing import user_code

    connection = await RedisConnection(url).open()
    registry = Registry(connection, Keys("default"))
    code = await registry.put_code(user_code.dump(echo if workload == "echo" else image))
    backend = BackendRecord(tag=ENDPOINT, version="1", code=code)
    endpoint = EndpointRecord(name=ENDPOINT, route="/", methods=("POST",), traffic={ENDPOINT: 1.0})
    await registry.change(lambda _: Change({ENDPOINT: backend}, {ENDPOINT: endpoint}))
    await connection.close()


async def run_proxy(url: str, port: int) -> None:
    from penstock.proxy.proxy import Proxy

    await Proxy(url, "default", "proxy", {"port": port}).ready()
    await asyncio.Event().wait()


def wait_for(url: str) -> None:
    """Return when the server answers a request."""
    ends_s = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(url, b"x"), timeout=10).read()
            return
        except OSError:
            if time.monotonic() > ends_s:
                raise
            time.sleep(0.1)


def measure(workload: str, kib: int, connections: int, rounds: int, port: int) -> None:
    from penstock.broker.embedded.server import EmbeddedServer

    with EmbeddedServer.start() as broker, tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "post.lua"
        script.write_text(f'wrk.method = "POST"\nwrk.body = string.rep("x", {kib * 1024})\n')
        asyncio.run(declare(broker.url, workload))
        program = [sys.executable, __file__, "--port", str(port)]
        processes = [subprocess.Popen([*program, "--part", part, "--url", broker.url]) for part in ("proxy", "replica")]
        pids = {"proxy": processes[0].pid, "replica": processes[1].pid, "valkey": broker.pid or 0}
        url = f"http://127.0.0.1:{port}/"
        try:
            wait_for(url)
            load(url, str(script), connections, 1)
            seen: list[dict[str, float]] = []
            for _ in range(rounds):
                before = {name: cpu_us(pid) for name, pid in pids.items()}
                count = load(url, str(script), connections, 1)
                seen.append({name: (cpu_us(pid) - before[name]) / count for name, pid in pids.items()})
                seen[-1]["requests/s"] = count
        finally:
            for process in processes:
                process.kill()
                process.wait()
    medians = {name: statistics.median(one[name] for one in seen) for name in seen[0]}
    cost = ", ".join(f"{name} {medians[name]:.0f} us" for name in pids)
    print(f"{workload}, {kib} KiB, {connections} connections: {medians['requests/s']:,.0f} requests/s; {cost}")


def leave(number: int, frame: object) -> None:
    """Exit, so that the parts are ended too."""
    sys.exit(128 + number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=("image", "echo"), default="image")
    parser.add_argument("--kib", type=int, default=150)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=18_700)
    parser.add_argument("--part", choices=("proxy", "replica"), help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    job = parser.parse_args()
    if job.part is None:
        signal.signal(signal.SIGTERM, leave)
        measure(job.workload, job.kib, job.connections, job.rounds, job.port)
        return
    import uvloop

    uvloop.run(run_replica(job.url) if job.part == "replica" else run_proxy(job.url, job.port))


if __name__ == "__main__":
    main()
