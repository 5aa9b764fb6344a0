"""Celery with Redis as broker and result backend: a worker without a pool (a pool of one process is slower)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from celery import Celery
from celery.result import AsyncResult
from items import measure, parse
from redis_server import redis_server

URL = os.environ.get("CELERY_ITEMS_URL", "redis://127.0.0.1:6379/0")
AT_ONCE = 1_000
"""Tasks published ahead of the results that are read. Groups, one big join and MGET were tried and are slower."""

app = Celery("celery_items", broker=URL, backend=URL)
app.conf.update(worker_prefetch_multiplier=100, result_expires=3_600, task_ignore_result=False)


@app.task(name="add_one")  # type: ignore[untyped-decorator]
def add_one(number: int) -> int:
    return number + 1


def batch(items: int) -> list[object]:
    """Thousand after thousand: one is published before the results of the last are read."""
    results: list[object] = []
    before: list[AsyncResult] = []
    for start in range(0, items, AT_ONCE):
        now = [add_one.delay(number) for number in range(start, min(start + AT_ONCE, items))]
        results.extend(result.get(timeout=60) for result in before)
        before = now
    results.extend(result.get(timeout=60) for result in before)
    return results


def main(items: int) -> None:
    """Start Redis and the worker, and this program again as their client: the URL is read when it is imported."""
    if "CELERY_ITEMS_URL" in os.environ:
        measure("batch", items, batch)
        return
    with redis_server() as port:
        environment = {**os.environ, "CELERY_ITEMS_URL": f"redis://127.0.0.1:{port}/0"}
        here = Path(__file__)
        pool = os.environ.get("CELERY_ITEMS_POOL", "solo")
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", here.stem, "worker", "--pool", pool, "--concurrency", "1",
             "--loglevel", "WARNING", "--without-gossip", "--without-mingle", "--without-heartbeat"],
            cwd=here.parent, env=environment,
        )  # fmt: skip
        try:
            subprocess.run([sys.executable, str(here), "--items", str(items)], env=environment, check=True)
        finally:
            worker.terminate()
            worker.wait(20)


if __name__ == "__main__":
    main(parse())
