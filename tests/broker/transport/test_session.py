"""The session of one socket: commands at the moment when it is lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from penstock.broker.transport import handshake
from penstock.broker.transport.commands import Command, pack
from penstock.broker.transport.session import Session
from tests.support.waiting import wait_until_async

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def command(*args: str, repeat: bool = False) -> Command:
    return Command(pack(args), lambda _: None, repeat, None)


async def end_after_loss(*, in_pieces: bool) -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(asyncio.Protocol, *server.sockets[0].getsockname())
    session = Session(transport, lambda command, error: None, lambda: None)
    await asyncio.wait([session.ended], timeout=20)
    late: Any = command("SET", "key", "value")
    if in_pieces:
        late.packed = [late.packed]
    session.unanswered.append(late)
    session.outgoing.append(late.packed)
    session.expect_bulky(late)
    session.write()
    assert session.end() == ([late], []), "it was not written, so it may be sent again"
    transport.close()
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_command_after_the_loss_of_the_socket_is_left_for_the_next_one(loop: str, in_pieces: bool) -> None:
    running = LOOPS[loop]()
    try:
        running.run_until_complete(end_after_loss(in_pieces=in_pieces))
    finally:
        running.close()


@pytest.mark.parametrize(("stall_s", "is_dead"), [(0.1, True), (60.0, False)])
async def test_a_silent_server_counts_as_dead_after_the_time_that_its_connection_allows(
    monkeypatch: pytest.MonkeyPatch, stall_s: float, is_dead: bool
) -> None:
    monkeypatch.setattr("penstock.broker.transport.session._BEAT_S", 0.05)

    async def stay_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()
        left.set()

    left = asyncio.Event()
    server = await asyncio.start_server(stay_silent, "127.0.0.1", 0)
    transport, _ = await asyncio.get_running_loop().create_connection(
        asyncio.Protocol, *server.sockets[0].getsockname()
    )
    beats = 0

    def count() -> None:
        nonlocal beats
        beats += 1

    session = Session(transport, lambda command, error: None, count, stall_s)
    session.unanswered.append(command("XREAD"))
    await wait_until_async(lambda: session.ended.done() or beats >= 10)
    assert session.ended.done() == is_dead
    session.abort("the test ends")
    await asyncio.wait([session.ended])
    session.end()
    await left.wait()
    server.close()
    await server.wait_closed()


async def test_a_task_that_loses_its_cancellation_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "_CANCEL_AGAIN_S", 0.01)
    losses = 0

    async def lose_cancellations() -> None:
        nonlocal losses
        while losses < 3:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                losses += 1

    task = asyncio.create_task(lose_cancellations())
    await asyncio.sleep(0)  # it begins
    task.cancel()
    await asyncio.wait_for(handshake.end_of_cancelled(task), 20)
    assert losses == 3
