import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import pytest

from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.errors import BrokerRefused, BrokerUnavailable
from penstock.broker.queue.consumer_group import ConsumerGroup
from penstock.broker.queue.group.member import RETURNED
from penstock.broker.queue.group.pending_entries import RedeliveredEntry
from penstock.broker.queue.leases import Lease
from penstock.broker.queue.stats import read_stats
from penstock.broker.registry.store import Registry
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys
from penstock.broker.wire.replies import Reply
from penstock.broker.wire.requests import Entry, Header
from tests.broker.conftest import Connect
from tests.faults.refusing_proxy import ERRORS, RefusingProxy
from tests.waiting import wait_until_async

TAG = "model"
Joining = Callable[..., Awaitable["Replica"]]


class Replica:
    """One replica as a member of the consumer group."""

    def __init__(self, commands: RedisConnection, reads: RedisConnection, keys: Keys, name: str) -> None:
        self.name = name
        self.group = ConsumerGroup(commands, reads, keys, TAG, name)
        self._commands, self._lease = commands, keys.alive(TAG, name)

    async def claim(self, up_to: int = 10) -> dict[bytes, str]:
        """Return the claimed entries: entry ref to request id."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.group.claimer.claim(up_to, future.set_result)
        result = await future
        if isinstance(result, Exception):
            raise result
        return {ref: Entry.of(fields).id for ref, fields in result}

    async def claim_one(self) -> None:
        """Claim one entry, readable or not."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.group.claimer.claim(1, future.set_result)
        assert len(await future) == 1

    async def pending(self) -> dict[bytes, str | None]:
        pending = await self.group.pending.reclaim(await self.group.pending.own_refs())
        return {one.ref: None if one.fields is None else Entry.of(one.fields).id for one in pending}

    async def live(self) -> None:
        await self._commands.send("SET", self._lease, "1", "PX", 60_000)

    async def die(self) -> None:
        """Delete the lease, as its expiry does."""
        await self._commands.send("DEL", self._lease)


@pytest.fixture
def join(broker_url: str, commands: RedisConnection, connect: Connect, keys: Keys) -> Joining:
    """Makes replicas with a lease."""

    async def join(name: str) -> Replica:
        replica = Replica(commands, await connect(broker_url), keys, name)
        await replica.group.ensure()
        await replica.live()
        return replica

    return join


@pytest.fixture
def publish(commands: RedisConnection, keys: Keys) -> Callable[..., Awaitable[list[bytes]]]:
    async def publish(*ids: str) -> list[bytes]:
        return [
            await commands.send("XADD", keys.requests(TAG), "*", *Entry(id_, "me", Header()).fields()) for id_ in ids
        ]

    return publish


@pytest.fixture
def left(commands: RedisConnection, keys: Keys) -> Callable[[], Awaitable[tuple[int, int]]]:
    """Counts the entries on the stream, and the pending ones."""

    async def left() -> tuple[int, int]:
        pending = await commands.send("XPENDING", keys.requests(TAG), "replicas")
        return await commands.send("XLEN", keys.requests(TAG)), pending[0]

    return left


Publish = Callable[..., Awaitable[list[bytes]]]
Left = Callable[[], Awaitable[tuple[int, int]]]


async def test_requests_published_before_the_first_replica_are_claimed(join: Joining, publish: Publish) -> None:
    refs = await publish("1", "2")
    replica = await join("a")
    await replica.group.ensure()
    assert await replica.claim() == dict(zip(refs, ["1", "2"], strict=True))


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


async def test_a_settled_entry_leaves_nothing(join: Joining, publish: Publish, left: Left) -> None:
    replica = await join("a")
    await publish("1", "2", "3")
    replica.group.acknowledger.settle(list(await replica.claim()))
    assert await left() == (0, 0)
    assert await replica.pending() == {}


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
    assert await successor.group.pending.claim_redelivered() is not None
    assert [one.ref for one in await slow.group.pending.reclaim(refs)] == refs[1:]


async def test_a_replica_counts_its_own_pending_entries(join: Joining, publish: Publish) -> None:
    replica = await join("a")
    await publish("1", "2")
    assert (await replica.group.pending.count()).own == 0
    await replica.claim()
    assert (await replica.group.pending.count()).own == 2


