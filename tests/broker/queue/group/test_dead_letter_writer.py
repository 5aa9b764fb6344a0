import asyncio
from typing import Any

import orjson

from penstock.broker.queue.consumer_group import ConsumerGroup
from penstock.broker.queue.dead_letter_limits import MAX_AGE_S
from penstock.broker.queue.group.pending_entries import RedeliveredEntry
from penstock.broker.queue.stats import read_stats
from penstock.broker.registry.store import Registry
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys
from penstock.broker.wire.requests import Entry, Header
from tests.broker.conftest import Connect
from tests.broker.queue.replica import TAG, CountLeft, Joining, Publish
from tests.faults.injected.refusing_proxy import ERRORS, RefusingProxy
from tests.support.waiting import wait_until_async


async def test_a_dead_letter_has_the_history_of_its_deliveries(
    join: Joining, publish: Publish, left: CountLeft, commands: RedisConnection, keys: Keys
) -> None:
    dead, successor = await join("dead"), await join("successor")
    await publish("1")
    await dead.claim()
    await dead.die()
    taken = await successor.redeliver("dead")
    assert taken is not None
    for _ in range(2):  # the second time does nothing
        await successor.group.dead_letters.add(taken, "every replica died", max_dead_letters=10)

    ((_, fields),) = await commands.send("XRANGE", keys.dead(TAG), "-", "+")
    history = orjson.loads(dict(zip(fields[::2], fields[1::2], strict=True))[b"history"])
    assert history["error"] == "every replica died"
    assert [delivery["replica"] for delivery in history["deliveries"]] == ["dead"]
    assert Entry.of(fields).id == "1", "a dead letter can be read as the entry that it was"
    assert await left() == (0, 0)
    assert await commands.send("EXISTS", keys.history(TAG, taken.ref.decode())) == 0


async def test_an_unreadable_entry_of_any_size_becomes_a_dead_letter(
    join: Joining, left: CountLeft, commands: RedisConnection, keys: Keys
) -> None:
    replica = await join("a")
    garbage = [str(n) for n in range(20_000)]
    ref = await commands.send("XADD", keys.requests(TAG), "*", *garbage)
    claimed: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    replica.group.claimer.claim(1, claimed.set_result)
    ((_, fields),) = await claimed
    await replica.group.dead_letters.add(RedeliveredEntry(ref, 0, fields), "cannot be read", max_dead_letters=10)
    assert await left() == (0, 0)
    assert await commands.send("XLEN", keys.dead(TAG)) == 1


async def dead_ids(commands: RedisConnection, keys: Keys) -> list[bytes]:
    return [id_ for id_, _ in await commands.send("XRANGE", keys.dead(TAG), "-", "+")]


async def dropped(commands: RedisConnection, keys: Keys) -> int:
    return (await read_stats(commands, keys, TAG)).dead_letters_dropped


async def test_the_oldest_of_too_many_dead_letters_are_dropped_and_counted(
    join: Joining, commands: RedisConnection, keys: Keys
) -> None:
    replica = await join("replica")
    for n in range(12):
        ref = await commands.send("XADD", keys.requests(TAG), "*", "garbage", str(n))
        await replica.claim_one()
        await replica.group.dead_letters.add(
            RedeliveredEntry(ref, 0, [b"garbage", b"%d" % n]), "cannot be read", max_dead_letters=5
        )
        assert len(await dead_ids(commands, keys)) == min(n + 1, 5)
    letters = await commands.send("XRANGE", keys.dead(TAG), "-", "+")
    assert [fields[-1] for _, fields in letters] == [b"7", b"8", b"9", b"10", b"11"]
    assert await dropped(commands, keys) == 7


async def test_a_dead_letter_is_dropped_with_its_large_body(
    join: Joining, commands: RedisConnection, keys: Keys
) -> None:
    replica = await join("replica")
    for id_ in ("first", "second"):
        fields = Entry(id_, "me", Header(), large=True).fields()
        await commands.send("SET", keys.body(TAG, id_), b"body", "PX", 60_000)
        ref = await commands.send("XADD", keys.requests(TAG), "*", *fields)
        await replica.claim_one()
        await replica.group.dead_letters.add(RedeliveredEntry(ref, 0, fields), "it died", max_dead_letters=1)
    assert await commands.send("EXISTS", keys.body(TAG, "first")) == 0
    assert await commands.send("TTL", keys.body(TAG, "second")) > MAX_AGE_S, "the body is there as long as its letter"


async def test_dead_letters_are_dropped_after_fourteen_days_and_at_a_lower_limit(
    join: Joining, commands: RedisConnection, keys: Keys
) -> None:
    replica = await join("replica")
    seconds, _ = await commands.send("TIME")
    ages_s = [20 * 86_400, 14 * 86_400 + 60, 14 * 86_400 - 60, 3600, 60]
    ids = [
        await commands.send("XADD", keys.dead(TAG), f"{(int(seconds) - age_s) * 1000}-0", "v", "1") for age_s in ages_s
    ]
    await replica.group.dead_letters.drop_oldest(100)
    assert await dead_ids(commands, keys) == ids[2:]
    await replica.group.dead_letters.drop_oldest(2)
    assert await dead_ids(commands, keys) == ids[3:]
    assert await dropped(commands, keys) == 3


async def test_a_dead_letter_has_a_bounded_size(join: Joining, commands: RedisConnection, keys: Keys) -> None:
    replica = await join("replica")
    fields = [b"garbage", bytes(3 * 1024 * 1024), b"more", bytes(1024)]
    ref = await commands.send("XADD", keys.requests(TAG), "*", *fields)
    await replica.claim_one()
    await replica.group.dead_letters.add(RedeliveredEntry(ref, 0, fields), "cannot be read", max_dead_letters=10)
    [(_, kept)] = await commands.send("XRANGE", keys.dead(TAG), "-", "+")
    assert 1024 * 1024 <= sum(map(len, kept)) <= 1024 * 1024 + 1024


async def test_refused_dead_letters_and_returns_are_sent_again(redis_url: str, connect: Connect, keys: Keys) -> None:
    straight = await connect(redis_url)
    with RefusingProxy(redis_url) as between:
        commands = await connect(between.url)
        group = ConsumerGroup(commands, await connect(redis_url), keys, TAG, "a")
        await group.ensure()
        for n in range(3):
            await straight.send("XADD", keys.requests(TAG), f"1-{n + 1}", "n", n)
        claimed: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        group.claimer.claim(3, claimed.set_result)
        (first, fields), (second, _), (third, _) = await claimed
        between.error = ERRORS["NOREPLICAS"]
        burying = asyncio.ensure_future(
            group.dead_letters.add(RedeliveredEntry(first, 3, fields), "it died", max_dead_letters=10)
        )
        group.acknowledger.give_back([second])
        group.acknowledger.settle([third])
        group.pending.forget_history(third)
        await wait_until_async(lambda: len(between.refused) > 4)
        assert await straight.send("XLEN", keys.requests(TAG)) == 3
        between.error = ""
        await asyncio.wait_for(burying, 20)
        await commands.wait_for_patient(20)
        assert await straight.send("XLEN", keys.dead(TAG)) == 1
        assert [ref for ref, _ in await group.claimer.claim_returned(5)] == [second]
        assert await straight.send("XLEN", keys.requests(TAG)) == 1
        await Registry(straight, keys).erase()
