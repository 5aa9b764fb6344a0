"""Cost of a kept result: a no-op through an asyncio handle, plain, with an idempotency key, and submitted.

Runs by itself. The three ways take turns, so that what else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

ENDPOINT = "noop"


async def answer(request: Any) -> None:
    """Do nothing."""


async def rate_of(call: Callable[[], Awaitable[object]], in_flight: int, seconds: float) -> float:
    """Return how many calls a second end, with ``in_flight`` at a time."""
    began_s = time.monotonic()
    ends_s, ended = began_s + seconds, 0

    async def again_and_again() -> None:
        nonlocal ended
        while time.monotonic() < ends_s:
            await call()
            ended += 1

    await asyncio.gather(*(again_and_again() for _ in range(in_flight)))
    return ended / (time.monotonic() - began_s)


async def measure(url: str, in_flight: int, seconds: float, rounds: int) -> None:
    from penstock import handles

    handle: Any = handles.connect(url).get_handle(ENDPOINT, sync=False)
    keys = map(str, itertools.count())

    async def plain() -> object:
        return await (await handle.remote())

    async def keyed() -> object:
        return await (await handle.options(idempotency_key=f"{os.getpid()}-{next(keys)}").remote())

    async def submitted() -> object:
        return await (await handle.submit()).result()

    ways = {"plain": plain, "with a key": keyed, "submit + result": submitted}
    seen: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            seen[name].append(await rate_of(call, in_flight, seconds))
    base = statistics.median(seen["plain"])
    print(f"| {in_flight} in flight, {rounds} rounds of {seconds:g} s | calls/s | of plain |\n|---|---:|---:|")
    for name, rates in seen.items():
        print(f"| {name} | {statistics.median(rates):,.0f} | {statistics.median(rates) / base:.2f} |")


def main() -> None:
    """Serve, and start this program again as the caller."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in-flight", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    if url := os.environ.get("PENSTOCK_KEPT_URL"):
        asyncio.run(measure(url, asked.in_flight, asked.seconds, asked.rounds))
        return
    from penstock import serve

    with serve.start(http_options={"location": "NoServer"}) as client:
        client.create_backend(ENDPOINT, answer, config={"result_ttl_s": 60})
        client.create_endpoint(ENDPOINT, backend=ENDPOINT)
        environment = {**os.environ, "PENSTOCK_KEPT_URL": client.redis_url}
        subprocess.run([sys.executable, *sys.argv], env=environment, check=True)


if __name__ == "__main__":
    main()
