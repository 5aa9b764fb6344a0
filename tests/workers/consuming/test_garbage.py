import asyncio
import gc
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
        try:
            left: list[int] = []
            for _ in range(3):  # other threads of this process may leave something meanwhile, but not each time
                await call(500)
                left.append(gc.collect())
            assert min(left) < 500
        finally:
            gc.enable()
