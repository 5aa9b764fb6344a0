import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import orjson
import pytest

from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.errors import ConfigError, PenstockError, WireError
from penstock.broker.registry.records import (
    AutoscalingSpec,
    BackendRecord,
    BackendSpec,
    Change,
    EndpointRecord,
    Snapshot,
)
from penstock.broker.registry.reports import BackendStatus, ProxyReport, RefusedChange, ReplicaReport
from penstock.broker.registry.store import Registry
from penstock.broker.registry.watcher import Watcher
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys
from tests.broker.conftest import Connect
from tests.support.brokers import wait_until_written
from tests.support.waiting import wait_until_async


class Watching(Protocol):
    async def __call__(self, url: str, registry: Registry) -> Watcher: ...


@pytest.fixture
def registry(commands: RedisConnection, keys: Keys) -> Registry:
    return Registry(commands, keys)


@pytest.fixture
async def watch(keys: Keys) -> AsyncIterator[Watching]:
    """Starts watchers that are closed after the test."""
    async with AsyncExitStack() as watchers:

        async def watch(url: str, registry: Registry) -> Watcher:
            watcher = Watcher(url, registry, keys)
            await watcher.start()
            watchers.push_async_callback(watcher.close)
            return watcher

        yield watch


@pytest.fixture
def durable() -> Iterator[EmbeddedServer]:
    """A server that keeps its data over a restart."""
    with tempfile.TemporaryDirectory() as parent, EmbeddedServer.start(data_dir=Path(parent) / "data") as server:
        yield server


def backend(tag: str, **options: Any) -> BackendRecord:
    return BackendRecord(tag=tag, version="1", code="0" * 64, **options)


def endpoint(name: str, **traffic: float) -> EndpointRecord:
    return EndpointRecord(name=name, route=f"/{name}", methods=("GET", "POST"), traffic=traffic)


def adding(*records: BackendRecord | EndpointRecord) -> Change:
    return Change(
        {record.tag: record for record in records if isinstance(record, BackendRecord)},
        {record.name: record for record in records if isinstance(record, EndpointRecord)},
    )


async def test_a_record_is_read_as_it_was_written(registry: Registry) -> None:
    model = backend(
        "model", config=BackendSpec(num_replicas=2), actor_options={"num_cpus": 0.5}, runtime_env={"pip": ["x"]}
    )
    classify = endpoint("classify", model=1.0)
    assert await registry.change(lambda seen: adding(model, classify)) == 1
    assert await registry.snapshot() == Snapshot(1, {"model": model}, {"classify": classify})


async def test_a_new_registry_is_empty(registry: Registry) -> None:
    assert await registry.snapshot() == Snapshot()


async def test_none_deletes(registry: Registry) -> None:
    await registry.change(lambda seen: adding(backend("a"), backend("b")))
    assert await registry.change(lambda seen: Change({"a": None})) == 2
    assert set((await registry.snapshot()).backends) == {"b"}


async def test_an_empty_change_writes_nothing(registry: Registry, commands: RedisConnection, keys: Keys) -> None:
    assert await registry.change(lambda seen: Change()) == 0
    assert await commands.send("EXISTS", keys.version, keys.feed) == 0


async def test_an_exception_while_deciding_propagates_and_nothing_is_written(registry: Registry) -> None:
    def refuse(seen: Snapshot) -> Change:
        raise LookupError("there is no such thing")

    with pytest.raises(LookupError, match="no such thing"):
        await registry.change(refuse)
    assert await registry.snapshot() == Snapshot()


async def test_no_change_is_lost_when_many_change_at_once(
    registry: Registry, broker_url: str, connect: Connect, keys: Keys
) -> None:
    """Each adds one to the version that it has read; a writer that came second decides again."""
    registries = [registry, *[Registry(await connect(broker_url), keys) for _ in range(3)]]

    def count(seen: Snapshot) -> Change:
        before = seen.backends["model"].config_version if "model" in seen.backends else 0
        return adding(backend("model", config_version=before + 1))

    versions = await asyncio.gather(*[each.change(count) for each in registries for _ in range(10)])
    assert sorted(versions) == list(range(1, 41))
    assert (await registry.snapshot()).backends["model"].config_version == 40


