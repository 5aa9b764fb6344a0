from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import pytest

from penstock.broker.registry.records import BackendSpec
from penstock.workers.executing.runner import Runner
from penstock.workers.executing.user_code import dump
from tests.workers.running import Gate, Replica, Start


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    replicas: list[Replica] = []

    async def start(target: Any, *args: Any, config: Mapping[str, Any] | None = None, **kwargs: Any) -> Replica:
        replica = Replica(await Runner.start("b", "b#1", dump(target, args, kwargs), BackendSpec(**(config or {}))))
        replicas.append(replica)
        return replica

    yield start
    for replica in replicas:
        await replica.runner.stop()


@pytest.fixture
def gate(request: pytest.FixtureRequest) -> Iterator[Gate]:
    gate = Gate(request.node.nodeid)
    yield gate
    gate.open()
