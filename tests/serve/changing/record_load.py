"""Record the queue depths of a real backend that scales, under a load that rises, bursts and ends.

``python -m tests.serve.changing.record_load > tests/serve/controller/load_curve.csv`` takes about a minute and a half;
`test_autoscaler` runs the policy on what it writes.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import ray

from penstock import serve
from penstock.broker.queue.counts.queue_depth import read_depth
from penstock.broker.registry.reports import BackendStatus
from penstock.broker.registry.store import Registry
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys

SCALING: dict[str, Any] = {"min_replicas": 1, "max_replicas": 8, "target_queue_per_replica": 4, "downscale_delay_s": 5}
SERVICE_S = 0.08
SAMPLE_S = 0.5
SECONDS = 70.0
BURST_S, BURST = 35.0, 150


def rate(now_s: float) -> float:
    """Requests per second: a rise, a plateau, half of it from the burst on, a trickle at the end."""
    if now_s < 15.0:
        return 3.0 + 3.0 * now_s
    if now_s < BURST_S:
        return 48.0
    return 24.0 if now_s < 50.0 else 1.0


def serving_for(mean_s: float) -> Callable[[serve.Request], Any]:
    async def serve_one(request: serve.Request) -> None:
        # Mostly short and sometimes long.
        await asyncio.sleep(mean_s * random.lognormvariate(-0.32, 0.8))

    return serve_one


class Recording:
    def __init__(self, client: serve.Client) -> None:
        self._handle = client.get_handle("e", sync=False)
        self._connection, self._keys = RedisConnection(client.redis_url), Keys(client.instance)
        self._registry = Registry(self._connection, self._keys)
        self._arrived = 0
        self._answers: list[asyncio.Task[Any]] = []

    async def run(self) -> None:
        await self._connection.open()
        began_s = time.monotonic()
        sending = asyncio.create_task(self._send(began_s))
        print("at_s,arrived,unsettled,in_progress,wanted,ready")
        while (now_s := time.monotonic() - began_s) < SECONDS:
            load = await read_depth(self._connection, self._keys, "f")
            status = (await self._registry.get_reports(BackendStatus))["f"]
            counted = (self._arrived, load.unsettled, load.in_progress, status.wanted, status.ready)
            print(f"{now_s:.2f}", *counted, sep=",")
            await asyncio.sleep(SAMPLE_S - now_s % SAMPLE_S)
        sending.cancel()
        await asyncio.gather(*self._answers)
        await self._connection.close()

    async def _send(self, began_s: float) -> None:
        at_s, burst = 0.0, BURST
        while True:
            at_s += random.expovariate(rate(at_s))
            if at_s > BURST_S:
                for _ in range(burst):
                    self._send_one()
                burst = 0
            await asyncio.sleep(max(0.0, began_s + at_s - time.monotonic()))
            self._send_one()

    def _send_one(self) -> None:
        async def ask() -> None:
            await (await self._handle.remote())

        self._arrived += 1
        self._answers.append(asyncio.create_task(ask()))


def main() -> None:
    random.seed(7)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=8)
    with serve.start(http_options={"location": None}) as client:
        config = {"max_concurrent_queries": 1, "autoscaling_config": SCALING}
        client.create_backend("f", serving_for(SERVICE_S), config=config, ray_actor_options={"num_cpus": 0.1})
        client.create_endpoint("e", backend="f")
        print(f"# Recorded by tests/serve/changing/record_load.py on {datetime.now(timezone.utc):%Y-%m-%d}, ", end="")
        print(f"{os.cpu_count()} CPUs, Python {sys.version.split()[0]}, Ray {ray.__version__}.")
        print(f"# A real backend with {SCALING},")
        print(
            f"# replicas that serve one request at a time, in {SERVICE_S} s on average (lognormal); Poisson arrivals,"
        )
        print(f"# and {BURST} at once after {BURST_S:g} s. at_s: since the start; arrived: requests sent until then.")
        asyncio.run(record(client))


async def record(client: serve.Client) -> None:
    await Recording(client).run()


if __name__ == "__main__":
    main()
