"""Penstock as a user starts it: embedded Redis, local Ray, everything at its default."""

from __future__ import annotations

import os
import time
from typing import Any

from program import NOOP_ANSWER, SLEEP_S, Job, parse, run_until_ended

from penstock import serve


def noop(request: Any) -> Any:
    return NOOP_ANSWER


async def async_noop(request: Any) -> Any:
    return NOOP_ANSWER


async def echo(request: Any) -> Any:
    return await request.body()


def sleep(request: Any) -> Any:
    time.sleep(SLEEP_S)
    return NOOP_ANSWER


def main(job: Job) -> None:
    """Serve at ``/``. ``PENSTOCK_BENCH_ASYNC=1`` makes the no-op an ``async def``."""
    functions = {"noop": noop, "echo": echo, "sleep": sleep}
    if os.environ.get("PENSTOCK_BENCH_ASYNC") == "1":
        functions["noop"] = async_noop
    with serve.start(http_options={"port": job.port}) as client:
        client.create_backend(
            job.workload,
            functions[job.workload],
            config={"num_replicas": job.replicas},
            ray_actor_options={"num_cpus": 0},  # more replicas than cores: these ones sleep
        )
        client.create_endpoint(job.workload, backend=job.workload, route="/", methods=["GET", "POST"])
        run_until_ended()


if __name__ == "__main__":
    main(parse())
