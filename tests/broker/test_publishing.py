import asyncio
from collections.abc import Sequence

import pytest
from redis.exceptions import OutOfMemoryError

from penstock.broker.connection import Connection, FateUnknown
from penstock.broker.embedded import EmbeddedServer
from penstock.broker.keys import Keys
from penstock.broker.publishing import Published, Publisher
from penstock.broker.signals import Signals
from penstock.broker.wire import Entry, Header
from tests.broker.conftest import Connect
from tests.waiting import wait_until_async

TAG = "model"


@pytest.fixture
async def publishers(broker_url: str, commands: Connection, connect: Connect, keys: Keys) -> list[Publisher]:
    """Five callers of one backend, each with a connection of its own."""
    return [Publisher(commands, keys), *[Publisher(await connect(broker_url), keys) for _ in range(4)]]


def entry(id_: str, body: bytes = b"") -> Sequence[bytes]:
    return Entry(id_, "caller", Header(), body).fields()


def publish(
    publisher: Publisher, id_: str, *, limit: int = 100, batch: bool = False, body: bytes = b""
) -> "asyncio.Future[Published]":
    future: asyncio.Future[Published] = asyncio.get_running_loop().create_future()
    publisher.publish(TAG, entry(id_, body), limit, future.set_result, batch=batch)
    return future


async def place_of(publisher: Publisher, id_: str) -> bytes:
    """Publish a request that is accepted."""
    place = await publish(publisher, id_)
    assert isinstance(place, bytes)
    return place


async def depth(commands: Connection, keys: Keys) -> int:
    return sum([await commands.send("XLEN", stream) for stream in (keys.requests(TAG), keys.batch(TAG))])


async def test_what_is_published_lies_on_the_stream_in_order(
    publishers: list[Publisher], commands: Connection, keys: Keys
) -> None:
    places = await asyncio.gather(*[publish(publishers[0], str(n)) for n in range(50)])
    on_stream = await commands.send("XRANGE", keys.requests(TAG), "-", "+")
    assert [place for place, _ in on_stream] == places
    assert [Entry.of(fields).id for _, fields in on_stream] == [str(n) for n in range(50)]


async def test_the_limit_holds_exactly_at_any_number_of_callers(
    publishers: list[Publisher], commands: Connection, keys: Keys
) -> None:
    """Everybody publishes at once, some to the batch stream; in each round as many fit as were settled before."""
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
        assert set(refused) == {37}
        assert await depth(commands, keys) == 37
        room = await commands.send("XTRIM", keys.requests(TAG), "MAXLEN", 2 * round_)


async def test_who_is_refused_hears_how_many_stood_in_the_way(publishers: list[Publisher]) -> None:
    first, second = publishers[:2]
    assert await publish(first, "1", limit=2)
    assert await publish(second, "2", limit=2)
    assert await publish(first, "3", limit=2) == 2
    assert await publish(second, "4", limit=1) == 2


async def test_a_tick_of_many_large_requests_is_published_whole(
    publishers: list[Publisher], commands: Connection, keys: Keys
) -> None:
    """More than one script call takes: each call has its own part of the limit."""
    results = await asyncio.gather(*[publish(publishers[0], str(n), limit=30, body=bytes(200_000)) for n in range(40)])
    assert [type(result) for result in results] == [bytes] * 30 + [int] * 10
    assert await depth(commands, keys) == 30


async def test_one_who_does_not_want_to_hear_does_not_silence_the_others(publishers: list[Publisher]) -> None:
    def fail(result: Published) -> None:
        raise RuntimeError("on purpose")

    publishers[0].publish(TAG, entry("1"), 100, fail)
    assert isinstance(await publish(publishers[0], "2"), bytes)


async def test_requests_are_found_by_their_ids_or_places(
    publishers: list[Publisher], commands: Connection, keys: Keys
) -> None:
    publisher = publishers[0]
    places = {str(n): await place_of(publisher, str(n)) for n in range(5)}
    await commands.send("XDEL", keys.requests(TAG), places["1"], places["3"])

    by_id = await publisher.find(TAG, b"id", [(str(n), None) for n in range(6)], 0)
    assert by_id == [places["0"], None, places["2"], None, places["4"], None]

    assert await publisher.find(TAG, b"id", list(places.items()), 0) == by_id[:5]
    assert await publisher.find(TAG, b"id", [("2", places["0"])], 0) == [None], "another request lies there"


async def test_requests_are_found_on_a_long_stream(publishers: list[Publisher]) -> None:
    places = await asyncio.gather(*[publish(publishers[0], str(n), limit=3_000) for n in range(1_700)])
    wanted = [1_699, 0, 501, 500, 499, 1_000]
    found = await publishers[0].find(TAG, b"id", [(str(n), None) for n in wanted], 0)
    assert found == [places[n] for n in wanted]


async def test_what_is_withdrawn_is_gone_and_its_replicas_are_told(
    publishers: list[Publisher], broker_url: str, commands: Connection, keys: Keys
) -> None:
    heard: list[bytes] = []
    signals = Signals(broker_url, keys, TAG, heard.append)
    await signals.open()
    place = await place_of(publishers[0], "1")

    async def told() -> bool:
        publishers[0].withdraw(TAG, place)
        await asyncio.sleep(0.02)
        return place in heard

    await wait_until_async(told)
    assert await depth(commands, keys) == 0
    await signals.close()


async def test_a_broker_out_of_memory_refuses_the_request_and_keeps_nothing_of_it(
    server: EmbeddedServer, connect: Connect, keys: Keys
) -> None:
    commands = await connect(server.url)
    publisher = Publisher(commands, keys)
    assert isinstance(await publish(publisher, "before"), bytes)
    await commands.send("CONFIG", "SET", "maxmemory", 1)
    results = await asyncio.gather(*[publish(publisher, str(n)) for n in range(3)])
    assert [type(result) for result in results] == [OutOfMemoryError] * 3
    assert await depth(commands, keys) == 1
    await commands.send("CONFIG", "SET", "maxmemory", 0)
    assert isinstance(await publish(publisher, "after"), bytes)


async def test_after_a_lost_connection_nobody_is_told_what_is_not_known(
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
    found = await publisher.find(TAG, b"id", [(str(n), None) for n in range(3)], 0)
    for result, place in zip(results, found, strict=True):
        assert isinstance(result, FateUnknown) or result == place
