"""Images through Penstock's asyncio handle or a batch producer: a line of JSON with how many were answered."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

from image_model import WORKLOADS, body, pixel_sum

from penstock import handles

BODIES = 16
ENDPOINT = "images"
WAYS = ("handle", "batch")


class Calls:
    """Calls for some seconds, and checks the answers."""

    def __init__(self, url: str, workload: int, seconds: float) -> None:
        self._connection = handles.connect(url)
        self._bodies = [body(WORKLOADS[workload], seed) for seed in range(BODIES)]
        self._sums = [pixel_sum(one) for one in self._bodies]
        self._ends_s = time.monotonic() + seconds
        self.answered = self.wrong = 0

    def check(self, number: int, answer: Any) -> None:
        self.answered += 1
        self.wrong += answer["sum"] != self._sums[number % BODIES]

    async def by_handle(self, in_flight: int) -> None:
        handle: Any = self._connection.get_handle(ENDPOINT, sync=False)

        async def one_at_a_time(number: int) -> None:
            while time.monotonic() < self._ends_s:
                self.check(number, await (await handle.remote(self._bodies[number % BODIES])))

        await asyncio.gather(*(one_at_a_time(number) for number in range(in_flight)))

    def by_batch(self) -> None:
        for result in self._connection.batch(ENDPOINT).as_completed(self._items()):
            self.check(result.index, result.get())

    def _items(self) -> Iterator[bytes]:
        number = 0
        while time.monotonic() < self._ends_s:
            yield self._bodies[number % BODIES]
            number += 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--workload", type=int, required=True)
    parser.add_argument("--way", choices=WAYS, required=True)
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--seconds", type=float, required=True)
    asked = parser.parse_args()
    calls = Calls(asked.url, asked.workload, asked.seconds)
    began_s = time.monotonic()
    if asked.way == "batch":
        calls.by_batch()
    else:
        asyncio.run(calls.by_handle(asked.in_flight))
    seen = {"answered": calls.answered, "wrong": calls.wrong, "seconds": time.monotonic() - began_s}
    print("\n@@" + json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
