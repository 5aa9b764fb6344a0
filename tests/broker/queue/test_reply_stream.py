import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any, Protocol

import pytest

from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.queue.reply_stream import TTL_S, ReplyStream
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys
from tests.broker.conftest import Connect
from tests.support.waiting import wait_until_async


class Listening(Protocol):
    async def __call__(self, commands: RedisConnection, caller: str = ...) -> "Listener": ...


class Listener:
    """A caller's reply stream, and the replies that it received."""

    def __init__(self, commands: RedisConnection, keys: Keys, caller: str) -> None:
        self.key = keys.replies(caller)
        self.received: list[bytes] = []
        self.losses = 0
        self.stream = ReplyStream(commands, keys, caller, self._on_reply, self._on_loss)
        self._commands = commands

    def _on_reply(self, fields: list[bytes]) -> None:
        if fields[1] == b"garbage":
            raise ValueError("on purpose")
        self.received.append(fields[1])

    async def _on_loss(self) -> None:
        self.losses += 1

    async def answer(self, value: object, size: int = 0) -> Any:
        """Reply as a replica does."""
        fields = ("x", str(value), "y", bytes(size))
        return await self._commands.send("XADD", self.key, "NOMKSTREAM", "*", *fields)


@pytest.fixture
async def listen(keys: Keys) -> AsyncIterator[Listening]:
    """Opens reply streams that are closed after the test."""
    async with AsyncExitStack() as streams:

        async def listen(commands: RedisConnection, caller: str = "me") -> Listener:
            listener = Listener(commands, keys, caller)
            await listener.stream.open()
            streams.push_async_callback(listener.stream.close)
            return listener

        yield listen


async def test_replies_are_received_in_order(listen: Listening, commands: RedisConnection) -> None:
    me = await listen(commands)
    await asyncio.gather(*[me.answer(n) for n in range(1_000)])
    await wait_until_async(lambda: len(me.received) == 1_000)
    assert me.received == [str(n).encode() for n in range(1_000)]


async def test_a_caller_receives_only_its_own_replies(listen: Listening, commands: RedisConnection) -> None:
    me, other = await listen(commands, "me"), await listen(commands, "other")
    await me.answer("mine")
    await other.answer("theirs")
    await wait_until_async(lambda: me.received and other.received)
    assert (me.received, other.received) == ([b"mine"], [b"theirs"])


async def test_a_reply_that_cannot_be_processed_does_not_stop_the_next(
    listen: Listening, commands: RedisConnection
) -> None:
    me = await listen(commands)
    await me.answer("garbage")
    await me.answer("well")
    await wait_until_async(lambda: me.received == [b"well"])


async def test_replies_that_were_read_are_deleted(listen: Listening, commands: RedisConnection) -> None:
    me = await listen(commands)
    base = await commands.send("MEMORY", "USAGE", me.key)
    await asyncio.gather(*[me.answer(n, size=10_000) for n in range(500)])
    await wait_until_async(lambda: len(me.received) == 500)

    async def trimmed() -> bool:
        return bool(await commands.send("XLEN", me.key) == 0)

    await wait_until_async(trimmed)
    assert await commands.send("MEMORY", "USAGE", me.key) < base + 2_000


async def test_a_caller_that_closes_leaves_nothing(listen: Listening, commands: RedisConnection) -> None:
    me = await listen(commands)
    await me.answer("1")
    await me.stream.close()
    assert await commands.send("EXISTS", me.key) == 0
    assert await me.answer("too late") is None
    assert await commands.send("EXISTS", me.key) == 0


async def test_the_stream_of_a_dead_caller_expires(listen: Listening, commands: RedisConnection) -> None:
    """Until the stream expires it accepts replies, which expire with it."""
    me = await listen(commands)
    assert TTL_S * 1000 - 2_000 < await commands.send("PTTL", me.key) <= TTL_S * 1000
    await me.answer("1")
    assert await commands.send("PTTL", me.key) > 0, "a reply must not make the stream last for ever"


async def test_renewing_postpones_the_expiry(listen: Listening, commands: RedisConnection) -> None:
    me = await listen(commands)
    await commands.send("PEXPIRE", me.key, 5_000)
    await me.stream.renew()
    assert await commands.send("PTTL", me.key) > 50_000
    assert me.losses == 0


async def test_an_expired_stream_is_created_again_and_its_loss_reported(
    listen: Listening, commands: RedisConnection
) -> None:
    me = await listen(commands)
    await commands.send("DEL", me.key)
    await me.stream.renew()
    assert me.losses == 1
    await me.answer("after")
    await wait_until_async(lambda: me.received == [b"after"])


async def test_a_failed_report_of_a_loss_is_repeated(listen: Listening, commands: RedisConnection, keys: Keys) -> None:
    told: list[int] = []

    async def on_loss() -> None:
        told.append(1)
        if len(told) == 1:
            raise RuntimeError("on purpose")

    stream = ReplyStream(commands, keys, "me", lambda fields: None, on_loss)
    await stream.open()
    await commands.send("DEL", keys.replies("me"))
    with pytest.raises(RuntimeError):
        await stream.renew()
    await stream.renew()
    await stream.renew()
    assert len(told) == 2
    await stream.close()


async def test_replies_are_received_after_the_clock_of_the_server_went_back(
    listen: Listening, commands: RedisConnection
) -> None:
    """Another machine without the data: its ids are lower than the last one that was read."""
    me = await listen(commands)
    await commands.send("XADD", me.key, "99999999999999-0", "x", "far ahead")
    await wait_until_async(lambda: me.received)
    await commands.send("DEL", me.key)
    await me.stream.renew()
    await me.answer("back in time")
    await wait_until_async(lambda: me.received[1:] == [b"back in time"])


async def test_draining_ends_when_all_replies_on_the_stream_are_received(
    listen: Listening, commands: RedisConnection
) -> None:
    me = await listen(commands)
    await me.stream.drain()
    for round_ in range(20):
        answers = [me.answer(n) for n in range(50)]
        await asyncio.gather(*answers)
        await me.stream.drain()
        assert len(me.received) == 50 * (round_ + 1)


async def test_replies_are_received_after_a_lost_connection(
    listen: Listening, server: EmbeddedServer, connect: Connect
) -> None:
    commands = await connect(server.url)
    me = await listen(commands)
    await me.answer("before")
    await wait_until_async(lambda: me.received == [b"before"])
    await commands.send("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    await me.answer("after")
    await wait_until_async(lambda: me.received == [b"before", b"after"])


async def test_a_stream_is_kept_when_the_broker_is_out_of_memory(
    listen: Listening, server: EmbeddedServer, connect: Connect
) -> None:
    commands = await connect(server.url)
    me = await listen(commands)
    await commands.send("CONFIG", "SET", "maxmemory", 1)
    await commands.send("PEXPIRE", me.key, 5_000)
    await me.stream.renew()
    assert await commands.send("PTTL", me.key) > 50_000
