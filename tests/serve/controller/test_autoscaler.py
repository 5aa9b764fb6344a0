"""The autoscaling policy on recorded and generated load curves, with replicas simulated in virtual time."""

from __future__ import annotations

import csv
import math
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from penstock.broker.queue.counts.queue_depth import QueueDepth
from penstock.broker.registry.records import AutoscalingSpec
from penstock.serve.controller.autoscaler import ScalingState, decide
from tests.serve.changing.record_load import BURST, SCALING, SERVICE_S

_TICK_S = 0.5


def simulate(
    config: AutoscalingSpec,
    arrivals_per_s: Callable[[float], float],
    *,
    service_s: float,
    seconds: float,
    start: int = 1,
) -> list[int]:
    """Return how many replicas there were at each tick, under a fluid load and replicas that serve one at a time."""
    state, queue, curve = ScalingState(replicas=start), 0.0, list[int]()
    for tick in range(1, int(seconds / _TICK_S)):
        now_s = tick * _TICK_S
        offered = arrivals_per_s(now_s)
        capacity = state.replicas / service_s
        queue = max(0.0, queue + (offered - capacity) * _TICK_S)
        busy = min(state.replicas, math.ceil(offered * service_s)) if queue < 0.5 else state.replicas
        state = decide(config, 1, state, QueueDepth(unsettled=math.ceil(queue) + busy, in_progress=busy), now_s)
        curve.append(state.replicas)
    return curve


def changes(curve: Sequence[int]) -> int:
    return sum(before != after for before, after in pairwise(curve))


def test_a_step_of_load_scales_up_at_the_first_decision() -> None:
    config = AutoscalingSpec(max_replicas=10)
    after = decide(config, 1, ScalingState(replicas=1, at_s=1.0), QueueDepth(unsettled=12, in_progress=1), 1.5)
    assert after.replicas == 6


def test_a_backend_without_replicas_scales_up_without_the_delay() -> None:
    config = AutoscalingSpec(min_replicas=0, max_replicas=4, upscale_delay_s=60.0)
    assert decide(config, 1, ScalingState(replicas=0), QueueDepth(unsettled=1, in_progress=0), 1.0).replicas == 1


def test_an_idle_backend_scales_down_to_its_minimum_after_the_delay() -> None:
    config = AutoscalingSpec(min_replicas=0, max_replicas=4, downscale_delay_s=10.0)
    curve = simulate(config, lambda _: 0.0, service_s=0.1, seconds=60, start=4)
    assert curve[0] == 4
    assert curve[-1] == 0
    assert curve.index(0) * _TICK_S >= 9.5


def test_a_peak_shorter_than_the_delay_starts_nothing() -> None:
    config = AutoscalingSpec(max_replicas=10, upscale_delay_s=5.0)
    state = ScalingState(replicas=1)
    for tick, unsettled in enumerate([1, 20, 20, 20, 1, 20, 20, 20, 1], start=1):
        state = decide(config, 1, state, QueueDepth(unsettled=unsettled, in_progress=1), float(tick))
        assert state.replicas == 1


def test_a_lull_shorter_than_the_delay_stops_nothing() -> None:
    config = AutoscalingSpec(max_replicas=10, downscale_delay_s=5.0)
    state = ScalingState(replicas=10)
    for tick, unsettled in enumerate([20, 0, 0, 0, 20, 0, 0, 0, 20], start=1):
        state = decide(config, 1, state, QueueDepth(unsettled=unsettled, in_progress=0), float(tick))
        assert state.replicas == 10


def test_it_scales_down_to_the_largest_recent_demand() -> None:
    config = AutoscalingSpec(max_replicas=10, downscale_delay_s=3.0)
    state = ScalingState(replicas=10)
    curve = list[int]()
    for tick, unsettled in enumerate([2, 8, 2, 2, 2], start=1):
        state = decide(config, 1, state, QueueDepth(unsettled=unsettled, in_progress=0), float(tick))
        curve.append(state.replicas)
    assert curve == [10, 10, 10, 4, 1]