async def test_a_reader_never_sees_half_a_change(
    registry: Registry, broker_url: str, connect: Connect, keys: Keys
) -> None:
    other = Registry(await connect(broker_url), keys)

    async def write() -> None:
        for n in range(50):
            traffic = {f"v{n}": 1.0}
            await registry.change(lambda seen, n=n, traffic=traffic: adding(backend(f"v{n}"), endpoint("e", **traffic)))  # type: ignore[misc]

    writing = asyncio.ensure_future(write())
    while not writing.done():
        seen = await other.snapshot()
        assert {tag for each in seen.endpoints.values() for tag in each.traffic} <= set(seen.backends)
        assert seen.version == len(seen.backends)
    await writing


async def test_a_record_of_a_later_release_is_read_without_its_new_fields(
    registry: Registry, commands: RedisConnection, keys: Keys
) -> None:
    later: dict[str, Any] = {"tag": "model", "version": "2", "code": "c", "priority": 7}
    later["config"] = {"max_deliveries": 5, "autoscaling_config": {"max_replicas": 4, "x": 1}, "x": 1}
    await commands.send("HSET", keys.backends, "model", orjson.dumps(later))
    later = {"name": "e", "traffic": {"model": 1.0}, "methods": ["PUT"], "mirrors": {}}
    await commands.send("HSET", keys.endpoints, "e", orjson.dumps(later))
    seen = await registry.snapshot()
    config = BackendSpec(max_deliveries=5, autoscaling_config=AutoscalingSpec(max_replicas=4))
    assert seen.backends == {"model": BackendRecord(tag="model", version="2", code="c", config=config)}
    assert seen.endpoints == {"e": EndpointRecord(name="e", traffic={"model": 1.0}, methods=("PUT",))}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"\xff", "is not JSON"),
        (b"[]", "must be a JSON object, not list"),
        (b"{}", "has no 'tag'"),
        (b'{"tag": "model", "version": 1, "code": ""}', "has a int as its 'version'"),
        (
            b'{"tag": "model", "version": "1", "code": "", "config": {"max_deliveries": "3"}}',
            "has a str as its 'max_deliveries'",
        ),
        (
            b'{"tag": "model", "version": "1", "code": "", "config": {"autoscaling_config": {}}}',
            "has no 'max_replicas'",
        ),
    ],
)
async def test_a_record_that_cannot_be_read_is_named(
    registry: Registry, commands: RedisConnection, keys: Keys, record: bytes, reason: str
) -> None:
    await commands.send("HSET", keys.backends, "model", record)
    with pytest.raises(WireError, match=f"the registry's b?'model' {reason}"):
        await registry.snapshot()


async def test_a_watcher_can_be_woken_for_what_the_feed_does_not_hold(
    registry: Registry, commands: RedisConnection, keys: Keys, watch: Watching
) -> None:
    watcher = await watch(commands.url, registry)
    await registry.change(lambda _: Change(backends={"model": backend("model")}))
    woken = list[Snapshot]()
    await watcher.wait_for(1, 10)
    watcher.add_listener(woken.append)
    await registry.wake_watchers()
    await wait_until_async(lambda: woken)
    (seen,) = woken
    assert (seen.version, seen.backends) == (2, {"model": backend("model")})


async def test_code_is_stored_by_its_digest(registry: Registry, commands: RedisConnection, keys: Keys) -> None:
    digest = await registry.put_code(b"code")
    assert await registry.get_code(digest) == b"code"
    assert await registry.put_code(b"code") == digest
    await commands.send("SET", keys.code(digest), b"other code")
    with pytest.raises(WireError, match="does not match its digest"):
        await registry.get_code(digest)
    await registry.delete_code(digest)
    with pytest.raises(PenstockError, match="has no code"):
        await registry.get_code(digest)


