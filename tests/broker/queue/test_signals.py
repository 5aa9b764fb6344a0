"""Signals to the replicas of a backend."""

from __future__ import annotations

from penstock.broker.queue.signals import Signals, signal
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys
from tests.support.waiting import wait_until_async

TAG = "model"


async def test_a_signal_of_the_moment_before_the_first_reading_is_received(
    commands: RedisConnection, broker_url: str, keys: Keys
) -> None:
    """So none is lost between a reading that found none and the next one."""
    signal(commands, keys, TAG, b"before")
    await commands.send("PING")
    received: list[bytes] = []
    signals = Signals(broker_url, keys, TAG, received.append)
    await signals.open()
    await wait_until_async(lambda: received == [b"before"])
    await signals.close()


async def test_a_signal_is_received_once(commands: RedisConnection, broker_url: str, keys: Keys) -> None:
    received: list[bytes] = []
    signals = Signals(broker_url, keys, TAG, received.append)
    await signals.open()
    sent = [b"%d" % n for n in range(300)]
    for message in sent:
        signal(commands, keys, TAG, message)
    await wait_until_async(lambda: len(received) >= len(sent))
    assert received == sent
    await signals.close()
