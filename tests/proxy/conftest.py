import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
import pytest_asyncio
import uvloop

from tests.proxy.site import WAYS, Site, running


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run proxies on uvloop, as Ray's actors do."""
    return {"uvloop": uvloop.new_event_loop}


@pytest_asyncio.fixture(params=WAYS)
async def site(redis_url: str, request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    """A proxy, once for each path through it."""
    async with running(redis_url, way=request.param) as site:
        yield site
