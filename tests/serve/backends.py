"""Code to deploy, and a look at where it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from penstock import serve
from penstock.handles import background_loop
from penstock.serve.instance import Instance

SMALL = {"num_cpus": 0.1}
"""So that many replicas fit into the tests' cluster."""


def answering(value: Any) -> Callable[[serve.Request], Any]:
    def answer(request: serve.Request) -> Any:
        return value

    return answer


class Slow:
    """Takes its time, and tells who it is."""

    def __init__(self, name: str = "slow") -> None:
        self.name = name

    async def __call__(self, request: serve.Request) -> str:
        await asyncio.sleep(0.05)
        return self.name


def replicas(client: serve.Client, tag: str = "f") -> dict[str, int]:
    """The process of each replica that is ready and has not begun to go."""

    async def read() -> dict[str, int]:
        instance = await Instance(client.redis_url, "default").open()
        try:
            reports = await instance.registry.reports("replicas")
        finally:
            await instance.close()
        return {
            name: report["pid"]
            for name, report in reports.items()
            if report["backend"] == tag and report["state"] == "ready"
        }

    return background_loop.run(read())
