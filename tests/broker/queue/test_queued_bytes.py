"""The limit of bytes of a queue: exact at any number of callers, and released by every end of an entry."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from penstock.broker.errors import BrokerUnavailable
from penstock.broker.queue.consumer_group import ConsumerGroup
from penstock.broker.queue.counts.queue_depth import read_depth
from penstock.broker.queue.dead_letters import DeadLetterStream
from penstock.broker.queue.group.pending_entries import RedeliveredEntry
from penstock.broker.queue.publisher import Published, Publisher, QueueFull
from penstock.broker.queue.purge import purge_backend
from penstock.broker.queue.queued_bytes import SET_ASIDE, SMALL, reservation_of
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire._fields import LARGE
from penstock.broker.wire.keys import Keys
from penstock.broker.wire.requests import Entry, Header, RawEntry
from tests.broker.conftest import Connect
from tests.broker.queue.replica import hold_lease
from tests.support.waiting import wait_until_async

TAG = "model"
ASIDE = (SET_ASIDE - 1) * SMALL
"""The bytes that are always charged for small requests."""
MIDDLE = 10_000
"""The size of a body that is neither small nor in a key of its own."""


def entry(id_: str, body_bytes: int = 0) -> RawEntry:
    body = bytes(body_bytes)
    large = len(body) > LARGE
    return RawEntry(id_.encode(), b"me", Header().dump(), None if large else body, len(body) if large else 0)


def charge_of(raw: RawEntry) -> int:
    return max(SMALL, raw.size_bytes)


def publish(
    publisher: Publisher, raw: RawEntry, limit_bytes: int, *, batch: bool = False, limit: int = 10_000
) -> asyncio.Future[Published]:
    future: asyncio.Future[Published] = asyncio.get_running_loop().create_future()
    publisher.publish(TAG, raw, limit, future.set_result, batch=batch, limit_bytes=limit_bytes)
    return future


async def store(commands: RedisConnection, keys: Keys, *raws: RawEntry) -> None:
    """Store the bodies of large requests."""
    for raw in raws:
        await commands.send("SET", keys.body(TAG, raw.id.decode()), bytes(raw.large_bytes), "PX", 60_000)


def reserve(publisher: Publisher, raw: RawEntry, limit_bytes: int) -> asyncio.Future[QueueFull | Exception | None]:
    future: asyncio.Future[QueueFull | Exception | None] = asyncio.get_running_loop().create_future()
    publisher.reserve(TAG, raw, 10_000, future.set_result, limit_bytes=limit_bytes)
    return future


@pytest.fixture
async def publishers(broker_url: str, commands: RedisConnection, connect: Connect, keys: Keys) -> list[Publisher]:
    """Five callers of one backend, each with a connection of its own."""
    return [Publisher(commands, keys), *[Publisher(await connect(broker_url), keys) for _ in range(4)]]


@pytest.fixture
def join(
    broker_url: str, commands: RedisConnection, connect: Connect, keys: Keys
) -> Callable[[str], Awaitable[ConsumerGroup]]:
    """Makes replicas with a lease."""

    async def join(name: str) -> ConsumerGroup:
        group = ConsumerGroup(commands, await connect(broker_url), keys, TAG, name)
        await group.ensure()
        await hold_lease(group.lease)
        return group

    return join


@pytest.fixture
def queued_bytes(commands: RedisConnection, keys: Keys) -> Callable[[], Awaitable[int]]:
    async def queued_bytes() -> int:
        return (await read_depth(commands, keys, TAG)).queued_bytes

    return queued_bytes


async def claim(group: ConsumerGroup) -> dict[bytes, Entry]:
    """Claim as a consumer does: it notes the entries with a record of tsuccessor size."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    group.claimer.claim(100, future.set_result)
    claimed = {ref: Entry.of(fields) for ref, fields in await future}
    for ref, one in claimed.items():
        if one.size_bytes:
            group.acknowledger.hold_sized(ref)
    return claimed


async def accepted(result: Awaitable[Published]) -> bytes:
    ref = await result
    assert isinstance(ref, bytes)
    return ref