@given(
    before=st.lists(st.integers(0, 2_000), max_size=40),
    bounds=st.tuples(st.integers(0, 3), st.integers(1, 20)),
    delay_s=st.floats(0.0, 30.0),
    concurrency=st.integers(1, 100),
    target=st.floats(1.0, 10.0),
)
def test_an_idle_backend_is_at_its_minimum_after_the_delay_for_any_earlier_load(
    before: list[int], bounds: tuple[int, int], delay_s: float, concurrency: int, target: float
) -> None:
    """Seven seconds are added, in which the moving average of 20 replicas' work fades."""
    low, high = bounds[0], max(bounds)
    config = AutoscalingSpec(
        min_replicas=low, max_replicas=high, target_queue_per_replica=target, downscale_delay_s=delay_s
    )
    state, now_s = ScalingState(replicas=high), 0.0
    for unsettled in before:
        now_s += _TICK_S
        held = min(unsettled, state.replicas * concurrency)
        state = decide(config, concurrency, state, QueueDepth(unsettled=unsettled, in_progress=held), now_s)
    rest_s = now_s + delay_s + 7.0
    while now_s < rest_s:
        now_s += _TICK_S
        state = decide(config, concurrency, state, QueueDepth(unsettled=0, in_progress=0), now_s)
    assert state.replicas == low


def test_a_single_request_does_not_keep_a_replica() -> None:
    config = AutoscalingSpec(min_replicas=0, max_replicas=1, downscale_delay_s=0.1)
    state = decide(config, 1, ScalingState(replicas=0), QueueDepth(unsettled=1, in_progress=1), 1.0)
    assert state.replicas == 1
    for tick in range(1, 9):
        state = decide(config, 1, state, QueueDepth(unsettled=0, in_progress=0), 1.0 + tick * _TICK_S)
    assert state.replicas == 0


