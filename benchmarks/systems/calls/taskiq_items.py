"""taskiq on Redis streams with results in Redis: one worker process, as many publishers and readers as pay."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

from items import measure, parse
from redis_server import redis_server
from taskiq import AsyncTaskiqTask
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

URL = os.environ.get("TASKIQ_ITEMS_URL", "redis://127.0.0.1:6379")
AT_ONCE = 100
"""Coroutines that publish, and coroutines that wait for results. More gained nothing."""

broker = RedisStreamBroker(URL).with_result_backend(RedisAsyncResultBackend(URL, result_ex_time=3_600))


@broker.task(task_name="add_one")
async def add_one(number: int) -> int:
    return number + 1


async def batch(items: int) -> list[object]:
    """Publish and collect at the same time; results are asked for in order, so that few are asked for too early."""
    tasks: asyncio.Queue[tuple[int, AsyncTaskiqTask[int]]] = asyncio.Queue()
    results: list[object] = [None] * items
    numbers = iter(range(items))

    async def publish() -> None:
        for number in numbers:
            tasks.put_nowait((number, await add_one.kiq(number)))

    async def collect() -> None:
        while True:
            number, task = await tasks.get()
            results[number] = (await task.wait_result(check_interval=0.02)).return_value
            tasks.task_done()

    collectors = [asyncio.create_task(collect()) for _ in range(AT_ONCE)]
    await asyncio.gather(*(publish() for _ in range(AT_ONCE)))
    await tasks.join()
    for collector in collectors:
        collector.cancel()
    return results


def main(items: int) -> None:
    """Start Redis and the worker, and this program again as their client: taskiq reads its URL when imported."""
    if "TASKIQ_ITEMS_URL" in os.environ:
        with closing(asyncio.new_event_loop()) as loop:
            loop.run_until_complete(broker.startup())
            measure("batch", items, lambda count: loop.run_until_complete(batch(count)))
            loop.run_until_complete(broker.shutdown())
        return
    with redis_server() as port:
        environment = {**os.environ, "TASKIQ_ITEMS_URL": f"redis://127.0.0.1:{port}"}
        here = Path(__file__)
        worker = subprocess.Popen(
            [sys.executable, "-m", "taskiq", "worker", f"{here.stem}:broker",
             "--workers", "1", "--log-level", "WARNING"],
            cwd=here.parent, env=environment,
        )  # fmt: skip
        try:
            time.sleep(3)  # The group reads from when it is made: what is published before its worker is there is lost.
            subprocess.run([sys.executable, str(here), "--items", str(items)], env=environment, check=True)
        finally:
            worker.terminate()
            worker.wait(20)


if __name__ == "__main__":
    main(parse())
