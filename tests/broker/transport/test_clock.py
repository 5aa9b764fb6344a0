from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, strategies as st

from penstock.broker.errors import BrokerUnavailable
from penstock.broker.transport.clock import GRID_MS, Clock, on_grid

AHEAD_S = 3600.0
"""The difference between the broker's clock and the local one, in seconds."""

Time = tuple[bytes, bytes]


class LocalClock:
    """A local clock that the test advances."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def monotonic(self) -> float:
        return self.now_s

    def broker_time(self) -> Time:
        """Return the broker's reply to ``TIME``."""
        micros = round((self.now_s + AHEAD_S) * 1_000_000)
        return b"%d" % (micros // 1_000_000), b"%d" % (micros % 1_000_000)

    def requests(self, *delays_s: tuple[float, float]) -> Callable[[], Awaitable[Time]]:
        """Return a function that sends ``TIME``; each call has the next delays of its request and its reply."""
        delays = iter(delays_s)

        async def request() -> Time:
            there_s, back_s = next(delays)
            self.now_s += there_s
            time = self.broker_time()
            self.now_s += back_s
            return time

        return request

    def error_ms(self, clock: Clock) -> float:
        return abs(clock.now_ms() - (self.now_s + AHEAD_S) * 1000)


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> LocalClock:
    local = LocalClock()
    monkeypatch.setattr("penstock.broker.transport.clock.monotonic", local.monotonic)
    return local


async def test_the_quickest_of_several_readings_counts(local: LocalClock) -> None:
    clock = Clock()
    await clock.read(local.requests((0.5, 0.0), (0.0, 0.1), (0.004, 0.0), (0.0, 0.2), (0.3, 0.0)))
    assert local.error_ms(clock) == pytest.approx(2, abs=0.1), "half of its round trip"


async def test_one_quick_reading_is_enough(local: LocalClock) -> None:
    clock = Clock()
    await clock.read(local.requests((0.0005, 0.0005)))
    assert local.error_ms(clock) < 0.1


async def test_a_reading_is_stale_after_half_a_minute(local: LocalClock) -> None:
    clock = Clock()
    assert clock.is_stale()
    await clock.read(local.requests((0.0, 0.0)))
    local.now_s += 29
    assert not clock.is_stale()
    local.now_s += 2
    assert clock.is_stale()
    clock.update(local.now_s, local.broker_time())
    assert not clock.is_stale()


async def test_a_reading_with_a_long_round_trip_is_ignored(local: LocalClock) -> None:
    clock = Clock()
    await clock.read(local.requests((0.0, 0.0)))
    sent_s, reply = local.now_s, local.broker_time()
    local.now_s += 0.5
    clock.update(sent_s, reply)
    assert local.error_ms(clock) < 0.1
    clock.update(local.now_s, BrokerUnavailable("redis://broker", "it went away"))
    assert local.error_ms(clock) < 0.1


@given(delay_s=st.floats(0.1, 60.0), now_ms=st.floats(1.6e12, 2e12))
def test_a_delay_on_the_grid_ends_at_a_moment_that_all_processes_share(delay_s: float, now_ms: float) -> None:
    shorter_s = on_grid(delay_s, now_ms)
    assert delay_s - GRID_MS / 1000 <= shorter_s <= delay_s + 0.0021
    past_ms = (now_ms + shorter_s * 1000) % GRID_MS
    assert min(past_ms, GRID_MS - past_ms) < 0.01


@given(now_ms=st.integers(32_000_000_000, 40_000_000_000).map(lambda n: n * GRID_MS), off_ms=st.floats(-1.5, 40.0))
def test_a_delay_of_a_whole_number_of_steps_is_not_shortened_by_a_timer_that_ended_a_little_early(
    now_ms: float, off_ms: float
) -> None:
    assert on_grid(0.5, now_ms + off_ms) * 1000 == pytest.approx(500 - off_ms, abs=0.01)