async def test_work_waits_while_an_entry_is_unclaimed(
    join: Joining, publish: Publish, commands: RedisConnection, keys: Keys
) -> None:
    replica = await join("a")
    assert not await replica.group.is_work_waiting()
    refs = await publish("1", "2", "3")
    assert await replica.group.is_work_waiting()
    await replica.claim(2)
    assert await replica.group.is_work_waiting()
    await commands.send("XDEL", keys.requests(TAG), refs[2])
    assert not await replica.group.is_work_waiting()


async def test_reading_a_pending_entry_is_not_a_delivery(join: Joining, publish: Publish) -> None:
    dead, successor = await join("dead"), await join("successor")
    await publish("1")
    await dead.claim()
    for _ in range(5):
        assert list((await dead.pending()).values()) == ["1"]
    await dead.die()
    taken = await successor.group.pending.claim_redelivered()
    assert taken is not None
    assert taken.deliveries == 1


async def test_entries_of_a_live_replica_are_not_redelivered(join: Joining, publish: Publish) -> None:
    busy, idle = await join("busy"), await join("idle")
    await publish("1")
    await busy.claim()
    assert (await idle.group.pending.count())[:2] == (0, 0)
    assert await idle.group.pending.claim_redelivered() is None


@pytest.mark.parametrize(
    ("renewed_since_s", "renewed_s", "may"),
    [(5.0, 0.0, True), (2.1, 0.9, True), (1.5, 0.0, False), (5.0, 1.5, False), (0.0, 0.0, False)],
)
async def test_only_a_replica_with_recent_renewals_redelivers(
    join: Joining,
    publish: Publish,
    commands: RedisConnection,
    keys: Keys,
    renewed_since_s: float,
    renewed_s: float,
    may: bool,
) -> None:
    silent, successor = await join("silent"), await join("successor")
    await publish("1")
    await silent.claim()
    await silent.die()
    now_ms = commands.now_ms()
    times = f"{now_ms - 1000 * renewed_since_s:.0f} {now_ms - 1000 * renewed_s:.0f}"
    await commands.send("SET", keys.alive(TAG, "successor"), times, "PX", 60_000)
    assert (await successor.group.pending.count())[0] == int(may)
    assert (await successor.group.pending.claim_redelivered() is not None) == may


async def test_a_replica_without_a_lease_redelivers_nothing(join: Joining, publish: Publish) -> None:
    silent, successor = await join("silent"), await join("successor")
    await publish("1")
    await silent.claim()
    await silent.die()
    await successor.die()
    assert await successor.group.pending.claim_redelivered() is None
    await successor.live()
    assert await successor.group.pending.claim_redelivered() is not None


async def test_a_dropped_lease_proves_a_death_to_every_replica(
    join: Joining, publish: Publish, commands: RedisConnection, keys: Keys
) -> None:
    dead, successor = await join("dead"), await join("successor")
    await publish("1")
    await dead.claim()
    await successor.die()
    await Registry(commands, keys).drop_lease(TAG, "dead")
    assert (await successor.group.pending.count())[:2] == (1, 0)
    assert await successor.group.pending.claim_redelivered() is not None


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


async def test_entries_of_a_dead_replica_are_redelivered_oldest_first(join: Joining, publish: Publish) -> None:
    dead, successor = await join("dead"), await join("successor")
    refs = await publish("1", "2")
    await dead.claim()
    await dead.die()
    assert (await successor.group.pending.count())[:2] == (2, 0)

    taken = [await successor.group.pending.claim_redelivered(), await successor.group.pending.claim_redelivered()]
    assert [(one.ref, one.deliveries, Entry.of(one.fields).id) for one in taken if one] == [
        (refs[0], 1, "1"),
        (refs[1], 1, "2"),
    ]
    assert await successor.group.pending.claim_redelivered() is None
    assert (await successor.group.pending.count())[:2] == (0, 0)
    assert await successor.pending() == {refs[0]: "1", refs[1]: "2"}


