import asyncio

import pytest

from penstock.broker.queue.group.pending_entries import RedeliveredEntry
from penstock.broker.registry.store import Registry
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys
from penstock.broker.wire.requests import Entry
from tests.broker.queue.replica import TAG, CountLeft, Joining, Publish


async def test_pending_entries_can_be_read_again(
    join: Joining, publish: Publish, commands: RedisConnection, keys: Keys
) -> None:
    replica = await join("a")
    refs = await publish(*map(str, range(150)))
    for _ in range(3):
        await replica.claim(50)
    await commands.send("XDEL", keys.requests(TAG), refs[120])
    ids: list[str | None] = [str(n) for n in range(150)]
    ids[120] = None
    assert await replica.pending() == dict(zip(refs, ids, strict=True))
    assert await replica.group.pending.own_refs(60_000) == []


async def test_an_entry_that_another_replica_redelivers_is_not_read_again(join: Joining, publish: Publish) -> None:
    slow, successor = await join("slow"), await join("successor")
    refs = await publish("1", "2")
    await slow.claim()
    await slow.die()
    assert await successor.redeliver("slow") is not None
    assert [one.ref for one in await slow.group.pending.reclaim(refs)] == refs[1:]


async def test_reading_a_pending_entry_is_not_a_delivery(join: Joining, publish: Publish) -> None:
    dead, successor = await join("dead"), await join("successor")
    await publish("1")
    await dead.claim()
    for _ in range(5):
        assert list((await dead.pending()).values()) == ["1"]
    await dead.die()
    taken = await successor.redeliver("dead")
    assert taken is not None
    assert taken.deliveries == 1


async def test_entries_of_a_live_replica_are_not_redelivered(join: Joining, publish: Publish) -> None:
    busy, idle = await join("busy"), await join("idle")
    await publish("1")
    await busy.claim()
    assert await idle.group.pending.sweep() == ([], False)
    assert await idle.redeliver("busy") is None


@pytest.mark.parametrize(
    ("renewed_since_s", "renewed_s", "may"),
    [(5.0, 0.0, True), (2.1, 0.9, True), (1.5, 0.0, False), (5.0, 1.5, False), (0.0, 0.0, False)],
)
async def test_only_a_replica_with_recent_renewals_redelivers(
    join: Joining, publish: Publish, renewed_since_s: float, renewed_s: float, may: bool
) -> None:
    silent, successor = await join("silent"), await join("successor")
    await publish("1")
    await silent.claim()
    await silent.die()
    await successor.die()
    await successor.live(since_s=renewed_since_s, renewed_s=renewed_s)
    assert (await successor.group.pending.sweep()).dead == [b"silent"] * may
    assert (await successor.redeliver("silent") is not None) == may


async def test_a_replica_without_a_lease_redelivers_nothing(join: Joining, publish: Publish) -> None:
    silent, successor = await join("silent"), await join("successor")
    await publish("1")
    await silent.claim()
    await silent.die()
    await successor.die()
    assert await successor.redeliver("silent") is None
    await successor.live()
    assert await successor.redeliver("silent") is not None


async def test_a_dropped_lease_proves_a_death_to_every_replica(
    join: Joining, publish: Publish, commands: RedisConnection, keys: Keys
) -> None:
    dead, successor = await join("dead"), await join("successor")
    await publish("1")
    await dead.claim()
    await successor.die()
    await Registry(commands, keys).drop_lease(TAG, "dead")
    assert (await successor.group.pending.sweep()).dead == [b"dead"]
    assert await successor.redeliver("dead") is not None


async def test_entries_of_a_dead_replica_are_redelivered_oldest_first(join: Joining, publish: Publish) -> None:
    dead, successor = await join("dead"), await join("successor")
    refs = await publish("1", "2")
    await dead.claim()
    await dead.die()
    assert (await successor.group.pending.sweep()).dead == [b"dead"]

    taken = [await successor.redeliver("dead"), await successor.redeliver("dead")]
    assert [(one.ref, one.deliveries, Entry.of(one.fields).id) for one in taken if one] == [
        (refs[0], 1, "1"),
        (refs[1], 1, "2"),
    ]
    assert await successor.redeliver("dead") is None
    assert await successor.group.pending.sweep() == ([], False)
    assert await successor.pending() == {refs[0]: "1", refs[1]: "2"}


