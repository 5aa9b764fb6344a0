from collections.abc import AsyncIterator

import pytest

from tests.security.site import Site, open_site
from tests.support.guarded import Guarded


@pytest.fixture
def broker(guarded_by_users: Guarded) -> Guarded:
    return guarded_by_users


@pytest.fixture
async def site(broker: Guarded) -> AsyncIterator[Site]:
    async with open_site(broker) as site:
        yield site
