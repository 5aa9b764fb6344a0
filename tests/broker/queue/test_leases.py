import asyncio

import pytest

from penstock.broker.errors import BrokerUnavailable
from penstock.broker.queue.leases import Lease
from penstock.broker.wire.keys import Keys
from tests.broker.conftest import Connect
from tests.faults.injected.refusing_proxy import ERRORS, RefusingProxy
from tests.support.waiting import wait_until_async


async def test_a_lease_that_is_not_renewed_expires_and_is_acquired_again(
    redis_url: str, connect: Connect, keys: Keys
) -> None:
    commands = await connect(redis_url)
    key = keys.proxy_alive("p")

    async def exists() -> bool:
        return bool(await commands.send("EXISTS", key))

    async def is_gone() -> bool:
        return not await exists()

    with RefusingProxy(redis_url) as between:
        lease = Lease(between.url, key)
        await asyncio.to_thread(lease.start)
        try:
            assert await exists()
            between.error = ERRORS["NOREPLICAS"]
            await wait_until_async(is_gone)
            between.error = ""
            await wait_until_async(exists)
        finally:
            await asyncio.to_thread(lease.stop)
    assert await is_gone()


@pytest.mark.parametrize("code", sorted(ERRORS.keys() - {"OOM"}))
async def test_a_temporary_refusal_of_a_lease_is_an_unavailable_broker(redis_url: str, keys: Keys, code: str) -> None:
    with RefusingProxy(redis_url) as between:
        between.error = ERRORS[code]
        lease = Lease(between.url, keys.proxy_alive("p"))
        with pytest.raises(BrokerUnavailable):
            await asyncio.to_thread(lease.start)
        await asyncio.to_thread(lease.stop)
