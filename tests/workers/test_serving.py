import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.queue.stats import read_stats
from penstock.broker.registry.records import BackendRecord, BackendSpec, Change
from penstock.broker.registry.reports import ReplicaReport
from penstock.broker.registry.store import Registry
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys
from penstock.handles.errors import BackendError, BackendNotFound, from_wire
from penstock.workers.executing.request import Request
from penstock.workers.executing.user_code import dump
from penstock.workers.serving import Serving
from tests.support.brokers import wait_until_written
from tests.support.waiting import wait_until_async
from tests.workers.running import Gate, hook, hooks
from tests.workers.serving import CONFIG, TAG, calling

NAME = f"{TAG}#1"


class Instance:
    """An instance that is only a registry, and the replica that a test starts."""

    def __init__(self, url: str, registry: Registry) -> None:
        self.url, self.registry = url, registry
        self.replica = Serving(url, "default", TAG, NAME, "here")

    async def create(self, target: Any, *args: Any, **config: Any) -> None:
        code = await self.registry.put_code(dump(target, args))
        await self.put(BackendRecord(tag=TAG, version="v1", code=code, config=BackendSpec(**{**CONFIG, **config})))

    async def put(self, record: BackendRecord | None) -> None:
        await self.registry.change(lambda seen: Change(backends={TAG: record}))

    async def update(self, **config: Any) -> None:
        record = (await self.registry.snapshot()).backends[TAG]
        await self.put(
            replace(record, config=replace(record.config, **config), config_version=record.config_version + 1)
        )

    async def report(self) -> ReplicaReport:
        return (await self.registry.get_reports(ReplicaReport))[NAME]

    async def reports(self, **wanted: Any) -> None:
        async def has_reported() -> bool:
            reports = await self.registry.get_reports(ReplicaReport)
            return NAME in reports and all(getattr(reports[NAME], name) == value for name, value in wanted.items())

        await wait_until_async(has_reported)

    async def ask(self, body: bytes = b"") -> bytes:
        async with calling(self.url) as client:
            reply = await client.ask(body)
            if reply.error is not None:
                raise from_wire(reply.error)
            return reply.body


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncGenerator[Instance]:
    connection = await RedisConnection(url).open()
    registry = Registry(connection, Keys("default"))
    instance = Instance(url, registry)
    try:
        yield instance
    finally:
        await instance.replica.drain(1.0)
        await registry.erase()
        await connection.close()


@pytest.fixture
async def instance(redis_url: str) -> AsyncIterator[Instance]:
    async with opened(redis_url) as instance:
        yield instance


class Greeter:
    def __init__(self, greeting: str) -> None:
        self.greeting, self.name = greeting, "you"

    def reconfigure(self, user_config: Any) -> None:
        self.name = user_config["name"]

    def check_health(self) -> None:
        if self.name == "nobody":
            raise RuntimeError("nobody is there")

    def __call__(self, request: Request) -> str:
        if request.data == b"sleep":
            time.sleep(0.4)
        if request.data == b"hold":
            hook("hold")(request)
        return f"{self.greeting}, {self.name}"


async def test_a_replica_serves_the_registered_code_and_reports_itself(instance: Instance) -> None:
    await instance.create(Greeter, "Hello", user_config={"name": "Ada"})
    await instance.replica.ready()
    assert await instance.ask() == b"Hello, Ada"
    await instance.reports(backend=TAG, version="v1", config_version=1, state="ready", node="here")
    assert (await instance.report()).error is None
    await instance.replica.ready()
    await instance.replica.check()


async def test_a_replica_applies_a_new_configuration(instance: Instance) -> None:
    await instance.create(Greeter, "Hello")
    await instance.replica.ready()
    await instance.update(user_config={"name": "Grace"})
    await instance.reports(config_version=2)
    assert await instance.ask() == b"Hello, Grace"


async def test_a_configuration_that_user_code_refuses_is_reported_and_does_not_stop_the_replica(
    instance: Instance,
) -> None:
    await instance.create(Greeter, "Hello", user_config={"name": "Ada"})
    await instance.replica.ready()
    await instance.update(user_config={"nam": "Grace"})
    await instance.reports(state="ready", config_version=1, refused=2)
    refused = await instance.report()
    assert refused.error is not None
    error = from_wire(refused.error)
    assert isinstance(error, BackendError)
    assert error.type_name == "KeyError"
    assert await instance.ask() == b"Hello, Ada"

    await instance.update(user_config={"name": "Grace"})
    await instance.reports(config_version=3)
    accepted = await instance.report()
    assert (accepted.error, accepted.refused) == (None, None)
    assert await instance.ask() == b"Hello, Grace"


async def test_a_replica_ignores_another_version_of_its_backend(instance: Instance) -> None:
    await instance.create(Greeter, "Hello", user_config={"name": "Ada"})
    await instance.replica.ready()
    record = (await instance.registry.snapshot()).backends[TAG]
    await instance.put(replace(record, version="v2", config=BackendSpec(user_config={"name": "Bob"}), config_version=2))
    await asyncio.sleep(0.1)
    assert await instance.ask() == b"Hello, Ada"
    assert (await instance.report()).config_version == 1


