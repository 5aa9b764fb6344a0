"""Code to deploy, and the replicas that run it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from penstock import serve
from penstock.broker.registry.reports import ReplicaReport
from penstock.handles import background_loop
from penstock.serve.instance import Instance

SMALL = {"num_cpus": 0.1}
"""Resources so small that many replicas fit into the cluster of the tests."""


def answering(value: Any) -> Callable[[serve.Request], Any]:
    def answer(request: serve.Request) -> Any:
        return value

    return answer


class Slow:
    """Sleeps for a moment, and returns its name."""

    def __init__(self, name: str = "slow") -> None:
        self.name = name

    async def __call__(self, request: serve.Request) -> str:
        await asyncio.sleep(0.05)
        return self.name


def replicas(client: serve.Client, tag: str = "f") -> dict[str, int]:
    """Return the process id of each ready replica."""

    async def read() -> dict[str, int]:
        instance = await Instance(client.redis_url, "default").open()
        try:
            reports = await instance.registry.get_reports(ReplicaReport)
        finally:
            await instance.close()
        return {
            name: report.pid for name, report in reports.items() if report.backend == tag and report.state == "ready"
        }

    return background_loop.run(read())