async def test_the_limit_holds_exactly_for_any_sizes_at_any_number_of_callers(
    publishers: list[Publisher], commands: RedisConnection, keys: Keys, queued_bytes: Callable[[], Awaitable[int]]
) -> None:
    limit_bytes, chance = 2_000_000, random.Random(7)
    raws = [entry(str(n), chance.choice((0, 100, MIDDLE, 60_000, 200_000))) for n in range(300)]
    asked = [publish(publishers[n % 5], raw, limit_bytes, batch=n % 3 == 0) for n, raw in enumerate(raws)]
    results = await asyncio.gather(*asked)
    taken = sum(charge_of(raw) for raw, result in zip(raws, results, strict=True) if isinstance(result, bytes))
    refused = [(raw, result) for raw, result in zip(raws, results, strict=True) if isinstance(result, QueueFull)]
    assert refused
    assert taken == await queued_bytes() <= limit_bytes
    for raw, result in refused:
        assert result.in_bytes
        assert result.depth + charge_of(raw) > limit_bytes
        assert taken + charge_of(raw) > limit_bytes


async def test_settling_makes_room_for_as_many_requests(
    publishers: list[Publisher],
    join: Callable[[str], Awaitable[ConsumerGroup]],
    queued_bytes: Callable[[], Awaitable[int]],
) -> None:
    raws = [entry(str(n), MIDDLE) for n in range(20)]
    limit_bytes = 8 * charge_of(raws[0]) + ASIDE - 7 * SMALL  # 8 requests use the bytes reserved for 8 small ones
    replica = await join("replica")
    for _ in range(3):
        results = await asyncio.gather(*[publish(publishers[n % 5], raw, limit_bytes) for n, raw in enumerate(raws)])
        assert sum(isinstance(result, bytes) for result in results) == 8
        held = await claim(replica)
        replica.acknowledger.settle(held)
        replica.acknowledger.settle(held)  # as after a redelivery
        assert len(held) == 8
        await wait_until_async(lambda: _is_zero(queued_bytes))


async def test_all_small_requests_are_charged_the_same(
    publishers: list[Publisher],
) -> None:
    limit_bytes = 100 * SMALL
    results = await asyncio.gather(
        *[publish(publishers[n % 5], entry(str(n), n % 50), limit_bytes, batch=n % 2 == 0) for n in range(150)]
    )
    assert sum(isinstance(result, bytes) for result in results) == 100
    assert QueueFull(limit_bytes, 1.0, in_bytes=True) in results


async def test_a_short_queue_admits_small_requests_when_large_ones_fill_the_limit(
    publishers: list[Publisher], queued_bytes: Callable[[], Awaitable[int]]
) -> None:
    limit_bytes = 1_000_000
    large = await asyncio.gather(*[publish(publishers[0], entry(str(n), 90_000), limit_bytes) for n in range(20)])
    assert any(isinstance(result, QueueFull) for result in large)
    for n in range(SET_ASIDE - sum(isinstance(result, bytes) for result in large)):
        await accepted(publish(publishers[1], entry(f"small-{n}"), limit_bytes))
    assert await queued_bytes() <= limit_bytes


async def test_the_limit_of_requests_is_checked_first(publishers: list[Publisher]) -> None:
    await accepted(publish(publishers[0], entry("1", MIDDLE), 1_000_000, limit=1))
    assert await publish(publishers[1], entry("2", MIDDLE), 1_000_000, limit=1) == QueueFull(1, 1.0)


@pytest.mark.parametrize("batch", [False, True])
async def test_every_end_of_a_request_releases_its_bytes(
    batch: bool,
    publishers: list[Publisher],
    commands: RedisConnection,
    keys: Keys,
    join: Callable[[str], Awaitable[ConsumerGroup]],
    queued_bytes: Callable[[], Awaitable[int]],
) -> None:
    async def one() -> bytes:
        return await accepted(publish(publishers[0], entry("r", MIDDLE), 1_000_000, batch=batch))

    replica, successor = await join("replica"), await join("successor")

    publishers[1].withdraw(TAG, await one(), batch=batch)
    await wait_until_async(lambda: _is_zero(queued_bytes))

    await one()
    [(ref, held)] = (await claim(replica)).items()
    await replica.dead_letters.add(RedeliveredEntry(ref, 0, held.fields()), "cannot be read", max_dead_letters=10)
    assert await queued_bytes() == 0

    await one()
    held_refs = list(await claim(replica))
    replica.acknowledger.give_back(held_refs)
    [(ref, fields)] = await _claim_returned(successor)
    assert Entry.of(fields).size_bytes == charge_of(entry("r", MIDDLE))
    successor.acknowledger.hold_sized(ref)
    successor.acknowledger.settle([ref])
    await wait_until_async(lambda: _is_zero(queued_bytes))

    await one()
    await claim(replica)
    await commands.send("DEL", keys.alive(TAG, "replica"))  # it is killed
    taken = await successor.pending.claim_redelivered([b"replica"])
    assert taken is not None
    successor.acknowledger.hold_sized(taken.ref)
    successor.acknowledger.settle([taken.ref])
    replica.acknowledger.settle([taken.ref])  # it was late and not dead
    await wait_until_async(lambda: _is_zero(queued_bytes))

    await one()
    await purge_backend(commands, keys, TAG, 503, {"kind": "BackendNotFound", "args": [TAG, []]})
    assert await queued_bytes() == 0
    assert not await commands.send("EXISTS", keys.sizes(TAG))


