import asyncio

import pytest
from hypothesis import given, strategies as st

from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.errors import BrokerFull
from penstock.broker.queue.publisher import Published, Publisher, QueueFull, retry_after_s
from penstock.broker.queue.signals import Signals
from penstock.broker.transport.connection import FateUnknown, RedisConnection
from penstock.broker.wire.keys import Keys
from penstock.broker.wire.requests import Entry, Header, RawEntry
from tests.broker.conftest import Connect
from tests.support.waiting import wait_until_async

TAG = "model"


@pytest.fixture
async def publishers(broker_url: str, commands: RedisConnection, connect: Connect, keys: Keys) -> list[Publisher]:
    """Five callers of one backend, each with a connection of its own."""
    return [Publisher(commands, keys), *[Publisher(await connect(broker_url), keys) for _ in range(4)]]


def entry(id_: str, body: bytes = b"", caller: str = "caller", endpoint: str = "") -> RawEntry:
    return Entry(id_, caller, Header(endpoint), body).raw()


def publish(
    publisher: Publisher, id_: str, *, limit: int = 100, batch: bool = False, body: bytes = b""
) -> "asyncio.Future[Published]":
    future: asyncio.Future[Published] = asyncio.get_running_loop().create_future()
    publisher.publish(TAG, entry(id_, body), limit, future.set_result, batch=batch)
    return future


async def ref_of(publisher: Publisher, id_: str) -> bytes:
    """Publish a request that is accepted."""
    ref = await publish(publisher, id_)
    assert isinstance(ref, bytes)
    return ref


async def depth(commands: RedisConnection, keys: Keys) -> int:
    return sum([await commands.send("XLEN", stream) for stream in (keys.requests(TAG), keys.batch(TAG))])


async def test_requests_are_published_in_order(
    publishers: list[Publisher], commands: RedisConnection, keys: Keys
) -> None:
    refs = await asyncio.gather(*[publish(publishers[0], str(n)) for n in range(50)])
    on_stream = await commands.send("XRANGE", keys.requests(TAG), "-", "+")
    assert [ref for ref, _ in on_stream] == refs
    assert [Entry.of(fields).id for _, fields in on_stream] == [str(n) for n in range(50)]


async def test_entries_of_one_tick_keep_their_own_fields(
    publishers: list[Publisher], commands: RedisConnection, keys: Keys
) -> None:
    sent = [
        Entry(f"{caller}-{endpoint}-{n}", caller, Header(endpoint), body, large=large)
        for n, (caller, endpoint) in enumerate([("a", "x"), ("a", "x"), ("b", "x"), ("b", "y"), ("a", "x"), ("", "y")])
        for body, large in ((b"one", False), (b"", False), (b"", True))
    ]
    published = [asyncio.get_running_loop().create_future() for _ in sent]
    for one in sent:
        if one.large:
            await commands.send("SET", keys.body(TAG, one.id), b"")
    for one, future in zip(sent, published, strict=True):
        publishers[0].publish(TAG, one.raw(), 100, future.set_result)
    refs = await asyncio.gather(*published)
    on_stream = await commands.send("XRANGE", keys.requests(TAG), "-", "+")
    assert [(ref, Entry.of(fields)) for ref, fields in on_stream] == list(zip(refs, sent, strict=True))


async def test_the_limit_holds_exactly_at_any_number_of_callers(
    publishers: list[Publisher], commands: RedisConnection, keys: Keys
) -> None:
    """All callers publish at once, some to the batch stream; each round admits as many as were settled before."""
    room = 37
    for round_ in range(5):
        asked = [
            publish(publisher, f"{round_}-{at}-{n}", limit=37, batch=n % 3 == 0)
            for n in range(20)
            for at, publisher in enumerate(publishers)
        ]
        results = await asyncio.gather(*asked)
        accepted = [result for result in results if isinstance(result, bytes)]
        refused = [result for result in results if not isinstance(result, bytes)]
        assert len(accepted) == room
        assert {one.depth for one in refused if isinstance(one, QueueFull)} == {37}
        assert await depth(commands, keys) == 37
        room = await commands.send("XTRIM", keys.requests(TAG), "MAXLEN", 2 * round_)


async def test_a_refusal_has_the_depth_of_the_queue(publishers: list[Publisher]) -> None:
    first, second = publishers[:2]
    assert await publish(first, "1", limit=2)
    assert await publish(second, "2", limit=2)
    assert await publish(first, "3", limit=2) == QueueFull(2, 1.0)
    assert await publish(second, "4", limit=1) == QueueFull(2, 1.0)


async def test_a_refusal_has_the_time_until_the_queue_is_drained(
    publishers: list[Publisher], commands: RedisConnection, keys: Keys
) -> None:
    seconds, micros = await commands.send("TIME")
    before_ms = int(seconds) * 1000 + int(micros) // 1000 - 12_000
    await commands.send("XADD", keys.batch(TAG), f"{before_ms}-0", "x", "")
    assert isinstance(await publish(publishers[0], "1", limit=2), bytes)
    answer = await publish(publishers[0], "2", limit=2)
    assert isinstance(answer, QueueFull)
    assert 12.0 <= answer.retry_after_s < 14.0


