"""Code for replicas in containers, which takes its time. It imports nothing of the tests."""

import asyncio


async def answer(request: object) -> str:
    await asyncio.sleep(1.5)
    return "well"
