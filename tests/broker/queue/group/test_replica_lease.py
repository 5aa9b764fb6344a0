"""Leases of replicas, and the turns to look for dead ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from redis import Redis

from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.errors import BrokerUnavailable
from penstock.broker.queue.consumer_group import ConsumerGroup
from penstock.broker.queue.group import replica_lease
from penstock.broker.queue.group.replica_lease import SWEEP_S
from penstock.broker.queue.leases import RENEW_S, TTL_S
from penstock.broker.registry.store import Registry
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys
from tests.broker.conftest import Connect
from tests.broker.queue.replica import TAG, Joining, Publish
from tests.faults.injected.refusing_proxy import ERRORS, RefusingProxy
from tests.support.waiting import wait_until_async


@pytest.fixture
async def group(redis_url: str, connect: Connect, keys: Keys) -> AsyncIterator[ConsumerGroup]:
    group = ConsumerGroup(await connect(redis_url), await connect(redis_url), keys, TAG, "a")
    yield group
    await group.lease.stop()


def no_turn() -> None:
    """Do not look for dead replicas."""


async def test_a_lease_is_held_while_code_blocks_the_event_loop(
    group: ConsumerGroup, redis_url: str, keys: Keys
) -> None:
    await group.lease.start(no_turn)
    held_since_s = group.lease.held_since_s
    with Redis.from_url(redis_url) as redis:
        ends_s = time.monotonic() + 2 * TTL_S
        while time.monotonic() < ends_s:
            assert redis.exists(keys.alive(TAG, "a"))
            time.sleep(0.01)  # noqa: ASYNC251 - it blocks the loop, as bad code does
    assert group.lease.held_since_s == held_since_s
    assert group.lease.is_trusted


async def test_a_stopped_lease_is_gone_at_once(group: ConsumerGroup, redis_url: str, keys: Keys) -> None:
    await group.lease.start(no_turn)
    await group.lease.stop()
    with Redis.from_url(redis_url) as redis:
        assert not redis.exists(keys.alive(TAG, "a"))


async def test_a_lease_is_held_without_a_third_connection_while_the_event_loop_runs(
    group: ConsumerGroup, redis_url: str
) -> None:
    await group.lease.start(no_turn)
    await wait_until_async(lambda: group.lease.is_trusted)
    with Redis.from_url(redis_url) as redis:

        def has_none() -> bool:
            return "penstock-lease" not in [client["name"] for client in redis.client_list()]

        await wait_until_async(has_none)  # a busy machine can stop the loop


async def test_a_refused_renewal_is_repeated_and_the_gap_is_known(redis_url: str, connect: Connect, keys: Keys) -> None:
    with RefusingProxy(redis_url) as between:
        group = ConsumerGroup(await connect(between.url), await connect(redis_url), keys, TAG, "a")
        await group.lease.start(no_turn)
        first_s = group.lease.held_since_s
        assert first_s is not None
        between.error = ERRORS["NOREPLICAS"]
        with Redis.from_url(redis_url) as redis:
            await wait_until_async(lambda: not redis.exists(keys.alive(TAG, "a")))
        between.error = ""
        await wait_until_async(lambda: (group.lease.held_since_s or 0.0) > first_s)
        assert not group.lease.is_trusted
        await wait_until_async(lambda: group.lease.is_trusted)
        await group.lease.stop()


@pytest.mark.parametrize("code", sorted(ERRORS.keys() - {"OOM"}))
async def test_a_temporary_refusal_of_the_first_renewal_is_an_unavailable_broker(
    redis_url: str, connect: Connect, keys: Keys, code: str
) -> None:
    with RefusingProxy(redis_url) as between:
        commands = await connect(between.url)
        between.error = ERRORS[code]
        group = ConsumerGroup(commands, await connect(redis_url), keys, TAG, "a")
        with pytest.raises(BrokerUnavailable):
            await asyncio.wait_for(group.lease.start(no_turn), 20)
        await group.lease.stop()


@pytest.mark.slow
async def test_a_lease_is_held_at_a_broker_that_is_out_of_memory(
    server: EmbeddedServer, connect: Connect, keys: Keys
) -> None:
    group = ConsumerGroup(await connect(server.url), await connect(server.url), keys, TAG, "a")
    turns: list[float] = []
    await group.lease.start(lambda: turns.append(time.monotonic()))
    with Redis.from_url(server.url) as redis:
        redis.config_set("maxmemory", 1)
        held_since_s, began_s = group.lease.held_since_s, time.monotonic()
        await wait_until_async(lambda: time.monotonic() > began_s + 1.5 * TTL_S and turns[-1] > began_s + TTL_S)
        assert redis.exists(keys.alive(TAG, "a"))
    assert group.lease.held_since_s == held_since_s
    await group.lease.stop()


@pytest.mark.parametrize("count", [1, 12])
async def test_turns_are_as_frequent_with_many_replicas_as_with_one(
    redis_url: str, connect: Connect, keys: Keys, count: int
) -> None:
    turns: list[float] = []
    async with AsyncExitStack() as stack:
        commands = await connect(redis_url)
        for n in range(count):
            group = ConsumerGroup(commands, commands, keys, TAG, f"r{n}")
            await group.lease.start(lambda: turns.append(time.monotonic()))
            stack.push_async_callback(group.lease.stop)
        await wait_until_async(lambda: len(turns) >= 6)
    # A turn ends by the broker's clock, and its end is noticed by the next renewal.
    gaps_s = [after - before for before, after in pairwise(turns)]
    assert sum(gaps_s) / len(gaps_s) > 0.75 * SWEEP_S


async def test_no_turn_depends_on_a_replica_that_is_gone(redis_url: str, connect: Connect, keys: Keys) -> None:
    turns: list[str] = []
    commands = await connect(redis_url)
    first, second = (ConsumerGroup(commands, commands, keys, TAG, name) for name in ("first", "second"))
    await first.lease.start(lambda: turns.append("first"))
    await wait_until_async(lambda: len(turns) >= 2)
    await second.lease.start(lambda: turns.append("second"))
    await first.lease.stop()
    await wait_until_async(lambda: "second" in turns)
    await second.lease.stop()


async def test_a_lease_that_another_process_has_changed_is_not_trusted(
    group: ConsumerGroup, connect: Connect, redis_url: str, keys: Keys
) -> None:
    await group.lease.start(no_turn)
    await wait_until_async(lambda: group.lease.is_trusted)
    await Registry(await connect(redis_url), keys).drop_lease(TAG, "a")
    await wait_until_async(lambda: not group.lease.is_trusted)


async def test_no_lease_is_trusted_after_a_reconnect(redis_url: str, connect: Connect, keys: Keys) -> None:
    """The new server may be one whose leases are older."""
    commands = await connect(redis_url, name="penstock-to-be-cut")
    group = ConsumerGroup(commands, commands, keys, TAG, "a")
    await group.lease.start(no_turn)
    await wait_until_async(lambda: group.lease.is_trusted)
    with Redis.from_url(redis_url) as redis:
        (mine,) = [client["id"] for client in redis.client_list() if client["name"] == "penstock-to-be-cut"]
        redis.client_kill_filter(_id=mine)
    await wait_until_async(lambda: not group.lease.is_trusted)
    await wait_until_async(lambda: group.lease.is_trusted)
    await group.lease.stop()


async def test_no_living_replica_counts_as_dead_when_the_clock_jumps(
    join: Joining, publish: Publish, commands: RedisConnection, keys: Keys
) -> None:
    """A clock that is set forward ends all leases at once."""
    one, other = await join("one"), await join("other")
    await publish("1")
    await one.claim()
    for name in ("one", "other"):
        await commands.send("DEL", keys.alive(TAG, name))
    assert (await other.group.pending.sweep()).dead == []
    assert await other.redeliver("one") is None
    await other.group.lease.renew()
    assert (await other.group.pending.sweep()).dead == []
    assert await other.redeliver("one") is None
    await one.group.lease.renew()
    await other.live()
    assert (await other.group.pending.sweep()).dead == []


async def test_a_clock_that_almost_ends_a_lease_proves_nothing(
    join: Joining, publish: Publish, commands: RedisConnection, keys: Keys
) -> None:
    """The lease of the one that looks was renewed last, so that it alone has survived the jump."""
    one, other = await join("one"), await join("other")
    await publish("1")
    await one.claim()
    await commands.send("DEL", keys.alive(TAG, "one"))
    await commands.send("PEXPIRE", keys.alive(TAG, "other"), 900)
    assert (await other.group.pending.sweep()).dead == []
    assert await other.redeliver("one") is None


STEPS = st.lists(
    st.sampled_from(["renew", "renew", "renew", "pass 0.4", "pass 0.9", "pass 1.5", "lose", "drop"]), max_size=60
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_a_lease_is_trusted_only_if_it_was_held_without_a_gap_for_its_lifetime(
    redis_url: str, keys: Keys, monkeypatch: pytest.MonkeyPatch, steps: list[str]
) -> None:
    now_s = 1_000.0
    monkeypatch.setattr(replica_lease, "monotonic", lambda: now_s)

    async def play() -> None:
        nonlocal now_s
        commands = await RedisConnection(redis_url).open()
        key = keys.alive(TAG, "a")
        lease = ConsumerGroup(commands, commands, keys, TAG, "a").lease
        held_since_s, renewed_s = None, 0.0
        try:
            for step in steps:
                if step == "renew":
                    if held_since_s is None or now_s - renewed_s > 2 * RENEW_S:
                        held_since_s = now_s
                    renewed_s = now_s
                    await lease.renew()
                elif step == "lose":
                    held_since_s = None
                    await commands.send("DEL", key)
                elif step == "drop":
                    held_since_s = None
                    await commands.send("SET", key, "dropped", "PX", 60_000)
                else:
                    now_s += float(step.split()[1])
                is_held = held_since_s is not None and now_s - held_since_s >= TTL_S
                if lease.is_trusted:
                    assert now_s - renewed_s <= 2 * RENEW_S
                    # What it has lost it notices with its next renewal; the script looks at the key itself.
                    assert is_held or step in ("lose", "drop") or held_since_s is None
                elif is_held:
                    assert now_s - renewed_s > 2 * RENEW_S
        finally:
            await commands.send("DEL", key)
            await commands.close()

    asyncio.run(play())
