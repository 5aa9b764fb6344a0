"""The attempts of an entry: they come back with it, whichever replica claims it again."""

import pytest

from penstock.broker.errors import WireError
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire._fields import RETRY_FIELD
from penstock.broker.wire.entry_ref import ref_of
from penstock.broker.wire.keys import Keys
from penstock.broker.wire.requests import Entry, Header
from tests.broker.queue.replica import TAG, Joining, Publish


def attempts_of(fields: list[bytes] | None) -> tuple[int, int]:
    assert fields is not None
    entry = Entry.of(fields)
    return entry.attempts, entry.due_ms


async def test_an_entry_that_was_given_back_has_its_attempts_with_it(join: Joining, publish: Publish) -> None:
    first, second = await join("first"), await join("second")
    refs = await publish("1", "2")
    await first.claim()
    first.group.attempts.record(refs[0], 2, 12_345)
    first.group.acknowledger.give_back(refs)
    claimed = await second.group.claimer.claim_returned(10)
    assert [attempts_of(fields) for _, fields in claimed] == [(2, 12_345), (0, 0)]


async def test_a_stray_claim_has_its_attempts_with_it(join: Joining, publish: Publish) -> None:
    replica = await join("a")
    refs = await publish("1")
    await replica.claim()
    replica.group.attempts.record(refs[0], 1, 7)
    (found,) = await replica.group.pending.reclaim(refs)
    assert attempts_of(found.fields) == (1, 7)
    assert found.is_fresh


async def test_the_attempts_of_a_batch_item_are_its_own(join: Joining, commands: RedisConnection, keys: Keys) -> None:
    replica = await join("a")
    fields = Entry("1", "me", Header()).fields()
    for stream in (keys.requests(TAG), keys.batch(TAG)):
        await commands.send("XADD", stream, "7-0", *fields)
    refs = [b"7-0", ref_of(b"7-0", batch=True)]
    assert list(await replica.claim()) == refs
    replica.group.attempts.record(refs[1], 3, 0)
    assert {one.ref: attempts_of(one.fields)[0] for one in await replica.group.pending.reclaim(refs)} == {
        refs[0]: 0,
        refs[1]: 3,
    }
    await replica.die()
    other = await join("other")
    taken = [await other.redeliver("a"), await other.redeliver("a")]
    assert [(one.ref, attempts_of(one.fields)[0]) for one in taken if one] == [(refs[0], 0), (refs[1], 3)]


async def test_the_death_of_its_replica_is_not_counted_while_an_entry_waits(
    join: Joining, publish: Publish, commands: RedisConnection, keys: Keys
) -> None:
    (ref,) = await publish("1")
    due_ms = int(commands.now_ms()) + 60_000
    replica = await join("first")
    await replica.claim()
    replica.group.attempts.record(ref, 1, due_ms)
    for name in ("second", "third"):
        await replica.die()
        replica = await join(name)
        taken = await replica.redeliver("first", "second", "third")
        assert taken is not None
        assert (taken.deliveries, attempts_of(taken.fields)) == (0, (1, due_ms))
    assert await commands.send("EXISTS", keys.history(TAG, ref.decode())) == 0
    replica.group.attempts.record(ref, 1, 0)  # the next attempt begins
    await replica.die()
    last = await join("last")
    taken = await last.redeliver("third")
    assert taken is not None
    assert (taken.deliveries, attempts_of(taken.fields)) == (1, (1, 0))
    assert await commands.send("LLEN", keys.history(TAG, ref.decode())) == 2


async def test_one_death_at_most_goes_uncounted_once_an_entry_is_due(
    join: Joining, publish: Publish, commands: RedisConnection
) -> None:
    """As if its next attempt ended each replica before that had recorded the begin of the attempt."""
    (ref,) = await publish("1")
    replica = await join("first")
    await replica.claim()
    replica.group.attempts.record(ref, 1, int(commands.now_ms()) - 1)
    counted: list[int] = []
    for name in ("second", "third", "fourth"):
        await replica.die()
        replica = await join(name)
        taken = await replica.redeliver("first", "second", "third")
        assert taken is not None
        counted.append(taken.deliveries)
    assert counted == [0, 1, 2]


async def test_attempts_are_forgotten_with_their_entry_and_expire_without_it(
    join: Joining, publish: Publish, commands: RedisConnection, keys: Keys
) -> None:
    replica = await join("a")
    (ref,) = await publish("1")
    key = keys.retry(TAG, ref.decode())
    replica.group.attempts.record(ref, 1, 0)
    assert 6 * 24 * 3600 < await commands.send("TTL", key) <= 7 * 24 * 3600
    replica.group.attempts.forget(ref)
    assert await commands.send("EXISTS", key) == 0


@pytest.mark.parametrize("raw", [b"", b"1", b"1:", b":5", b"-1:0", b"a:b", b"1:2:3"])
def test_attempts_that_cannot_be_read_are_an_error(raw: bytes) -> None:
    with pytest.raises(WireError, match="the attempts of an entry cannot be read"):
        Entry.of([*Entry("1", "me", Header()).fields(), RETRY_FIELD, raw])