@given(
    load=st.floats(0.0, 8.0),
    start=st.integers(1, 10),
    target=st.floats(1.0, 10.0),
    service_s=st.floats(0.01, 2.0),
)
@settings(max_examples=60, deadline=None)
def test_under_a_steady_load_it_does_not_oscillate(load: float, start: int, target: float, service_s: float) -> None:
    """After five of ten minutes the replicas carry the load.

    A load just above their capacity fills the queue slowly, so one late change is allowed.
    """
    config = AutoscalingSpec(max_replicas=20, target_queue_per_replica=target, downscale_delay_s=20.0)
    curve = simulate(config, lambda _: load / service_s, service_s=service_s, seconds=600, start=start)
    assert changes(curve[len(curve) // 2 :]) <= 1
    assert curve[-1] >= load - 0.1


@given(
    unsettled=st.lists(st.integers(0, 10_000), min_size=1, max_size=200),
    bounds=st.tuples(st.integers(0, 5), st.integers(1, 20)),
    delays=st.tuples(st.floats(0, 30), st.floats(0, 30)),
    start=st.integers(0, 30),
)
def test_it_respects_its_bounds_under_any_load(
    unsettled: list[int], bounds: tuple[int, int], delays: tuple[float, float], start: int
) -> None:
    low, high = bounds[0], max(bounds)
    config = AutoscalingSpec(
        min_replicas=low, max_replicas=high, upscale_delay_s=delays[0], downscale_delay_s=delays[1]
    )
    state = ScalingState(replicas=start)
    for tick, count in enumerate(unsettled, start=1):
        state = decide(config, 1, state, QueueDepth(unsettled=count, in_progress=min(count, 5)), tick * _TICK_S)
        assert low <= state.replicas <= high


# Requests per second at a public site, over a day, hour by hour: the night's trough, the rise, noon and evening.
_DAY = [12, 9, 7, 6, 6, 8, 15, 31, 52, 68, 74, 77, 80, 78, 75, 73, 74, 79, 88, 95, 90, 71, 42, 22]


def test_over_a_day_it_follows_the_load_with_few_changes() -> None:
    config = AutoscalingSpec(max_replicas=20, downscale_delay_s=30.0)

    def rate(now_s: float) -> float:
        hour = now_s / 60.0  # a day in 24 minutes
        return float(_DAY[int(hour) % 24])

    curve = simulate(config, rate, service_s=0.1, seconds=24 * 60)
    assert max(curve) >= 10
    assert min(curve[200:]) <= 3
    assert changes(curve) < 80


@pytest.mark.parametrize("period_s", [2.0, 10.0, 20.0])
def test_a_load_that_swings_faster_than_the_delay_changes_nothing(period_s: float) -> None:
    config = AutoscalingSpec(max_replicas=20, downscale_delay_s=30.0)

    def rate(now_s: float) -> float:
        return 60.0 if now_s % period_s < period_s / 2 else 5.0

    curve = simulate(config, rate, service_s=0.1, seconds=300)
    later = curve[len(curve) // 2 :]
    assert changes(later) <= 2


@dataclass(frozen=True, slots=True)
class Sample:
    """One observation of a real backend, recorded by ``record_load.py``."""

    at_s: float
    arrived: int
    load: QueueDepth
    wanted: int
    ready: int


def recorded() -> list[Sample]:
    text = Path(__file__).with_name("load_curve.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return [
        Sample(
            float(row["at_s"]),
            int(row["arrived"]),
            QueueDepth(unsettled=int(row["unsettled"]), in_progress=int(row["in_progress"])),
            int(row["wanted"]),
            int(row["ready"]),
        )
        for row in rows
    ]


def replayed(samples: Sequence[Sample], **scaling: Any) -> list[int]:
    """Return the policy's decision at each sample, from what the broker counted then."""
    config, state, curve = AutoscalingSpec(**{**SCALING, **scaling}), ScalingState(replicas=1), list[int]()
    for sample in samples:
        state = decide(config, 1, state, sample.load, sample.at_s + 1.0)
        curve.append(state.replicas)
    return curve


def test_on_a_recorded_curve_it_decides_as_it_did_during_the_recording() -> None:
    """The controller decided twice a second as well, but at other moments."""
    samples = recorded()
    curve = replayed(samples)
    off = [abs(sample.wanted - replicas) for sample, replicas in zip(samples, curve, strict=True)]
    assert sum(off) / len(off) < 1.0


def test_on_a_recorded_curve_it_scales_up_for_the_burst_and_down_at_the_end() -> None:
    samples = recorded()
    curve = replayed(samples)
    burst = next(n for n, (one, other) in enumerate(pairwise(samples)) if other.arrived - one.arrived >= BURST) + 1
    assert curve[burst] == SCALING["max_replicas"]
    assert curve[-1] == SCALING["min_replicas"]
    assert changes(curve) <= 14


@pytest.mark.parametrize("target", [1.0, 2.0, 4.0, 16.0])
@pytest.mark.parametrize("delays", [(0.0, 5.0), (2.0, 5.0), (5.0, 20.0)])
def test_on_a_recorded_curve_it_seldom_turns_under_any_configuration(
    target: float, delays: tuple[float, float]
) -> None:
    bounds = {"min_replicas": 0, "max_replicas": 6, "target_queue_per_replica": target}
    curve = replayed(recorded(), **bounds, upscale_delay_s=delays[0], downscale_delay_s=delays[1])
    assert set(curve) <= set(range(7))
    turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(*[steps(curve)[n:] for n in range(3)], strict=False))
    # The load has three peaks: a backlog at the start, the plateau and the burst. With a target of one request per
    # replica, two requests that arrived together at the end are a fourth.
    assert turns <= 6


def test_recorded_arrivals_are_served_by_simulated_replicas() -> None:
    samples = recorded()

    def rate(now_s: float) -> float:
        at = bisect([sample.at_s for sample in samples], now_s)
        if not 0 < at < len(samples):
            return 0.0
        before, after = samples[at - 1], samples[at]
        return (after.arrived - before.arrived) / (after.at_s - before.at_s)

    config = AutoscalingSpec(**SCALING)
    curve = simulate(config, rate, service_s=SERVICE_S, seconds=samples[-1].at_s + 30)
    assert max(curve) == SCALING["max_replicas"]
    assert curve[-1] == SCALING["min_replicas"]
    assert changes(curve) <= 16


def steps(curve: Sequence[int]) -> list[int]:
    """Return the curve without repetitions."""
    return [curve[0], *(after for before, after in pairwise(curve) if before != after)]
