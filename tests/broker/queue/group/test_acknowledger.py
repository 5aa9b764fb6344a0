from penstock.broker.wire.requests import Entry
from tests.broker.queue.replica import CountLeft, Joining, Publish


async def test_a_settled_entry_leaves_nothing(join: Joining, publish: Publish, left: CountLeft) -> None:
    replica = await join("a")
    await publish("1", "2", "3")
    replica.group.acknowledger.settle(list(await replica.claim()))
    assert await left() == (0, 0)
    assert await replica.pending() == {}


async def test_giving_back_does_not_count_as_a_delivery(join: Joining, publish: Publish) -> None:
    """However often: an entry that never started cannot have killed a replica."""
    replicas = [await join("a"), await join("b")]
    (ref,) = await publish("1")
    await replicas[0].claim()
    for round_ in range(4):
        giver, taker = replicas[round_ % 2], replicas[(round_ + 1) % 2]
        giver.group.acknowledger.give_back([ref])
        assert (await taker.group.pending.sweep()).has_returned
        assert [(found, Entry.of(fields).id) for found, fields in await taker.group.claimer.claim_returned(5)] == [
            (ref, "1")
        ]
        assert await taker.group.pending.sweep() == ([], False)
        assert await giver.pending() == {}
    await replicas[0].die()
    taken = await replicas[1].redeliver("a")
    assert taken is not None
    assert taken.deliveries == 1


async def test_only_entries_that_are_still_held_are_given_back(join: Joining, publish: Publish) -> None:
    late, successor = await join("late"), await join("successor")
    (ref,) = await publish("1")
    await late.claim()
    await late.die()
    assert await successor.redeliver("late") is not None
    late.group.acknowledger.give_back([ref])
    await late.group.pending.sweep()
    assert await successor.pending() == {ref: "1"}