async def test_an_entry_is_redelivered_to_one_of_many_replicas(join: Joining, publish: Publish) -> None:
    dead = await join("dead")
    successors = [await join(f"successor{n}") for n in range(4)]
    refs = await publish(*map(str, range(10)))
    await dead.claim()
    await dead.die()
    taken = await asyncio.gather(
        *[successor.group.pending.claim_redelivered() for successor in successors for _ in range(5)]
    )
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
        taken = await successor.group.pending.claim_redelivered()
        assert taken is not None
        assert taken.deliveries == deaths
        await successor.die()
    assert taken is not None
    history = await commands.send("LRANGE", keys.history(TAG, taken.ref.decode()), 0, -1)
    assert history[::2] == [b"first", b"second"]
    assert all(abs(int(died) - commands.now_ms()) < 5_000 for died in history[1::2])


async def test_a_withdrawn_entry_is_not_redelivered(
    join: Joining, publish: Publish, left: Left, commands: RedisConnection, keys: Keys
) -> None:
    dead, successor = await join("dead"), await join("successor")
    refs = await publish("1", "2")
    await dead.claim()
    await dead.die()
    await commands.send("XDEL", keys.requests(TAG), refs[0])
    taken = await successor.group.pending.claim_redelivered()
    assert taken is not None
    assert taken.ref == refs[1]
    successor.group.acknowledger.settle([taken.ref])
    assert await left() == (0, 0)


async def test_giving_back_does_not_count_as_a_delivery(join: Joining, publish: Publish) -> None:
    """However often: an entry that never started cannot have killed a replica."""
    replicas = [await join("a"), await join("b")]
    (ref,) = await publish("1")
    await replicas[0].claim()
    for round_ in range(4):
        giver, taker = replicas[round_ % 2], replicas[(round_ + 1) % 2]
        giver.group.acknowledger.give_back([ref])
        assert (await taker.group.pending.count())[:2] == (0, 1)
        assert [(found, Entry.of(fields).id) for found, fields in await taker.group.claimer.claim_returned(5)] == [
            (ref, "1")
        ]
        assert (await taker.group.pending.count())[:2] == (0, 0)
        assert await giver.pending() == {}
    await replicas[0].die()
    taken = await replicas[1].group.pending.claim_redelivered()
    assert taken is not None
    assert taken.deliveries == 1


async def test_only_entries_that_are_still_held_are_given_back(join: Joining, publish: Publish) -> None:
    late, successor = await join("late"), await join("successor")
    (ref,) = await publish("1")
    await late.claim()
    await late.die()
    assert await successor.group.pending.claim_redelivered() is not None
    late.group.acknowledger.give_back([ref])
    await late.group.pending.count()
    assert await successor.pending() == {ref: "1"}


async def test_a_dead_letter_has_the_history_of_its_deliveries(
    join: Joining, publish: Publish, left: Left, commands: RedisConnection, keys: Keys
) -> None:
    dead, successor = await join("dead"), await join("successor")
    await publish("1")
    await dead.claim()
    await dead.die()
    taken = await successor.group.pending.claim_redelivered()
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
    join: Joining, left: Left, commands: RedisConnection, keys: Keys
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


async def test_a_consumer_with_pending_entries_is_not_deleted(
    join: Joining, publish: Publish, commands: RedisConnection, keys: Keys
) -> None:
    """Deleting a consumer loses its pending entries (redis#8635)."""

    async def consumers() -> set[str]:
        return {
            consumer[1].decode()
            for consumer in await commands.send("XINFO", "CONSUMERS", keys.requests(TAG), "replicas")
        }

    leaving, other = await join("leaving"), await join("other")
    (ref,) = await publish("1")
    await leaving.claim()
    await leaving.group.leave()
    assert await consumers() == {"leaving"}
    leaving.group.acknowledger.settle([ref])
    await leaving.group.leave()
    assert await consumers() == set()

    (ref,) = await publish("2")
    await leaving.claim()
    await leaving.die()
    await other.group.pending.count()
    assert await consumers() == {"leaving"}
    leaving.group.acknowledger.settle([ref])
    await other.group.pending.count()
    assert await consumers() == set()


async def test_the_consumer_of_returned_entries_is_never_deleted(
    join: Joining, publish: Publish, commands: RedisConnection, keys: Keys
) -> None:
    replica = await join("a")
    (ref,) = await publish("1")
    await replica.claim()
    replica.group.acknowledger.give_back([ref])
    await replica.group.claimer.claim_returned(1)
    replica.group.acknowledger.settle([ref])
    await replica.group.pending.count()
    names = [
        consumer[1].decode() for consumer in await commands.send("XINFO", "CONSUMERS", keys.requests(TAG), "replicas")
    ]
    assert RETURNED in names


