"""Snapshots that follow the registry by its changes are the same as snapshots that are read whole."""

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import orjson
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.registry.records import BackendRecord, Change, EndpointRecord
from penstock.broker.registry.store import Registry
from penstock.broker.registry.watcher import Watcher
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys
from tests.broker.conftest import Connect

NAMES = ("a", "b", "c", "d")


def backend(tag: str, n: int = 1) -> BackendRecord:
    return BackendRecord(tag=tag, version=str(n), code="0" * 64)


def endpoint(name: str, n: int = 1) -> EndpointRecord:
    return EndpointRecord(name=name, route=f"/{name}/{n}", traffic={name: 1.0})


def endpoints(count: int, n: int = 1) -> Change:
    return Change(endpoints={f"e{i}": endpoint(f"e{i}", n) for i in range(count)})


async def hash_reads(connection: RedisConnection) -> int:
    """Return how often a whole hash was read."""
    stats = (await connection.send("INFO", "commandstats")).decode()
    line: str = next((line for line in stats.splitlines() if line.startswith("cmdstat_hgetall:")), "calls=0,")
    return int(line.partition("calls=")[2].partition(",")[0])


# -- what happens to a registry, in the property test


@dataclass(frozen=True)
class Write:
    """A change of some records; None deletes one."""

    backends: dict[str, int | None]
    endpoints: dict[str, int | None]
    is_lost: bool
    """Whether the broker loses it, as by a failover to a server that did not have it yet."""


@dataclass(frozen=True)
class Event:
    """Something else: see `Story.meet`."""

    kind: str


values = st.dictionaries(st.sampled_from(NAMES), st.none() | st.integers(1, 3), max_size=3)
writes = st.builds(Write, values, values, st.booleans())
events = st.builds(Event, st.sampled_from(["many", "earlier release", "trimmed", "feed lost", "all lost", "erased"]))
stories = st.lists(st.tuples(writes | events, st.booleans()), max_size=8)


class Story:
    """The changes of one registry."""

    def __init__(self, connection: RedisConnection, keys: Keys) -> None:
        self._connection, self._keys = connection, keys
        self._registry = Registry(connection, keys)
        self._stored = (keys.version, keys.backends, keys.endpoints, keys.feed)

    async def meet(self, what: Write | Event, reader: Registry) -> None:
        """Let it happen; ``reader`` reads between a change and its loss."""
        if isinstance(what, Write):
            dumps = [await self._connection.send("DUMP", key) for key in self._stored]
            await self._registry.change(
                lambda seen: Change(
                    {tag: None if n is None else backend(tag, n) for tag, n in what.backends.items()},
                    {name: None if n is None else endpoint(name, n) for name, n in what.endpoints.items()},
                )
            )
            if what.is_lost:
                await reader.snapshot()
                for key, dump in zip(self._stored, dumps, strict=True):
                    await self._connection.send("DEL", key)
                    if dump is not None:
                        await self._connection.send("RESTORE", key, 0, dump)
            return
        keys, send = self._keys, self._connection.send
        if what.kind == "many":
            await self._registry.change(lambda seen: endpoints(150, seen.version))
        elif what.kind == "earlier release":
            await send("HSET", keys.backends, "a", orjson.dumps({"tag": "a", "version": "earlier", "code": ""}))
            await send("XADD", keys.feed, "*", "version", await send("INCR", keys.version))
        elif what.kind == "trimmed":
            await send("XTRIM", keys.feed, "MAXLEN", 1)
        elif what.kind == "feed lost":
            await send("DEL", keys.feed)
        elif what.kind == "all lost":
            await send("DEL", *self._stored)
        elif what.kind == "erased":
            await self._registry.erase()


@pytest.fixture(scope="module")
def numbers() -> Iterator[int]:
    return itertools.count()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(story=stories)
