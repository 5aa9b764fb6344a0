import asyncio
import socket
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
from hiredis import ProtocolError
from hypothesis import given, settings, strategies as st
from redis.exceptions import ResponseError

from penstock.broker.transport.resp_reader import RespReader


class Said(NamedTuple):
    """A reply as it comes, what it says, and whether it was said to be a bulky one."""

    raw: bytes
    value: Any
    bulky: bool = False


def bulk_string(value: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(value), value)


NIL = b"$-1\r\n"
VALUES = st.binary(max_size=40) | st.sampled_from([b"", b"\r\n", b"$3\r\n", b"\r\n$9\r\nab\r\n"])

small = (
    st.just(Said(b"+OK\r\n", b"OK"))
    | st.integers(-9, 99).map(lambda number: Said(b":%d\r\n" % number, number))
    | VALUES.map(lambda value: Said(bulk_string(value), value))
    | st.lists(VALUES | st.none(), max_size=3).map(
        lambda values: Said(
            b"*%d\r\n%b" % (len(values), b"".join(NIL if one is None else bulk_string(one) for one in values)), values
        )
    )
)
bodies = VALUES.map(lambda value: Said(bulk_string(value), value, bulky=True)) | st.just(Said(NIL, None, bulky=True))
others = small.map(lambda said: said._replace(bulky=True))


@asynccontextmanager
async def intake_of(expected: list[Said], heard: Callable[[Any], None]) -> AsyncGenerator[RespReader]:
    """An intake of a connection over which nothing comes but what `deliver` gives it."""
    near, far = socket.socketpair()
    near.setblocking(False)
    transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=near)
    waiting = deque(expected)

    def take(reply: Any) -> None:
        intake.bulky -= waiting.popleft().bulky
        heard(reply)

    with far:
        intake = RespReader(transport, take, lambda: waiting[0].bulky, ResponseError)
        intake.bulky = sum(one.bulky for one in expected)
        try:
            yield intake
        finally:
            intake.close()
            transport.abort()


def deliver(intake: RespReader, data: bytes, sizes: list[int]) -> None:
    """Read as a transport does, so much at a time, over and over. It holds what it was lent for as long as it may."""
    at = turn = 0
    while at < len(data):
        buffer = intake.get_buffer(-1)
        count = min(len(buffer), sizes[turn % len(sizes)], len(data) - at)
        assert count > 0
        buffer[:count] = data[at : at + count]
        intake.buffer_updated(count)
        at, turn = at + count, turn + 1


@given(st.lists(small | bodies | others, max_size=8), st.lists(st.integers(1, 60), min_size=1, max_size=4))
@settings(deadline=None)
def test_replies_are_read_correctly_however_the_data_is_split(said: list[Said], sizes: list[int]) -> None:
    async def read() -> list[Any]:
        heard: list[Any] = []
        async with intake_of(said, heard.append) as intake:
            deliver(intake, b"".join(one.raw for one in said), sizes)
            assert not intake.ended.done()
        return heard

    assert asyncio.run(read()) == [one.value for one in said]


async def test_a_body_is_read_into_its_final_buffer() -> None:
    """What is lent for reading is as long as all that is missing of it, however long that is."""
    value = bytes(range(256)) * 40_000
    heard: list[bytes] = []
    async with intake_of([Said(b"", value, bulky=True)], heard.append) as intake:
        raw = bulk_string(value)
        deliver(intake, raw[:1_000], [1_000])
        rest = intake.get_buffer(-1)
        assert len(rest) == len(raw) - 1_000 - len(b"\r\n")
        rest[:] = raw[1_000:-2]
        intake.buffer_updated(len(rest))
        assert heard == []
        del rest
        deliver(intake, raw[-2:], [1])
    assert heard == [value]
    assert type(heard[0]) is bytes


async def test_data_of_another_protocol_ends_the_connection() -> None:
    async with intake_of([], lambda _: None) as intake:
        deliver(intake, b"HTTP/1.1 400 Bad Request\r\n", [100])
        with pytest.raises(ProtocolError):
            await intake.ended
