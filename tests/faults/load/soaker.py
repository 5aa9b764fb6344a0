"""A process with a handle that calls ``work`` for as many seconds as each line of its input says. Run as a script.

Nobody but a process itself can make glibc return what is free to the system (malloc_trim(3)). This one does so after
each of them: at rest it has what is in use, whatever the last bodies were.
"""

from __future__ import annotations

import asyncio
import random
import sys

from penstock.handles import connect
from penstock.runtime.memory import Memory

LARGEST = 10 * 1024 * 1024
_AT_A_TIME = 6


def some_bytes() -> bytes:
    """Return a payload of 1 byte to 10 MiB, each order of magnitude as likely as the next."""
    return bytes(round(LARGEST ** random.random()))


async def main(url: str) -> None:
    handle = connect(url).get_handle("work", sync=False)
    loop = asyncio.get_running_loop()
    while line := await asyncio.to_thread(sys.stdin.readline):
        ends, calls = loop.time() + float(line), 0

        async def soak(ends: float) -> int:
            done = 0
            while loop.time() < ends:
                sent = some_bytes()
                assert await (await handle.remote(sent)) == sent
                done += 1
            return done

        calls = sum(await asyncio.gather(*(soak(ends) for _ in range(_AT_A_TIME))))
        Memory().give_back()  # a new one has yet to look
        print(calls, flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
