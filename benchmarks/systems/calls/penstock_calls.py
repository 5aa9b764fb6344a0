"""Penstock's handles, called from a process that knows nothing but the URL of its Redis: no Ray, no HTTP."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any

from items import add_one, at_once, by_threads, measure, parse

ENDPOINT, BATCHED = "add-one", "add-one-to-each"
BATCH_SIZE = 64


def answer(request: Any) -> int:
    return add_one(request.data)


def answer_each(requests: list[Any]) -> list[int]:
    return [add_one(request.data) for request in requests]


def call(url: str, items: int) -> None:
    """Every way of calling, in turn."""
    from penstock import handles

    async def by_asyncio(count: int) -> list[object]:
        handle: Any = handles.connect(url).get_handle(ENDPOINT, sync=False)

        async def one(number: int) -> object:
            return await (await handle.remote(number))

        return await at_once(count, 1_000, one)

    penstock = handles.connect(url)
    handle: Any = penstock.get_handle(ENDPOINT)

    def by_batch(count: int) -> list[object]:
        results: list[object] = [None] * count
        for result in penstock.batch(BATCHED).as_completed(range(count)):
            results[result.index] = result.get()
        return results

    def by_window(count: int) -> list[object]:
        """One thread that publishes ahead of the results that it reads."""
        results: list[object] = []
        ahead: list[Any] = []
        for start in range(0, count, 2_000):
            now = [handle.remote(number) for number in range(start, min(start + 2_000, count))]
            results.extend(future.result() for future in ahead)
            ahead = now
        results.extend(future.result() for future in ahead)
        return results

    measure("asyncio, 1,000 in flight", items, lambda count: asyncio.run(by_asyncio(count)))
    measure("batch", items, by_batch)
    measure("sync, one thread, 2,000 ahead", items, by_window)
    measure(
        "sync, 16 threads, one at a time",
        items,
        lambda count: by_threads(count, 16, lambda number: handle.remote(number).result()),
    )


def main(items: int) -> None:
    """Serve, and start this program again as the caller."""
    if url := os.environ.get("PENSTOCK_CALLS_URL"):
        call(url, items)
        return
    from penstock import serve

    with serve.start(http_options={"location": "NoServer"}) as client:
        client.create_backend(ENDPOINT, answer)
        client.create_endpoint(ENDPOINT, backend=ENDPOINT)
        client.create_backend(BATCHED, serve.accept_batch(answer_each), config={"max_batch_size": BATCH_SIZE})
        client.create_endpoint(BATCHED, backend=BATCHED)
        environment = {**os.environ, "PENSTOCK_CALLS_URL": client.redis_url}
        subprocess.run([sys.executable, __file__, "--items", str(items)], env=environment, check=True)


if __name__ == "__main__":
    main(parse())
