"""Penstock as a user starts it: embedded Redis, local Ray, everything at its default."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from program import MAX_BATCH_SIZE, NOOP_ANSWER, SLEEP_S, Job, SleepingModel, parse, run_until_ended

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


class Digits:
    def __init__(self) -> None:
        from digit_model import Model

        self.model = Model()

    @serve.accept_batch
    def __call__(self, requests: list[Any]) -> list[Any]:
        return self.model.answers([request.data for request in requests])


def sleep_for_each_batch(call_s: float) -> Any:
    model = SleepingModel(call_s)

    def answer(requests: list[Any]) -> list[Any]:
        return model.answers(len(requests))

    return serve.accept_batch(answer)


def main(job: Job) -> None:
    """Serve at ``/``. ``PENSTOCK_BENCH_ASYNC=1`` makes the no-op an ``async def``.

    ``PENSTOCK_BENCH_PROXIES`` is the number of proxies. The broker's URL is left in the scratch folder.
    """
    code: dict[str, Any] = {"noop": noop, "echo": echo, "sleep": sleep, "digits": Digits}
    if os.environ.get("PENSTOCK_BENCH_ASYNC") == "1":
        code["noop"] = async_noop
    code[job.workload] = sleep_for_each_batch(job.batch_call_s) if job.batch_call_s else code[job.workload]
    proxies = int(os.environ.get("PENSTOCK_BENCH_PROXIES", "1"))
    with serve.start(http_options={"port": job.port, "proxies_per_node": proxies}) as client:
        (Path(tempfile.gettempdir()) / "redis-url").write_text(client.redis_url)
        client.create_backend(
            job.workload,
            code[job.workload],
            config={
                "num_replicas": job.replicas,
                "max_batch_size": MAX_BATCH_SIZE if job.takes_batches else None,
            },
            ray_actor_options={"num_cpus": 0},  # more replicas than cores: these ones sleep
        )
        client.create_endpoint(job.workload, backend=job.workload, route="/", methods=["GET", "POST"])
        run_until_ended()


if __name__ == "__main__":
    main(parse())
