"""A process that submits requests to the endpoint ``work`` and writes their ids. Run as a script, to be killed."""

from __future__ import annotations

import asyncio
import sys

from penstock.handles import connect

_AT_A_TIME = 50


async def main(url: str, count: int) -> None:
    handle = connect(url).get_handle("work", sync=False)
    for start in range(0, count, _AT_A_TIME):
        names = [f"s{number}" for number in range(start, min(start + _AT_A_TIME, count))]
        submitted = await asyncio.gather(*(handle.submit(name) for name in names))
        for name, one in zip(names, submitted, strict=True):
            print(name, one.id, flush=True)
    print("done", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
