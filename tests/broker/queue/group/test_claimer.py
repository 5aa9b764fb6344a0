import asyncio

from tests.broker.queue.replica import Joining, Publish


async def test_no_entry_is_claimed_twice(join: Joining, publish: Publish) -> None:
    replicas = [await join(name) for name in "abc"]
    refs = await publish(*map(str, range(30)))
    claimed = await asyncio.gather(*[replica.claim(7) for replica in replicas for _ in range(2)])
    all_refs = [ref for refs in claimed for ref in refs]
    assert sorted(all_refs) == sorted(refs)


async def test_a_claim_waits_for_the_first_entry_and_not_for_the_rest(join: Joining, publish: Publish) -> None:
    replica = await join("a")
    claiming = asyncio.ensure_future(replica.claim(5))
    await asyncio.sleep(0.05)
    assert not claiming.done()
    (ref,) = await publish("1")
    assert await asyncio.wait_for(claiming, 10) == {ref: "1"}