async def test_settling_all_entries_deletes_all_records(
    publishers: list[Publisher], commands: RedisConnection, keys: Keys, join: Callable[[str], Awaitable[ConsumerGroup]]
) -> None:
    replica = await join("replica")
    for n in range(10):
        await accepted(publish(publishers[0], entry(str(n), n * 2_000), 1_000_000))
    replica.acknowledger.settle(await claim(replica))
    await wait_until_async(lambda: _is_gone(commands, keys.sizes(TAG)))


@pytest.mark.parametrize("batch", [False, True])
async def test_entries_removed_by_other_means_are_not_charged_for_ever(
    batch: bool, publishers: list[Publisher], commands: RedisConnection, keys: Keys
) -> None:
    stream = keys.batch(TAG) if batch else keys.requests(TAG)
    raws = [entry(str(n), 50_000) for n in range(20)]
    limit_bytes = 10 * charge_of(raws[0]) + ASIDE
    for raw in raws[:10]:
        await accepted(publish(publishers[0], raw, limit_bytes, batch=batch))
    assert isinstance(await publish(publishers[0], raws[10], limit_bytes, batch=batch), QueueFull)
    await commands.send("XTRIM", stream, "MAXLEN", 4)

    async def fits() -> bool:
        return isinstance(await publish(publishers[1], raws[11], limit_bytes, batch=batch), bytes)

    await wait_until_async(fits)
    room = [await publish(publishers[1], raw, limit_bytes, batch=batch) for raw in raws[12:]]
    assert sum(isinstance(result, bytes) for result in room) == 5


async def test_a_body_is_stored_only_if_there_is_room(
    publishers: list[Publisher], commands: RedisConnection, keys: Keys, queued_bytes: Callable[[], Awaitable[int]]
) -> None:
    raws = [entry(str(n), 1_000_000) for n in range(10)]
    limit_bytes = 3 * charge_of(raws[0]) + ASIDE
    answers = await asyncio.gather(*[reserve(publishers[n % 5], raw, limit_bytes) for n, raw in enumerate(raws)])
    reserved = [raw for raw, answer in zip(raws, answers, strict=True) if answer is None]
    assert len(reserved) == 3
    assert all(isinstance(answer, QueueFull) and answer.in_bytes for answer in answers if answer is not None)
    assert await reserve(publishers[0], reserved[0], limit_bytes) is None  # repeated by the connection
    assert isinstance(await publish(publishers[0], entry("other", MIDDLE), limit_bytes), QueueFull)
    await store(commands, keys, *reserved[:2])
    for raw in reserved[:2]:
        await accepted(publish(publishers[0], raw, limit_bytes))
    assert await queued_bytes() == 3 * charge_of(raws[0])
    publishers[0].forget_reservation(TAG, reserved[2])

    async def is_forgotten() -> bool:
        return await queued_bytes() == 2 * charge_of(raws[0])

    await wait_until_async(is_forgotten)
    assert await reserve(publishers[1], raws[9], limit_bytes) is None


async def test_bodies_without_a_reservation_are_charged_exactly(
    publishers: list[Publisher], commands: RedisConnection, keys: Keys, queued_bytes: Callable[[], Awaitable[int]]
) -> None:
    raws = [entry(str(n))._replace(body=None, large_bytes=100_000) for n in range(20)]
    await store(commands, keys, *raws)
    limit_bytes = 7 * charge_of(raws[0]) + ASIDE
    results = await asyncio.gather(*[publish(publishers[n % 5], raw, limit_bytes) for n, raw in enumerate(raws)])
    assert sum(isinstance(result, bytes) for result in results) == 7
    assert all(result.in_bytes for result in results if isinstance(result, QueueFull))
    assert await queued_bytes() == 7 * charge_of(raws[0])


