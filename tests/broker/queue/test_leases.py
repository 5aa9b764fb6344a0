import asyncio

import pytest

from penstock.broker.errors import BrokerUnavailable
from penstock.broker.queue.leases import Lease
from penstock.broker.wire.keys import Keys
from tests.broker.conftest import Connect
from tests.broker.queue.replica import TAG
from tests.faults.refusing_proxy import ERRORS, RefusingProxy
from tests.waiting import wait_until_async


async def test_a_lease_stores_since_when_it_is_renewed_without_a_gap(
    redis_url: str, connect: Connect, keys: Keys
) -> None:
    commands = await connect(redis_url)
    key = keys.alive(TAG, "a")

    async def times() -> list[int]:
        return [int(time) for time in ((await commands.send("GET", key)) or b"0 0").split()]

    with RefusingProxy(redis_url) as between:
        lease = Lease(between.url, key)
        await asyncio.to_thread(lease.start)
        try:
            first = await times()
            assert first[0] == first[1]

            async def is_renewed() -> bool:
                return (await times())[1] > first[1]

            await wait_until_async(is_renewed)
            between.error = ERRORS["NOREPLICAS"]

            async def is_gone() -> bool:
                return await times() == [0, 0]

            await wait_until_async(is_gone)
            between.error = ""

            async def is_back() -> bool:
                return (await times())[0] > first[0]

            await wait_until_async(is_back)
        finally:
            await asyncio.to_thread(lease.stop)
    assert await commands.send("EXISTS", key) == 0


@pytest.mark.parametrize("code", sorted(ERRORS.keys() - {"OOM"}))
async def test_a_temporary_refusal_of_a_lease_is_an_unavailable_broker(redis_url: str, keys: Keys, code: str) -> None:
    with RefusingProxy(redis_url) as between:
        between.error = ERRORS[code]
        lease = Lease(between.url, keys.alive(TAG, "a"))
        with pytest.raises(BrokerUnavailable):
            await asyncio.to_thread(lease.start)
        await asyncio.to_thread(lease.stop)
