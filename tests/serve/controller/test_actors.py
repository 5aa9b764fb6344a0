"""Pools of actors on a real Ray."""

from __future__ import annotations

from secrets import token_hex
from typing import Any

import pytest
import ray

from penstock.serve.controller.actors import ActorPool
from penstock.serve.ray_actors.lifetime import NAMESPACE, actor_name
from tests.support.waiting import wait_until_async


class Attending:
    """The methods that a pool calls."""

    async def ready(self) -> None: ...

    async def attend(self, controller: str) -> None:
        import asyncio

        await asyncio.Event().wait()


ACTOR: Any = ray.remote(Attending)


@pytest.fixture
def instance(cluster: str) -> str:
    return token_hex(4)


def pool_of(instance: str) -> ActorPool:
    return ActorPool(instance, "proxy", lambda: None)


async def test_a_name_that_ray_has_not_released_yet_is_not_a_failure(instance: str) -> None:
    """The name of an actor that died may be in use for a moment longer than the pause before its successor."""
    holder = ACTOR.options(name=actor_name(instance, "proxy", "a"), namespace=NAMESPACE).remote()
    await holder.ready.remote()
    pool = pool_of(instance)
    pool.start("a", ACTOR, (), {"num_cpus": 0})
    assert pool.members == {}

    ray.kill(holder)

    async def starts() -> bool:
        if "a" not in pool.members:
            pool.start("a", ACTOR, (), {"num_cpus": 0})
        return "a" in pool.members

    await wait_until_async(starts)
    member = pool.members["a"]
    await wait_until_async(lambda: member.ready)
    assert member.error is None
    member.kill()
    await member.wait_gone()


async def test_an_actor_that_lives_is_adopted_by_its_name(instance: str) -> None:
    """As after the broker lost the reports of the proxies and the controller died with it."""
    before = pool_of(instance)
    before.start("a", ACTOR, (), {"num_cpus": 0})
    await wait_until_async(lambda: before.members["a"].ready)
    pool = pool_of(instance)
    pool.start("a", ACTOR, (), {"num_cpus": 0})
    pool.adopt("a")
    await wait_until_async(lambda: pool.members["a"].ready)
    pool.kill("a")
    await pool.members["a"].wait_gone()
    await before.members["a"].wait_gone()
    pool.forget("a")

    async def is_gone() -> bool:
        pool.adopt("a")
        return pool.members["a"].gone

    await wait_until_async(is_gone)
    assert pool.members["a"].error is None
