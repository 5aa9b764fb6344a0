"""Calls through Penstock's asyncio handle, a number of them in flight: a line of JSON with how many were answered."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from typing import Any

from penstock import handles


async def call(url: str, endpoint: str, in_flight: int, seconds: float) -> int:
    """Call again and again; return how many answers came."""
    handle: Any = handles.connect(url).get_handle(endpoint, sync=False)
    ends, answered = time.monotonic() + seconds, 0

    async def one_at_a_time() -> None:
        nonlocal answered
        while time.monotonic() < ends:
            await (await handle.remote("x"))
            answered += 1

    await asyncio.gather(*(one_at_a_time() for _ in range(in_flight)))
    return answered


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--in-flight", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    asked = parser.parse_args()
    began = time.monotonic()
    answered = asyncio.run(call(asked.url, asked.endpoint, asked.in_flight, asked.seconds))
    seen = {"answered": answered, "seconds": time.monotonic() - began, "cpu_s": time.process_time()}
    print("\n@@" + json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