async def test_an_entry_is_redelivered_to_one_of_many_replicas(join: Joining, publish: Publish) -> None:
    dead = await join("dead")
    successors = [await join(f"successor{n}") for n in range(4)]
    refs = await publish(*map(str, range(10)))
    await dead.claim()
    await dead.die()
    taken = await asyncio.gather(*[successor.redeliver("dead") for successor in successors for _ in range(5)])
    assert sorted(one.ref for one in taken if one) == refs


async def test_deaths_are_counted_and_recorded_in_the_history(
    join: Joining, publish: Publish, commands: RedisConnection, keys: Keys
) -> None:
    await publish("1")
    first = await join("first")
    await first.claim()
    await first.die()
    taken: RedeliveredEntry | None = None
    for deaths, name in enumerate(("second", "third"), start=1):
        successor = await join(name)
        taken = await successor.redeliver("first", "second")
        assert taken is not None
        assert taken.deliveries == deaths
        await successor.die()
    assert taken is not None
    history = await commands.send("LRANGE", keys.history(TAG, taken.ref.decode()), 0, -1)
    assert history[::2] == [b"first", b"second"]
    assert all(abs(int(died) - commands.now_ms()) < 5_000 for died in history[1::2])


async def test_a_withdrawn_entry_is_not_redelivered(
    join: Joining, publish: Publish, left: CountLeft, commands: RedisConnection, keys: Keys
) -> None:
    dead, successor = await join("dead"), await join("successor")
    refs = await publish("1", "2")
    await dead.claim()
    await dead.die()
    await commands.send("XDEL", keys.requests(TAG), refs[0])
    taken = await successor.redeliver("dead")
    assert taken is not None
    assert taken.ref == refs[1]
    successor.group.acknowledger.settle([taken.ref])
    assert await left() == (0, 0)


async def test_a_sweep_names_the_dead_replicas_with_entries(
    join: Joining, publish: Publish, commands: RedisConnection, keys: Keys
) -> None:
    """Also with more consumers than Lua could pass to one command, and with entries on both streams."""
    living = await join("living")
    await commands.send("SET", keys.alive(TAG, "busy"), "1", "PX", 60_000)
    await publish(*map(str, range(250)))
    for n in range(250):
        stream = keys.requests(TAG)
        name = "busy" if n % 2 else f"dead{n}"
        await commands.send("XREADGROUP", "GROUP", "replicas", name, "COUNT", 1, "STREAMS", stream, ">")
    dead, has_returned = await living.group.pending.sweep()
    assert not has_returned
    assert len(dead) == len(set(dead)) == 50
    assert {name[:4] for name in dead} == {b"dead"}


async def test_an_idle_sweep_costs_the_same_with_any_number_of_replicas(
    join: Joining, commands: RedisConnection
) -> None:
    replicas = [await join(f"r{n}") for n in range(40)]
    for replica in replicas:
        await replica.group.claimer.claim_returned(1)  # it has a consumer then
    await commands.send("CONFIG", "RESETSTAT")
    await replicas[0].group.pending.sweep()
    stats = (await commands.send("INFO", "commandstats")).decode()
    calls = {
        line.split(":")[0]: int(line.split("calls=")[1].split(",")[0])
        for line in stats.splitlines()
        if "calls=" in line
    }
    assert sum(calls.values()) <= 6, calls


async def test_are_left_tells_whether_a_dead_replica_has_entries(join: Joining, publish: Publish) -> None:
    dead, other, living = await join("dead"), await join("other"), await join("living")
    await publish("1", "2")
    await dead.claim(1)
    await other.claim(1)
    await dead.die()
    pending = living.group.pending
    assert not await pending.are_left([])
    assert not await pending.are_left([b"other", b"unknown", b"living"])
    assert await pending.are_left([b"other", b"dead"])
    assert await living.redeliver("other", "dead") is not None
    assert not await pending.are_left([b"other", b"dead"])