async def test_a_report_replaces_the_former_one_until_it_is_deleted(registry: Registry) -> None:
    starting = ReplicaReport(backend="model", version="1")
    ready = replace(starting, state="ready", config_version=2, error={"kind": "BackendError"})
    for report in (starting, ready):
        await registry.put_report("model#1", report)
    await registry.put_report("model#2", starting)
    assert await registry.get_reports(ReplicaReport) == {"model#1": ready, "model#2": starting}
    await registry.delete_report(ReplicaReport, "model#1")
    assert await registry.get_reports(ReplicaReport) == {"model#2": starting}
    assert await registry.get_reports(ProxyReport) == {}


async def test_a_report_of_a_later_release_is_read_without_its_new_fields(
    registry: Registry, commands: RedisConnection, keys: Keys
) -> None:
    change = RefusedChange(version="2", failing=None, lacking="1 GPU", undone_by=3)
    status = BackendStatus(version="1", config_version=3, refused=change)
    await registry.put_report("model", status)
    raw = orjson.loads(await commands.send("HGET", keys.reports("backends"), "model"))
    raw["refused"]["since"] = raw["priority"] = 7
    await commands.send("HSET", keys.reports("backends"), "model", orjson.dumps(raw))
    assert await registry.get_reports(BackendStatus) == {"model": status}


async def test_an_instance_has_one_owner_at_a_time(registry: Registry, commands: RedisConnection, keys: Keys) -> None:
    assert await registry.own("first", 60)
    assert await registry.own("first", 60), "it renews"
    assert not await registry.own("second", 60)
    await registry.disown("second")
    assert not await registry.own("second", 60), "nobody gives away what is not theirs"
    await commands.send("PEXPIRE", keys.owner, 1)

    async def taken() -> bool:
        return await registry.own("second", 60)

    await wait_until_async(taken)
    await registry.disown("second")
    assert await registry.own("first", 60)


async def test_erasing_leaves_no_key_and_touches_no_other_instance(
    registry: Registry, commands: RedisConnection, keys: Keys
) -> None:
    other = Registry(commands, Keys("test-2"))
    for each in (registry, other):
        await each.change(lambda seen: adding(*[backend(f"b{n}") for n in range(3)]))
        await each.put_code(b"code")
        await each.put_settings({})
        await each.own("me", 60)
        await each.put_report("p", ProxyReport())
    for n in range(2_500):
        commands.post(lambda reply: None, "SET", keys.body("b0", str(n)), "x")
    await registry.erase()
    _, found = await commands.send("SCAN", 0, "MATCH", keys.pattern, "COUNT", 10_000)
    assert found == []
    assert len((await other.snapshot()).backends) == 3
    await other.erase()


async def test_a_broker_out_of_memory_accepts_changes_reports_settings_and_leases(
    server: EmbeddedServer, connect: Connect, keys: Keys
) -> None:
    commands = await connect(server.url)
    registry = Registry(commands, keys)
    await commands.send("CONFIG", "SET", "maxmemory", 1)
    assert await registry.change(lambda seen: adding(backend("model"))) == 1
    await registry.put_report("model#1", ReplicaReport(backend="model"))
    await registry.put_settings({"stopping": "keep"})
    assert await registry.own("me", 60)
    await registry.disown("me")
    with pytest.raises(PenstockError, match="no memory left for 4 bytes of code"):
        await registry.put_code(b"code")


