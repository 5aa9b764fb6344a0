"""The claim watch, and a replica that has room and does not claim."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.broker.queue.group.claimer import Claimer
from penstock.handles.errors import PenstockError
from penstock.workers.consuming.policies import claim_watch
from penstock.workers.consuming.policies.claim_watch import OBSERVE_S, STOPPED_AFTER_S, ClaimWatch
from tests.support.waiting import wait_until_async
from tests.workers.serving import calling, serving


class Watched:
    """A watch that observes as often as a replica does."""

    def __init__(self) -> None:
        self.watch = ClaimWatch()
        self.now_s = 100.0

    def observe(
        self, seconds: float, *, answered: int = 0, could_claim: bool = True, step_s: float = OBSERVE_S
    ) -> bool:
        for _ in range(round(seconds / step_s)):
            self.now_s += step_s
            self.watch.observe(answered, could_claim, self.now_s)
        return self.watch.has_stopped


def test_a_loop_without_an_answered_claim_has_stopped() -> None:
    watched = Watched()
    assert not watched.observe(STOPPED_AFTER_S - 1)
    assert watched.observe(2)


def test_an_answered_claim_restarts_the_watch() -> None:
    watched = Watched()
    for answered in range(5):
        assert not watched.observe(STOPPED_AFTER_S - 1, answered=answered)


def test_a_replica_that_may_not_claim_has_not_stopped() -> None:
    watched = Watched()
    assert not watched.observe(10 * STOPPED_AFTER_S, could_claim=False)
    assert not watched.observe(STOPPED_AFTER_S - 1)


def test_a_loop_that_user_code_blocks_has_not_stopped() -> None:
    watched = Watched()
    assert not watched.observe(2)
    assert not watched.observe(3 * STOPPED_AFTER_S, step_s=3 * STOPPED_AFTER_S)
    assert not watched.observe(2, answered=1)


def echo(request: Any) -> Any:
    return request.data


async def is_well(worker: Any) -> bool:
    try:
        await worker.check()
    except PenstockError:
        return False
    return True


async def test_a_replica_that_does_not_claim_is_unhealthy_while_requests_wait(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drop(*args: Any, **options: Any) -> None:
        """Lose the claim: it is never answered."""

    async with calling(redis_url) as client:
        with monkeypatch.context() as patched:
            patched.setattr(Claimer, "claim", drop)
            patched.setattr(claim_watch, "STOPPED_AFTER_S", 1.0)
            async with serving(redis_url, echo) as stopped:
                call, answer = client.call(b"waits")
                await call.accepted()

                async def has_stopped() -> bool:
                    return not await is_well(stopped)

                await wait_until_async(has_stopped)
                with pytest.raises(PenstockError, match="has not claimed, although requests wait for backend 'model'"):
                    await stopped.check()
                patched.undo()
                async with serving(redis_url, echo) as healthy:
                    assert (await answer).body == b"waits"
                    assert await is_well(healthy)
                    assert await is_well(stopped)  # no request waits