@given(st.integers(min_value=-(2**40), max_value=2**50))
def test_the_time_until_a_retry_is_between_a_second_and_a_minute(oldest_ms: int) -> None:
    """The clock of the broker may have gone back, or an entry may have run for a year."""
    assert 1.0 <= retry_after_s(oldest_ms) <= 60.0
    assert retry_after_s(oldest_ms) <= retry_after_s(oldest_ms + 1)


@given(st.integers(min_value=1, max_value=10_000), st.floats(min_value=0.1, max_value=10_000))
def test_the_time_until_a_retry_is_the_time_to_drain_the_queue_at_a_steady_rate(depth: int, rate: float) -> None:
    """A full queue that drains at ``rate`` has admitted as many requests since its oldest one as it holds."""
    drains_s = depth / rate
    assert retry_after_s(1000 * drains_s) == pytest.approx(min(max(1.0, drains_s), 60.0))


async def test_a_tick_of_many_large_requests_is_published_whole(
    publishers: list[Publisher], commands: RedisConnection, keys: Keys
) -> None:
    """They need several calls of the script, and each call checks the limit."""
    results = await asyncio.gather(*[publish(publishers[0], str(n), limit=30, body=bytes(200_000)) for n in range(40)])
    assert [type(result) for result in results] == [bytes] * 30 + [QueueFull] * 10
    assert await depth(commands, keys) == 30


async def test_a_callback_that_raises_does_not_affect_the_others(publishers: list[Publisher]) -> None:
    def fail(result: Published) -> None:
        raise RuntimeError("on purpose")

    publishers[0].publish(TAG, entry("1"), 100, fail)
    assert isinstance(await publish(publishers[0], "2"), bytes)


async def test_requests_are_found_by_their_ids_or_entries(
    publishers: list[Publisher], commands: RedisConnection, keys: Keys
) -> None:
    publisher = publishers[0]
    refs = {str(n): await ref_of(publisher, str(n)) for n in range(5)}
    await commands.send("XDEL", keys.requests(TAG), refs["1"], refs["3"])

    by_id = await publisher.find(TAG, [(str(n), None) for n in range(6)], 0)
    assert by_id == [refs["0"], None, refs["2"], None, refs["4"], None]

    assert await publisher.find(TAG, list(refs.items()), 0) == by_id[:5]
    assert await publisher.find(TAG, [("2", refs["0"])], 0) == [None], "another request lies there"


async def test_requests_are_found_on_a_long_stream(publishers: list[Publisher]) -> None:
    refs = await asyncio.gather(*[publish(publishers[0], str(n), limit=3_000) for n in range(1_700)])
    wanted = [1_699, 0, 501, 500, 499, 1_000]
    found = await publishers[0].find(TAG, [(str(n), None) for n in wanted], 0)
    assert found == [refs[n] for n in wanted]


async def test_a_withdrawn_request_is_deleted_and_replicas_get_a_signal(
    publishers: list[Publisher], broker_url: str, commands: RedisConnection, keys: Keys
) -> None:
    heard: list[bytes] = []
    signals = Signals(broker_url, keys, TAG, heard.append)
    await signals.open()
    ref = await ref_of(publishers[0], "1")

    publishers[0].withdraw(TAG, ref)
    await wait_until_async(lambda: ref in heard)
    assert await depth(commands, keys) == 0
    await signals.close()


async def test_a_broker_out_of_memory_refuses_a_request_completely(
    server: EmbeddedServer, connect: Connect, keys: Keys
) -> None:
    commands = await connect(server.url)
    publisher = Publisher(commands, keys)
    assert isinstance(await publish(publisher, "before"), bytes)
    await commands.send("CONFIG", "SET", "maxmemory", 1)
    results = await asyncio.gather(*[publish(publisher, str(n)) for n in range(3)])
    assert [type(result) for result in results] == [BrokerFull] * 3
    assert await depth(commands, keys) == 1
    await commands.send("CONFIG", "SET", "maxmemory", 0)
    assert isinstance(await publish(publisher, "after"), bytes)


async def test_the_result_of_publishing_is_unknown_after_a_lost_connection(
    server: EmbeddedServer, connect: Connect, keys: Keys
) -> None:
    commands = await connect(server.url)
    killer = await connect(server.url)
    publisher = Publisher(commands, keys)
    own = await commands.send("CLIENT", "ID")
    asked = [publish(publisher, str(n)) for n in range(3)]
    killed = killer.send("CLIENT", "KILL", "ID", own)
    results = await asyncio.gather(*asked)
    await killed
    found = await publisher.find(TAG, [(str(n), None) for n in range(3)], 0)
    for result, ref in zip(results, found, strict=True):
        assert isinstance(result, FateUnknown) or result == ref
