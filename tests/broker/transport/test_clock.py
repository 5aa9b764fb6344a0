from collections.abc import Awaitable, Callable

import pytest

from penstock.broker.errors import BrokerUnavailable
from penstock.broker.transport.clock import Clock

AHEAD_S = 3600.0
"""By how much the broker's clock differs from ours."""

Time = tuple[bytes, bytes]


class Local:
    """Our own clock, which runs as it is told."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def monotonic(self) -> float:
        return self.now_s

    def of_broker(self) -> Time:
        """Return what the broker says to ``TIME``."""
        micros = round((self.now_s + AHEAD_S) * 1_000_000)
        return b"%d" % (micros // 1_000_000), b"%d" % (micros % 1_000_000)

    def ask(self, *ways_s: tuple[float, float]) -> Callable[[], Awaitable[Time]]:
        """Return what asks a broker that is as far away each time, there and back, as ``ways_s`` say."""
        ways = iter(ways_s)

        async def ask() -> Time:
            there_s, back_s = next(ways)
            self.now_s += there_s
            told = self.of_broker()
            self.now_s += back_s
            return told

        return ask

    def error_ms(self, clock: Clock) -> float:
        return abs(clock.now_ms() - (self.now_s + AHEAD_S) * 1000)


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Local:
    local = Local()
    monkeypatch.setattr("penstock.broker.transport.clock.monotonic", local.monotonic)
    return local


async def test_the_quickest_of_several_readings_counts(local: Local) -> None:
    clock = Clock()
    await clock.read(local.ask((0.5, 0.0), (0.0, 0.1), (0.004, 0.0), (0.0, 0.2), (0.3, 0.0)))
    assert local.error_ms(clock) == pytest.approx(2, abs=0.1), "half of what it took"


async def test_one_quick_reading_is_enough(local: Local) -> None:
    clock = Clock()
    await clock.read(local.ask((0.0005, 0.0005)))
    assert local.error_ms(clock) < 0.1


async def test_a_reading_is_stale_after_half_a_minute(local: Local) -> None:
    clock = Clock()
    assert clock.is_stale()
    await clock.read(local.ask((0.0, 0.0)))
    local.now_s += 29
    assert not clock.is_stale()
    local.now_s += 2
    assert clock.is_stale()
    clock.update(local.now_s, local.of_broker())
    assert not clock.is_stale()


async def test_a_reading_with_a_long_round_trip_is_ignored(local: Local) -> None:
    clock = Clock()
    await clock.read(local.ask((0.0, 0.0)))
    sent, told = local.now_s, local.of_broker()
    local.now_s += 0.5
    clock.update(sent, told)
    assert local.error_ms(clock) < 0.1
    clock.update(local.now_s, BrokerUnavailable("redis://broker", "it went away"))
    assert local.error_ms(clock) < 0.1
