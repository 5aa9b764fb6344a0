from collections.abc import AsyncIterator

import pytest_asyncio

from tests.proxy.site import Site, running


@pytest_asyncio.fixture
async def site(redis_url: str) -> AsyncIterator[Site]:
    async with running(redis_url) as site:
        yield site
