import asyncio
import gc
from collections import Counter
from typing import Any

from tests.workers.serving import calling, serving


async def test_requests_leave_nothing_to_the_garbage_collector(redis_url: str) -> None:
    """A cycle of objects for each request made the collector take a sixth of a replica's time."""

    async def echo(request: Any) -> Any:
        return await request.body()

    async with serving(redis_url, echo), calling(redis_url) as client:

        async def call(count: int) -> None:
            replies = await asyncio.gather(*(client.ask(b"%d" % n) for n in range(count)))
            assert [reply.body for reply in replies] == [b"%d" % n for n in range(count)]

        await call(50)
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            await call(500)
            gc.collect()
            # Not all of it: connections of other tests may lose their broker meanwhile.
            left = [type(one).__name__ for one in gc.garbage if _is_ours(one)]
            assert len(left) < 500, Counter(left)
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()


def _is_ours(one: object) -> bool:
    return isinstance(one, asyncio.Task) or type(one).__module__.startswith("penstock.")
