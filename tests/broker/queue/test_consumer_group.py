import pytest

from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.errors import BrokerRefused
from penstock.broker.queue.group.member import RETURNED
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys
from penstock.broker.wire.replies import Reply
from penstock.broker.wire.requests import Entry, Header
from tests.broker.conftest import Connect
from tests.broker.queue.replica import TAG, Joining, Publish, Replica


async def test_requests_published_before_the_first_replica_are_claimed(join: Joining, publish: Publish) -> None:
    refs = await publish("1", "2")
    replica = await join("a")
    await replica.group.ensure()
    assert await replica.claim() == dict(zip(refs, ["1", "2"], strict=True))


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
    await other.group.pending.tidy()
    assert await consumers() == {"leaving"}
    leaving.group.acknowledger.settle([ref])
    await commands.send("DEL", keys.tidy_turn(TAG))
    await other.group.pending.tidy()
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
    await replica.group.pending.tidy()
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
    assert (await successor.group.pending.sweep()).dead == [b"dead"]
    first, second = await successor.redeliver("dead"), await successor.redeliver("dead")
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
