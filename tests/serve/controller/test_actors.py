"""What becomes of the actors of one kind, on Ray."""

from __future__ import annotations

from secrets import token_hex
from typing import Any

import pytest
import ray

from penstock.serve.controller.actors import ActorPool, actor_name
from penstock.workers.actor import NAMESPACE
from tests.waiting import wait_until_async


class Attending:
    """What a fleet needs of an actor."""

    async def ready(self) -> None: ...

    async def attend(self, controller: str) -> None:
        import asyncio

        await asyncio.Event().wait()


ACTOR: Any = ray.remote(Attending)


@pytest.fixture
def instance(cluster: str) -> str:
    return token_hex(4)


def fleet_of(instance: str) -> ActorPool:
    return ActorPool(instance, "proxy", lambda: None)


async def test_a_name_that_ray_holds_still_is_no_failure(instance: str) -> None:
    """One that has died can have its name for a moment longer than its successor waits."""
    holder = ACTOR.options(name=actor_name(instance, "proxy", "a"), namespace=NAMESPACE).remote()
    await holder.ready.remote()
    fleet = fleet_of(instance)
    fleet.start("a", ACTOR, (), {"num_cpus": 0})
    assert fleet.members == {}

    ray.kill(holder)

    async def starts() -> bool:
        if "a" not in fleet.members:
            fleet.start("a", ACTOR, (), {"num_cpus": 0})
        return "a" in fleet.members

    await wait_until_async(starts)
    member = fleet.members["a"]
    await wait_until_async(lambda: member.ready)
    assert member.error is None
    member.kill()
    await member.ended()


async def test_one_that_lives_is_adopted_under_its_name(instance: str) -> None:
    """As after a broker that lost what proxies said of themselves, and a controller that died with it."""
    before = fleet_of(instance)
    before.start("a", ACTOR, (), {"num_cpus": 0})
    await wait_until_async(lambda: before.members["a"].ready)
    fleet = fleet_of(instance)
    fleet.start("a", ACTOR, (), {"num_cpus": 0})
    fleet.adopt("a")
    await wait_until_async(lambda: fleet.members["a"].ready)
    fleet.kill("a")
    await fleet.members["a"].ended()
    await before.members["a"].ended()
    fleet.forget("a")

    async def is_gone() -> bool:
        fleet.adopt("a")
        return fleet.members["a"].gone

    await wait_until_async(is_gone)
    assert fleet.members["a"].error is None