async def test_code_that_is_too_large_for_redis_is_refused_before_it_is_sent(
    redis_url: str, connect: Connect, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis would close the connection, which other commands share."""
    registry = Registry(await connect(redis_url), keys)
    monkeypatch.setattr("penstock.broker.registry.store.LARGEST", 1000)
    with pytest.raises(ConfigError, match=r"1001 bytes of code .* \(its proto-max-bulk-len is 1000\)"):
        await registry.put_code(bytes(1001))


# -- watchers


async def test_a_watcher_follows_changes(registry: Registry, watch: Watching, broker_url: str) -> None:
    await registry.change(lambda seen: adding(backend("first")))
    watcher = await watch(broker_url, registry)
    assert set(watcher.snapshot.backends) == {"first"}
    heard: list[int] = []
    watcher.add_listener(lambda snapshot: heard.append(snapshot.version))

    version = await registry.change(lambda seen: adding(backend("second")))
    snapshot = await watcher.wait_for(version, 10)
    assert set(snapshot.backends) == {"first", "second"}
    assert watcher.snapshot is snapshot
    assert heard == [version]


async def test_a_listener_that_raises_does_not_affect_the_others(
    registry: Registry, watch: Watching, broker_url: str
) -> None:
    watcher = await watch(broker_url, registry)
    heard: list[int] = []

    def fail(snapshot: Snapshot) -> None:
        raise RuntimeError("on purpose")

    watcher.add_listener(fail)
    watcher.add_listener(lambda snapshot: heard.append(snapshot.version))
    for version in (1, 2):
        await registry.change(lambda seen: adding(backend("model", config_version=seen.version)))
        await watcher.wait_for(version, 10)
    assert heard == [1, 2]


async def test_waiting_for_a_change_ends_with_the_change_or_the_timeout(
    registry: Registry, watch: Watching, broker_url: str
) -> None:
    watcher = await watch(broker_url, registry)
    with pytest.raises(PenstockError, match=r"not seen at version 1 within 0\.05 s, but at 0"):
        await watcher.wait_for(1, 0.05)
    await watcher.next_change(0.05)
    waiting = asyncio.ensure_future(watcher.next_change(10))
    await asyncio.sleep(0)
    await registry.change(lambda seen: adding(backend("model")))
    await asyncio.wait_for(waiting, 10)
    assert watcher.snapshot.version == 1


async def test_a_watcher_follows_changes_after_a_restart_of_the_server(
    durable: EmbeddedServer, connect: Connect, watch: Watching, keys: Keys
) -> None:
    registry = Registry(await connect(durable.url), keys)
    await registry.change(lambda seen: adding(backend("before")))
    watcher = await watch(durable.url, registry)
    wait_until_written(durable.url)
    assert durable.pid is not None
    os.kill(durable.pid, signal.SIGKILL)
    version = await registry.change(lambda seen: adding(backend("after")))
    snapshot = await watcher.wait_for(version, 5)
    assert set(snapshot.backends) == {"before", "after"}


async def test_a_watcher_notices_that_the_server_lost_its_data(
    server: EmbeddedServer, connect: Connect, watch: Watching, keys: Keys
) -> None:
    """The feed is gone, so the watcher notices by its regular snapshots."""
    registry = Registry(await connect(server.url), keys)
    await registry.change(lambda seen: adding(backend("model")))
    watcher = await watch(server.url, registry)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    await wait_until_async(lambda: watcher.snapshot == Snapshot())


async def test_a_watcher_notices_the_end_of_its_instance_and_the_next_one(
    registry: Registry, watch: Watching, broker_url: str
) -> None:
    """Even if the next instance has reached the same version."""
    watcher = await watch(broker_url, registry)
    assert await registry.change(lambda seen: adding(backend("first"))) == 1
    await wait_until_async(lambda: set(watcher.snapshot.backends) == {"first"})
    await registry.erase()
    await wait_until_async(lambda: not watcher.snapshot.backends)
    assert await registry.change(lambda seen: adding(backend("second"))) == 1
    await wait_until_async(lambda: set(watcher.snapshot.backends) == {"second"})


async def test_a_watcher_can_be_refreshed_at_once(registry: Registry, watch: Watching, broker_url: str) -> None:
    watcher = await watch(broker_url, registry)
    await registry.change(lambda seen: adding(backend("model")))
    await watcher.refresh()
    assert set(watcher.snapshot.backends) == {"model"}


async def test_a_watcher_continues_after_a_record_that_cannot_be_read(
    registry: Registry, watch: Watching, broker_url: str, commands: RedisConnection, keys: Keys
) -> None:
    watcher = await watch(broker_url, registry)
    await commands.send("HSET", keys.backends, "broken", "[]")
    await commands.send("XADD", keys.feed, "*", "version", 7)
    await asyncio.sleep(0.05)
    await commands.send("HDEL", keys.backends, "broken")
    version = await registry.change(lambda seen: adding(backend("model")))
    assert set((await watcher.wait_for(version, 5)).backends) == {"model"}