def test_following_the_changes_leads_to_the_snapshot_that_a_new_reader_takes(
    redis_url: str, numbers: Iterator[int], story: list[tuple[Write | Event, bool]]
) -> None:
    async def run() -> None:
        keys = Keys(f"story-{next(numbers)}")
        connection = await RedisConnection(redis_url).open()
        follower, told = Registry(connection, keys), Story(connection, keys)
        for what, reads in story:
            await told.meet(what, follower)
            if reads:
                await follower.snapshot()
        followed, whole = await follower.snapshot(), await Registry(connection, keys).snapshot()
        assert followed == whole
        assert followed.place == whole.place
        await told.meet(Event("erased"), follower)
        await connection.close()

    asyncio.run(run())


# -- what it costs


async def test_a_change_is_followed_without_reading_the_other_records(
    server: EmbeddedServer, connect: Connect, keys: Keys
) -> None:
    connection = await connect(server.url)
    writer, reader = Registry(connection, keys), Registry(connection, keys)
    await writer.change(lambda seen: endpoints(50))
    before = await reader.snapshot()
    await writer.snapshot()
    reads = await hash_reads(connection)
    await writer.change(lambda seen: Change({"m": backend("m")}, {"e7": endpoint("e7", 2), "e8": None}))
    after = await reader.snapshot()
    assert await reader.snapshot() is after, "nothing changed"
    assert await hash_reads(connection) == reads
    assert (after.backends, len(after.endpoints)) == ({"m": backend("m")}, 49)
    changed = {name for name, record in after.endpoints.items() if record is not before.endpoints[name]}
    assert changed == {"e7"}


async def test_a_large_change_is_followed_by_reading_everything_once(
    server: EmbeddedServer, connect: Connect, keys: Keys
) -> None:
    connection = await connect(server.url)
    writer, reader = Registry(connection, keys), Registry(connection, keys)
    await writer.change(lambda seen: endpoints(1))
    first = (await reader.snapshot()).endpoints["e0"]
    await writer.change(lambda seen: endpoints(5_000))
    reads = await hash_reads(connection)
    for _ in range(3):
        assert len((await reader.snapshot()).endpoints) == 5_000
    assert await hash_reads(connection) == reads + 2
    assert (await reader.snapshot()).endpoints["e0"] is first, "it is the same as before"


async def test_a_user_without_the_permission_for_hmget_reads_everything(
    server: EmbeddedServer, connect: Connect, keys: Keys
) -> None:
    """Rules that were written for an earlier release have no HMGET."""
    connection = await connect(server.url)
    writer = Registry(connection, keys)
    await connection.send("ACL", "SETUSER", "old", "on", "nopass", "~*", "+@all", "-hmget")
    narrow = await connect(server.url)
    await narrow.send("AUTH", "old", "")
    reader = Registry(narrow, keys)
    for n in (1, 2, 3):
        await writer.change(lambda seen, n=n: endpoints(3, n))  # type: ignore[misc]
        assert await reader.snapshot() == await writer.snapshot()


async def test_a_watcher_misses_nothing_that_another_reader_of_its_registry_has_read(
    redis_url: str, connect: Connect, keys: Keys
) -> None:
    registry = Registry(await connect(redis_url), keys)
    watcher = Watcher(redis_url, registry, keys)
    await watcher.start()
    heard: list[int] = []
    watcher.add_listener(lambda snapshot: heard.append(snapshot.version))

    async def read_all_the_time() -> None:
        while True:
            await registry.snapshot()

    reading = asyncio.ensure_future(read_all_the_time())
    try:
        for n in range(1, 30):
            version = await registry.change(lambda seen, n=n: endpoints(2, n))  # type: ignore[misc]
            assert await asyncio.wait_for(watcher.wait_for(version, 10), 1.5) == await registry.snapshot()
    finally:
        reading.cancel()
        await asyncio.wait([reading])
        await watcher.close()
        await registry.erase()
    assert heard == list(range(1, 30))