async def test_a_request_whose_body_is_not_stored_is_not_accepted(
    publishers: list[Publisher], commands: RedisConnection, keys: Keys, queued_bytes: Callable[[], Awaitable[int]]
) -> None:
    for large_bytes in (100_000, 1_000_000):
        stored, missing = (entry(id_)._replace(body=None, large_bytes=large_bytes) for id_ in ("stored", "missing"))
        await store(commands, keys, stored)
        # In one call of the script, with a small one behind them.
        published = [publish(publishers[0], raw, 10_000_000) for raw in (stored, missing, entry("small"))]
        first, refused, last = await asyncio.gather(*published)
        assert isinstance(first, bytes)
        assert isinstance(refused, BrokerUnavailable)
        assert "has not stored the body" in str(refused)
        assert isinstance(last, bytes)
        assert [fields[3] for _, fields in await commands.send("XRANGE", keys.requests(TAG), first, last)] == [
            b"stored",
            b"small",
        ]
    assert await queued_bytes() == sum(max(SMALL, size + len(Header().dump())) for size in (100_000, 1_000_000, 0, 0))


async def test_the_reservation_of_a_dead_caller_expires(
    publishers: list[Publisher], commands: RedisConnection, keys: Keys
) -> None:
    dead, successor = entry("dead", 1_000_000), entry("successor", 1_000_000)
    limit_bytes = charge_of(dead) + ASIDE
    assert await reserve(publishers[0], dead, limit_bytes) is None
    assert isinstance(await reserve(publishers[1], successor, limit_bytes), QueueFull)
    # A minute passes.
    name = reservation_of(dead.id)
    assert dead.id not in name
    size, _, since_ms = (await commands.send("HGET", keys.sizes(TAG), name)).partition(b":")
    await commands.send("HSET", keys.sizes(TAG), name, b"%b:%d" % (size, int(since_ms) - 61_000))

    async def fits() -> bool:
        return await reserve(publishers[1], successor, limit_bytes) is None

    await wait_until_async(fits)
    await store(commands, keys, dead, successor)
    await accepted(publish(publishers[1], successor, limit_bytes))
    # A reservation that was only late is checked again.
    assert isinstance(await publish(publishers[0], dead, limit_bytes), QueueFull)


async def test_a_replayed_dead_letter_is_charged_as_a_request(
    publishers: list[Publisher],
    commands: RedisConnection,
    keys: Keys,
    join: Callable[[str], Awaitable[ConsumerGroup]],
    queued_bytes: Callable[[], Awaitable[int]],
) -> None:
    replica, dead = await join("replica"), DeadLetterStream(commands, keys, TAG)
    raw = entry("r", 50_000)
    limit_bytes = charge_of(raw) + ASIDE
    await accepted(publish(publishers[0], raw, limit_bytes))
    [(ref, held)] = (await claim(replica)).items()
    await replica.dead_letters.add(RedeliveredEntry(ref, 0, held.fields()), "it died", max_dead_letters=10)
    [letter] = [letter async for letter in dead.letters()]
    blocking = await accepted(publish(publishers[0], entry("s", MIDDLE), limit_bytes))
    refused = await dead.replay(letter, 100, limit_bytes)
    assert isinstance(refused, QueueFull)
    assert refused.in_bytes
    publishers[0].withdraw(TAG, blocking)
    assert isinstance(await dead.replay(letter, 100, limit_bytes), str)
    assert await queued_bytes() == charge_of(raw)
    replica.acknowledger.settle(await claim(replica))
    await wait_until_async(lambda: _is_zero(queued_bytes))


async def _is_zero(queued_bytes: Callable[[], Awaitable[int]]) -> bool:
    return await queued_bytes() == 0


async def _is_gone(commands: RedisConnection, key: str) -> bool:
    return not await commands.send("EXISTS", key)


async def _claim_returned(successor: ConsumerGroup) -> list[tuple[bytes, list[bytes]]]:
    taken: list[tuple[bytes, list[bytes]]] = []

    async def some() -> bool:
        taken.extend(await successor.claimer.claim_returned(10))
        return bool(taken)

    await wait_until_async(some)
    return taken
