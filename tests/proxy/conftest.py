import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
import pytest_asyncio
import uvloop

from tests.proxy.site import Site, running


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run proxies on the loop that Ray's actors have."""
    return {"uvloop": uvloop.new_event_loop}


@pytest_asyncio.fixture
async def site(redis_url: str) -> AsyncIterator[Site]:
    async with running(redis_url) as site:
        yield site
