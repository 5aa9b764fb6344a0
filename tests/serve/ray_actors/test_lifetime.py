"""The end of a controller as its actors see it, with an actor of Ray that fails as one does whose node ends."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError

from penstock.serve.ray_actors.lifetime import outlast


class Ended:
    """An actor whose calls fail: each with the next of ``errors``."""

    def __init__(self, errors: list[Exception]) -> None:
        self.attend = self
        self._errors = errors

    def options(self, **options: Any) -> Ended:
        return self

    async def remote(self) -> None:
        raise self._errors.pop(0)


async def test_an_actor_outlasts_a_controller_that_restarts_elsewhere_until_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray reports the death of a call's process also when it restarts the actor, as where its node has ended."""
    errors: list[Exception] = [ActorDiedError(), ActorUnavailableError("restarts", None)]
    controller = Ended(errors)

    def get_actor(name: str, namespace: str) -> Ended:
        if name != "controller" or not errors:
            raise ValueError(name)
        return controller

    monkeypatch.setattr(ray, "get_actor", get_actor)
    await outlast("controller")
    assert errors == []


async def test_an_actor_does_not_stay_for_a_later_controller_of_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a script ends and the next one starts at once."""
    errors: list[Exception] = [ActorDiedError()]
    controllers = [Ended(errors), Ended([])]

    def get_actor(name: str, namespace: str) -> Ended:
        return controllers.pop(0)

    monkeypatch.setattr(ray, "get_actor", get_actor)
    await outlast("controller")
    assert (errors, controllers) == ([], [])
