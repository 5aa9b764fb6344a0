"""Hooks of user code: ``reconfigure`` and ``check_health``."""

import asyncio
from typing import Any

import pytest

from penstock.broker.registry.records import BackendSpec
from penstock.handles.errors import BackendError, ConfigError
from penstock.workers.executing.request import Request
from tests.workers.requests import from_handle, value_of
from tests.workers.running import Counter, Gate, Start, double


async def test_reconfigure_is_called_at_the_start_and_on_changes(start: Start) -> None:
    replica = await start(Counter, config={"user_config": {"step": 3}})
    assert await replica.ask() == 3
    await replica.runner.reconfigure(BackendSpec(user_config={"step": 4}, max_concurrent_queries=2))
    assert await replica.ask() == 7
    assert replica.runner.concurrency() == 2


async def test_reconfigure_is_not_called_for_an_unchanged_user_config(start: Start) -> None:
    class Counting:
        given = 0

        async def reconfigure(self, user_config: Any) -> None:
            self.given += 1

        def __call__(self, request: Request) -> int:
            return self.given

    replica = await start(Counting, config={"user_config": {"step": 3}})
    await replica.runner.reconfigure(BackendSpec(user_config={"step": 3}, max_concurrent_queries=2))
    assert await replica.ask() == 1
    await replica.runner.reconfigure(BackendSpec(user_config=None))
    assert await replica.ask() == 2


async def test_a_refused_configuration_leaves_the_old_one(start: Start) -> None:
    replica = await start(Counter, config={"user_config": {"step": 3}})
    with pytest.raises(BackendError, match="KeyError: 'step'"):
        await replica.runner.reconfigure(BackendSpec(user_config={"stepp": 3}, max_concurrent_queries=2))
    assert replica.runner.concurrency() == 1
    assert replica.runner.config == BackendSpec(user_config={"step": 3})
    assert await replica.ask() == 3


async def test_a_user_config_needs_a_reconfigure_method(start: Start) -> None:
    with pytest.raises(ConfigError, match="double has no method reconfigure to take it"):
        await start(double, config={"user_config": {}})


async def test_the_users_health_check_is_called(start: Start) -> None:
    replica = await start(Counter)
    await replica.runner.check_health()
    await replica.runner.reconfigure(BackendSpec(user_config={"step": -1}))
    with pytest.raises(BackendError, match="it runs backwards"):
        await replica.runner.check_health()
    await (await start(double)).runner.check_health()


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_health_check_that_takes_too_long_fails(start: Start, gate: Gate, is_async: bool) -> None:
    class Sync(Counter):
        def check_health(self) -> None:
            gate.wait()

    class Async:
        async def __call__(self, request: Request) -> None: ...

        async def check_health(self) -> None:
            await asyncio.sleep(3600)

    replica = await start(Async if is_async else Sync, config={"health_check_timeout_s": 0.05})
    with pytest.raises(BackendError, match=r"'b' took longer than 0.05 s"):
        await replica.runner.check_health()


async def test_a_health_check_does_not_fail_behind_a_long_request(start: Start, gate: Gate) -> None:
    class Slow(Counter):
        def __call__(self, request: Request) -> int:
            gate.wait()
            return 1

    timeout_s = 0.5
    replica = await start(Slow, config={"health_check_timeout_s": timeout_s})
    entry = from_handle()
    replica.run(entry)
    checking = asyncio.ensure_future(replica.runner.check_health())
    await asyncio.sleep(1.5 * timeout_s)
    gate.open()
    await checking
    assert value_of(await replica.reply_to(entry)) == 1