async def test_the_group_can_be_created_again(
    join: Joining, publish: Publish, commands: RedisConnection, keys: Keys
) -> None:
    """Redis lost its data (faststream#2611)."""
    replica = await join("a")
    await commands.send("DEL", keys.requests(TAG))
    with pytest.raises(BrokerRefused, match="NOGROUP"):
        await replica.claim()
    (ref,) = await publish("1")
    await replica.group.ensure()
    assert await replica.claim() == {ref: "1"}


async def test_a_reply_goes_only_to_a_caller_with_a_stream(
    join: Joining, commands: RedisConnection, keys: Keys
) -> None:
    replica = await join("a")
    replica.group.replies.send("gone", Reply("1").fields())
    await commands.send("XADD", keys.replies("here"), "*", "", "")
    replica.group.replies.send("here", Reply("1", body=b"x").fields())
    assert await commands.send("EXISTS", keys.replies("gone")) == 0
    *_, (_, fields) = await commands.send("XRANGE", keys.replies("here"), "-", "+")
    assert Reply.of(fields) == Reply("1", body=b"x")


async def test_accepted_requests_are_completed_when_the_broker_is_out_of_memory(
    server: EmbeddedServer, connect: Connect, keys: Keys
) -> None:
    commands = await connect(server.url)
    dead, successor = [Replica(commands, await connect(server.url), keys, name) for name in ("dead", "successor")]
    await successor.group.ensure()
    await successor.live()
    for n in range(4):
        await commands.send("XADD", keys.requests(TAG), "*", *Entry(str(n), "me", Header()).fields())
    await commands.send("XADD", keys.replies("me"), "*", "", "")
    await dead.claim(2)
    await commands.send("CONFIG", "SET", "maxmemory", 1)

    await successor.group.ensure()  # as a replica does when it starts or reconnects
    assert (await successor.group.pending.count())[:2] == (2, 0)
    first, second = await successor.group.pending.claim_redelivered(), await successor.group.pending.claim_redelivered()
    assert first is not None
    assert second is not None
    await successor.group.dead_letters.add(first, "poison", max_dead_letters=10)
    (third, *_) = await successor.claim(1)
    successor.group.acknowledger.give_back([third])
    ((retaken, _),) = await successor.group.claimer.claim_returned(1)
    for ref in (second.ref, retaken):
        reply = Reply(ref.decode(), large=True)
        successor.group.replies.send_large("me", reply.id, bytes(1_000), 60_000, reply.fields(), list[bytes])
        successor.group.acknowledger.settle([ref])
    await successor.group.leave()

    replies = [fields for _, fields in await commands.send("XRANGE", keys.replies("me"), "-", "+")][1:]
    assert [Reply.of(fields).id for fields in replies] == [second.ref.decode(), retaken.decode()]
    assert await commands.send("STRLEN", keys.reply_body("me", retaken.decode())) == 1_000
    assert await commands.send("XLEN", keys.dead(TAG)) == 1
    assert await commands.send("XLEN", keys.requests(TAG)) == 1


async def test_a_reply_and_its_settlement_wait_together_for_the_broker(
    server: EmbeddedServer, connect: Connect, keys: Keys
) -> None:
    """If the reply timed out and the settlement did not, a request would be lost."""
    commands = await connect(server.url)
    commands.patience_s = 0.0
    replica = Replica(commands, await connect(server.url), keys, "a")
    await commands.send("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    other = await connect(server.url)
    await other.send("XADD", keys.replies("me"), "*", "", "")
    other.post(lambda reply: None, "CLIENT", "KILL", "ID", await commands.send("CLIENT", "ID"))
    await wait_until_async(lambda: not commands.connected)
    replica.group.replies.send("me", Reply("1").fields())
    replica.group.acknowledger.settle([b"1-1"])
    await wait_until_async(lambda: commands.connected)
    assert await other.send("XLEN", keys.replies("me")) == 2


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
    assert await commands.send("EXISTS", keys.body(TAG, "second")) == 1


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
