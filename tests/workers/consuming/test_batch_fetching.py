"""Lead of the next batch: the time of recent claims, with that of the large bodies fetched for them."""

from __future__ import annotations

import asyncio

import pytest

from penstock.broker.wire.requests import Entry, Header
from penstock.workers.claim import Claim
from penstock.workers.consuming import batching
from penstock.workers.consuming.batching import Batching
from penstock.workers.consuming.policies.fairness import StreamSharing
from penstock.workers.consuming.settings import ConsumerSettings

SIZE = 64
TIMER_S = 0.0015
RUN_S = 1.0


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1_000.0
        monkeypatch.setattr(batching, "monotonic", lambda: self.now_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def nothing() -> None:
    """Do nothing when a timer fires."""


def steady(clock: Clock) -> Batching:
    """A replica whose batches took `RUN_S` each. For the loop that runs."""
    settings = ConsumerSettings(
        concurrency=1,
        is_blocking=True,
        batch_size=SIZE,
        batch_wait_s=0.0,
        batch_share=0.1,
        max_deliveries=3,
        max_dead_letters=10,
    )
    replica = Batching(settings, StreamSharing(0.1), lambda: 0.0, on_lingered=nothing, on_nearly_free=nothing)
    for _ in range(6):
        run = replica.start(SIZE)
        clock.now_s += RUN_S
        run.took_s = RUN_S
        replica.end(run)
    return replica


def fetch(replica: Batching, clock: Clock, *, claim_s: float, bodies_s: float) -> None:
    """Claim a batch, which takes ``claim_s``, and fetch its bodies, which takes ``bodies_s`` for the slowest one."""
    bodies = [Claim(b"%d-0" % n, Entry("id", "caller", Header())) for n in range(SIZE)]
    replica.fetch_began(SIZE)
    replica.loading.update(bodies)
    clock.now_s += claim_s
    replica.fetch_ended(SIZE)
    for body in bodies[1:]:
        replica.loaded(body)
    clock.now_s += bodies_s
    replica.loaded(bodies[0])


@pytest.mark.parametrize(("claim_s", "bodies_s"), [(0.004, 0.0), (0.004, 0.050), (0.001, 0.090)])
async def test_the_next_batch_is_claimed_as_early_as_the_last_one_and_its_bodies_took(
    clock: Clock, claim_s: float, bodies_s: float
) -> None:
    replica = steady(clock)
    fetch(replica, clock, claim_s=claim_s, bodies_s=bodies_s)
    began_s = clock.now_s
    replica.start(SIZE)
    # Batches of a second may end 20 ms before they are expected to.
    lead_s = claim_s + bodies_s + TIMER_S
    clock.now_s = began_s + RUN_S - lead_s - 2 * TIMER_S
    assert replica.room(0) == 0
    clock.now_s = began_s + RUN_S - lead_s
    assert replica.room(0) == SIZE
    replica.close()


async def test_while_bodies_are_fetched_there_is_no_room_for_another_batch(clock: Clock) -> None:
    replica = steady(clock)
    replica.start(SIZE)
    clock.now_s += RUN_S - TIMER_S
    assert replica.room(0) == SIZE
    replica.loading.update(Claim(b"%d-0" % n, Entry("id", "caller", Header())) for n in range(SIZE - 4))
    assert replica.room(0) == 4
    assert replica.room(4) == 0
    await asyncio.sleep(0)
    replica.close()
