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


class Expected(NamedTuple):
    """A reply: its bytes, its value, and whether its command announced a large string."""

    raw: bytes
    value: Any
    bulky: bool = False


def bulk_string(value: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(value), value)


NIL = b"$-1\r\n"
VALUES = st.binary(max_size=40) | st.sampled_from([b"", b"\r\n", b"$3\r\n", b"\r\n$9\r\nab\r\n"])

small = (
    st.just(Expected(b"+OK\r\n", b"OK"))
    | st.integers(-9, 99).map(lambda number: Expected(b":%d\r\n" % number, number))
    | VALUES.map(lambda value: Expected(bulk_string(value), value))
    | st.lists(VALUES | st.none(), max_size=3).map(
        lambda values: Expected(
            b"*%d\r\n%b" % (len(values), b"".join(NIL if one is None else bulk_string(one) for one in values)), values
        )
    )
)
bodies = VALUES.map(lambda value: Expected(bulk_string(value), value, bulky=True)) | st.just(
    Expected(NIL, None, bulky=True)
)
others = small.map(lambda reply: reply._replace(bulky=True))


@asynccontextmanager
async def reader_of(expected: list[Expected], received: Callable[[Any], None]) -> AsyncGenerator[RespReader]:
    """A reader of a connection that receives only the data of `deliver`."""
    near, far = socket.socketpair()
    near.setblocking(False)
    transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=near)
    waiting = deque(expected)

    def receive(reply: Any) -> None:
        reader.bulky -= waiting.popleft().bulky
        received(reply)

    with far:
        reader = RespReader(transport, receive, lambda: waiting[0].bulky, ResponseError)
        reader.bulky = sum(one.bulky for one in expected)
        try:
            yield reader
        finally:
            reader.close()
            transport.abort()


def deliver(reader: RespReader, data: bytes, sizes: list[int]) -> None:
    """Read as a transport does, with the sizes in turn. It holds each buffer until ``buffer_updated`` returns."""
    at = turn = 0
    while at < len(data):
        buffer = reader.get_buffer(-1)
        count = min(len(buffer), sizes[turn % len(sizes)], len(data) - at)
        assert count > 0
        buffer[:count] = data[at : at + count]
        reader.buffer_updated(count)
        at, turn = at + count, turn + 1


@given(st.lists(small | bodies | others, max_size=8), st.lists(st.integers(1, 60), min_size=1, max_size=4))
@settings(deadline=None)
def test_replies_are_read_correctly_however_the_data_is_split(replies: list[Expected], sizes: list[int]) -> None:
    async def read() -> list[Any]:
        received: list[Any] = []
        async with reader_of(replies, received.append) as reader:
            deliver(reader, b"".join(one.raw for one in replies), sizes)
            assert not reader.ended.done()
        return received

    assert asyncio.run(read()) == [one.value for one in replies]


async def test_a_body_is_read_into_its_final_buffer() -> None:
    """The buffer of the next read is as long as the missing part of the body."""
    value = bytes(range(256)) * 40_000
    received: list[bytes] = []
    async with reader_of([Expected(b"", value, bulky=True)], received.append) as reader:
        raw = bulk_string(value)
        deliver(reader, raw[:1_000], [1_000])
        rest = reader.get_buffer(-1)
        assert len(rest) == len(raw) - 1_000 - len(b"\r\n")
        rest[:] = raw[1_000:-2]
        reader.buffer_updated(len(rest))
        assert received == []
        del rest
        deliver(reader, raw[-2:], [1])
    assert received == [value]
    assert type(received[0]) is bytes


async def test_data_of_another_protocol_ends_the_connection() -> None:
    async with reader_of([], lambda _: None) as reader:
        deliver(reader, b"HTTP/1.1 400 Bad Request\r\n", [100])
        with pytest.raises(ProtocolError):
            await reader.ended
