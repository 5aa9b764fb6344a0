"""Code for replicas in containers, which takes its time. It imports nothing of the tests."""

import asyncio
import logging

_logger = logging.getLogger("slow")


async def answer(request: object) -> str:
    _logger.info("an answer in 1.5 s")
    await asyncio.sleep(1.5)
    return "well"