async def test_code_that_cannot_start_is_reported_with_its_error(instance: Instance) -> None:
    await instance.create(Greeter)
    for _ in range(2):
        with pytest.raises(BackendError, match="missing 1 required positional argument: 'greeting'"):
            await instance.replica.ready()
    await instance.reports(state="failed", version="v1")
    with pytest.raises(BackendError, match="greeting"):
        await instance.replica.check()


async def test_a_deleted_backend_is_named(instance: Instance) -> None:
    with pytest.raises(BackendNotFound, match=TAG):
        await instance.replica.ready()


async def test_a_failed_health_check_is_reported(instance: Instance) -> None:
    await instance.create(Greeter, "Hello", user_config={"name": "nobody"})
    await instance.replica.check()  # before its start it counts as healthy
    await instance.replica.ready()
    with pytest.raises(BackendError, match="nobody is there"):
        await instance.replica.check()
    await instance.update(user_config={"name": "Ada"})
    await instance.reports(config_version=2)
    await instance.replica.check()


@pytest.fixture
def held(gate: Gate) -> threading.Event:
    """Set when a request runs that waits for the gate."""
    begun = threading.Event()

    def hold(request: Request) -> None:
        begun.set()
        gate.wait()

    hooks["hold"] = hold
    return begun


async def test_draining_finishes_started_requests_and_claims_no_new_ones(
    instance: Instance, gate: Gate, held: threading.Event
) -> None:
    await instance.create(Greeter, "Hello")
    await instance.replica.ready()
    async with calling(instance.url) as client:
        _, answer = client.call(b"hold")
        await wait_until_async(held.is_set)
        draining = asyncio.ensure_future(instance.replica.drain(30))
        await instance.reports(state="draining")
        late, late_answer = client.call()
        await late.accepted()
        gate.open()
        assert await draining
        assert (await answer).body == b"Hello, you"
        await asyncio.sleep(0.1)
        assert not late_answer.done()
        late.cancel()
    assert await instance.replica.drain(10)


async def test_requests_that_outlast_draining_are_redelivered(
    instance: Instance, gate: Gate, held: threading.Event
) -> None:
    await instance.create(Greeter, "Hello")
    await instance.replica.ready()
    async with calling(instance.url) as client:
        _, answer = client.call(b"hold")
        await wait_until_async(held.is_set)
        assert not await instance.replica.drain(0.05)
        gate.open()
        another = Serving(instance.url, "default", TAG, f"{TAG}#2")
        await another.ready()
        assert (await answer).body == b"Hello, you"
        assert await another.drain(1.0)


async def test_the_stats_of_a_replica_are_counted_once_and_outlive_it(instance: Instance) -> None:
    await instance.create(Greeter, "Hello")
    await instance.replica.ready()
    connection = await RedisConnection(instance.url).open()
    async with calling(instance.url) as client:  # which deletes the stats at its end

        async def served() -> int:
            return (await read_stats(connection, Keys("default"), TAG)).served

        async def has_served_two() -> bool:
            return await served() == 2

        for _ in range(2):
            await client.ask()
        await wait_until_async(has_served_two)
        await client.ask(b"sleep")
        assert await instance.replica.drain(1.0)  # the last request is counted too
        assert await served() == 3
        assert (await read_stats(connection, Keys("default"), TAG)).run_s > 0.4
    await connection.close()


async def test_a_replica_can_be_drained_before_it_has_started(instance: Instance, gate: Gate) -> None:
    assert await instance.replica.drain(1.0)

    class Slow:
        def __init__(self) -> None:
            gate.wait()

        def __call__(self, request: Request) -> None: ...

    await instance.create(Slow)
    another = Serving(instance.url, "default", TAG, f"{TAG}#2")
    starting = asyncio.ensure_future(another.ready())
    await asyncio.sleep(0.1)
    await another.drain(0.0)
    with pytest.raises(asyncio.CancelledError):
        await starting


def kill(server: EmbeddedServer) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)


async def test_a_replica_starts_when_its_broker_is_reachable(tmp_path: Path) -> None:
    with EmbeddedServer.start(data_dir=tmp_path) as server:
        async with opened(server.url) as instance:
            await instance.create(Greeter, "Hello")
            wait_until_written(server.url)
            kill(server)
            await instance.replica.ready()
            assert await instance.ask() == b"Hello, you"


async def test_a_broker_that_lost_its_data_gets_the_report_again(tmp_path: Path) -> None:
    with EmbeddedServer.start() as server:
        async with opened(server.url) as instance:
            await instance.create(Greeter, "Hello")
            await instance.replica.ready()
            await instance.reports(state="ready")
            kill(server)
            await instance.reports(state="ready", version="v1")
            assert await instance.ask() == b"Hello, you"
