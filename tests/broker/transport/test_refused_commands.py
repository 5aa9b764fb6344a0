"""Commands that a broker refuses for a temporary reason are kept, and sent again in order."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from penstock.broker.errors import BrokerFull, BrokerUnavailable
from penstock.broker.registry.records import BackendRecord, Change
from penstock.broker.registry.store import Registry
from penstock.broker.transport.commands import Script
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys
from tests.broker.conftest import Connect
from tests.faults.injected.refusing_proxy import ERRORS, RefusingProxy
from tests.support.waiting import wait_until_async

TEMPORARY = sorted(ERRORS.keys() - {"READONLY", "OOM"})
PUSH = Script("#!lua\nreturn redis.call('RPUSH', KEYS[1], ARGV[1])")


@pytest.fixture
def broker(redis_url: str) -> Iterator[RefusingProxy]:
    with RefusingProxy(redis_url) as broker:
        yield broker


async def in_order(connection: RedisConnection, count: int) -> bool:
    return bool(await connection.send("LRANGE", "list", 0, -1) == [b"%d" % n for n in range(count)])


def post(connection: RedisConnection, n: int) -> asyncio.Future[Any]:
    """Send a command; every second one is a script."""
    if n % 2:
        return connection.run_script(PUSH, ["list"], [n], repeat=True, patient=True)
    return connection.send("RPUSH", "list", n, repeat=True, patient=True)


@pytest.mark.parametrize("code", sorted(ERRORS.keys() - {"OOM"}))
async def test_patient_commands_are_executed_in_order_after_a_refusal(
    broker: RefusingProxy, connect: Connect, code: str
) -> None:
    connection = await connect(broker.url)
    broker.error = ERRORS[code]
    early = [post(connection, n) for n in range(20)]
    await wait_until_async(lambda: len(broker.refused) >= 20)
    late = [post(connection, n) for n in range(20, 40)]
    assert connection.has_waiting_commands
    broker.error = ""
    await asyncio.wait_for(asyncio.gather(*early, *late), 20)
    assert await in_order(connection, 40)
    assert not connection.has_waiting_commands


async def test_waiting_commands_are_sent_again_only_after_a_successful_probe(
    broker: RefusingProxy, connect: Connect
) -> None:
    connection = await connect(broker.url)
    broker.error = ERRORS["NOREPLICAS"]
    waiting = connection.send("SET", "a", "1", repeat=True, patient=True)
    await wait_until_async(lambda: len(broker.refused) >= 5)
    broker.error = ""
    assert await asyncio.wait_for(waiting, 20) == b"OK"
    assert broker.refused.count(b"SET") == 1
    assert set(broker.refused) == {b"SET", b"EVAL"}


async def test_reads_are_answered_while_writes_are_refused(broker: RefusingProxy, connect: Connect) -> None:
    connection = await connect(broker.url)
    await connection.send("SET", "a", "1")
    broker.error = ERRORS["MISCONF"]
    waiting = connection.send("SET", "a", "2", repeat=True, patient=True)
    await wait_until_async(lambda: connection.has_waiting_commands)
    assert await asyncio.wait_for(connection.send("GET", "a"), 20) == b"1"
    broker.error = ""
    await waiting


@pytest.mark.parametrize("code", TEMPORARY)
async def test_a_prompt_command_fails_at_once_with_the_reason(
    broker: RefusingProxy, connect: Connect, code: str
) -> None:
    connection = await connect(broker.url, patience_s=60)
    broker.error = ERRORS[code]
    with pytest.raises(BrokerUnavailable, match=f"it refuses writes: {code}") as caught:
        await asyncio.wait_for(connection.send("SET", "a", "1", prompt=True), 20)
    assert caught.value.retry_after_s > 0
    assert connection.refuses_writes
    broker.error = ""
    await wait_until_async(lambda: not connection.refuses_writes)


async def test_an_impatient_command_waits_until_the_time_limit_of_the_outage(
    broker: RefusingProxy, connect: Connect
) -> None:
    connection = await connect(broker.url, patience_s=0.5)
    broker.error = ERRORS["NOREPLICAS"]
    began_at = time.monotonic()
    # Even a command that must not be repeated is sent again: it was refused, so it was not executed.
    with pytest.raises(BrokerUnavailable, match="it refuses writes: NOREPLICAS"):
        await connection.send("INCR", "a")
    assert time.monotonic() - began_at > 0.4
    with pytest.raises(BrokerUnavailable):
        await asyncio.wait_for(connection.send("INCR", "a"), 20)
    broker.error = ""
    await wait_until_async(lambda: not connection.refuses_writes)
    connection.patience_s = 60
    broker.error = ERRORS["NOREPLICAS"]
    counted = connection.send("INCR", "a")
    await wait_until_async(lambda: connection.has_waiting_commands)
    broker.error = ""
    assert await asyncio.wait_for(counted, 20) == 1


async def test_only_a_patient_command_waits_for_memory(broker: RefusingProxy, connect: Connect) -> None:
    connection = await connect(broker.url)
    broker.error = ERRORS["OOM"]
    with pytest.raises(BrokerFull):
        await connection.send("SET", "a", "1", repeat=True)
    with pytest.raises(BrokerFull):
        await connection.run_script(PUSH, ["list"], ["x"])
    waiting = connection.run_script(PUSH, ["list"], ["0"], patient=True)
    await wait_until_async(lambda: connection.has_waiting_commands)
    broker.error = ""
    assert await asyncio.wait_for(waiting, 20) == 1


async def test_commands_that_were_refused_survive_the_connection(broker: RefusingProxy, connect: Connect) -> None:
    connection = await connect(broker.url)
    broker.error = ERRORS["NOREPLICAS"]
    sent = [post(connection, n) for n in range(10)]
    await wait_until_async(lambda: len(broker.refused) >= 10)
    broker.cut(1.0)
    await wait_until_async(lambda: broker.cuts)
    broker.error = ""
    await asyncio.wait_for(asyncio.gather(*sent), 20)
    assert await in_order(connection, 10)


async def test_a_server_that_is_not_the_primary_is_unavailable(broker: RefusingProxy) -> None:
    broker.error = ERRORS["READONLY"]
    with pytest.raises(BrokerUnavailable, match="read only replica"):
        await RedisConnection(broker.url, patience_s=2.0).open()


async def test_a_demotion_is_noticed_by_a_connection_that_only_reads(broker: RefusingProxy, connect: Connect) -> None:
    connection = await connect(broker.url)
    reading = connection.send("XREAD", "BLOCK", 500, "STREAMS", "s", "$", repeat=True)
    broker.error = ERRORS["READONLY"]
    await wait_until_async(lambda: not connection.connected)
    broker.error = ""
    await wait_until_async(lambda: connection.connected)
    assert await asyncio.wait_for(reading, 20) is None


async def test_a_hook_that_is_refused_runs_again(broker: RefusingProxy, connect: Connect) -> None:
    connection = await connect(broker.url, patience_s=0.2)
    runs = 0

    async def hook() -> None:
        nonlocal runs
        runs += 1
        await connection.send("SET", "hooked", "1")

    connection.on_reconnect(hook)
    broker.error = ERRORS["NOREPLICAS"]
    broker.cut(1.0)
    await wait_until_async(lambda: runs >= 2)
    broker.error = ""

    async def is_done() -> bool:
        with suppress(BrokerUnavailable):  # it is not back yet, for longer than this connection has patience
            return bool(await connection.send("GET", "hooked") == b"1")
        return False

    await wait_until_async(is_done)


async def test_an_outage_is_one_warning_for_all_connections(
    broker: RefusingProxy, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    connections = [await connect(broker.url) for _ in range(4)]
    broker.error = ERRORS["NOREPLICAS"]
    for connection in connections:
        connection.post(lambda _: None, "SET", "a", "1", patient=True)
    await wait_until_async(lambda: all(connection.refuses_writes for connection in connections))
    broker.error = ""
    await wait_until_async(lambda: not any(connection.refuses_writes for connection in connections))
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "refuses writes" in caplog.text
    assert "is back" in caplog.text


async def test_a_change_of_the_registry_waits_for_a_server_that_refuses_writes(
    broker: RefusingProxy, connect: Connect, keys: Keys
) -> None:
    registry = Registry(await connect(broker.url), keys)
    record = BackendRecord(tag="b", version="1", code="")
    broker.error = ERRORS["NOREPLICAS"]
    changing = asyncio.ensure_future(registry.change(lambda seen: Change({"b": record})))
    await wait_until_async(lambda: b"EVALSHA" in broker.refused or broker.refused.count(b"EVAL") > 1)
    broker.error = ""
    assert await asyncio.wait_for(changing, 20) == 1
    assert (await registry.snapshot()).backends == {"b": record}
    await registry.erase()


async def test_a_refused_change_of_the_registry_is_an_unavailable_broker(
    broker: RefusingProxy, connect: Connect, keys: Keys
) -> None:
    registry = Registry(await connect(broker.url, patience_s=0.2), keys)
    broker.error = ERRORS["NOREPLICAS"]
    with pytest.raises(BrokerUnavailable, match="it refuses writes: NOREPLICAS"):
        await registry.put_settings({"a": 1})
    with pytest.raises(BrokerUnavailable):
        await registry.own("me", 10)
