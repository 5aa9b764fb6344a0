"""Capacity of a replica whose code takes one request at a time."""

from __future__ import annotations

import pytest

from penstock.workers.consuming.policies.capacity import Capacity


def capacity_after(run_s: float, *, concurrency: int = 1, is_blocking: bool = True, runs: int = 50) -> Capacity:
    """The capacity of a replica whose calls took ``run_s`` each."""
    capacity = Capacity(concurrency, is_blocking=is_blocking)
    for _ in range(runs):
        capacity.record_run(run_s, is_streaming=False)
    return capacity


@pytest.mark.parametrize(("run_s", "ahead"), [(0.000_01, 64), (0.000_1, 20), (0.000_5, 4), (0.002, 1), (0.009, 1)])
def test_quick_blocking_code_holds_two_milliseconds_of_work_ahead(run_s: float, ahead: int) -> None:
    assert capacity_after(run_s).limit(0.0, is_busy=True) == pytest.approx(1 + ahead, abs=1)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_slow_blocking_code_and_async_code_hold_nothing_ahead(concurrency: int) -> None:
    slow = capacity_after(0.2, concurrency=concurrency)
    on_loop = capacity_after(0.000_1, concurrency=concurrency, is_blocking=False)
    for capacity in (slow, on_loop):
        assert capacity.limit(0.0, is_busy=True) == concurrency


def test_one_slow_call_counts_at_once_and_quick_ones_slowly() -> None:
    capacity = capacity_after(0.000_1)
    assert capacity.limit(0.0, is_busy=True) > 1
    capacity.record_run(0.1, is_streaming=False)
    assert capacity.limit(0.0, is_busy=True) == 1
    for _ in range(3):
        capacity.record_run(0.000_1, is_streaming=False)
    assert capacity.limit(0.0, is_busy=True) == 1


def test_an_overrun_makes_code_slow_before_its_call_ends() -> None:
    capacity = capacity_after(0.000_1)
    assert capacity.record_overrun() > 0.010
    assert capacity.limit(0.0, is_busy=True) == 1


def test_one_request_is_held_ahead_when_a_steady_call_is_about_to_end() -> None:
    capacity = capacity_after(0.050)
    claim_at_s = capacity.call_began(100.0)
    assert claim_at_s is not None
    assert capacity.limit(100.0, is_busy=True) == 1
    assert capacity.limit(claim_at_s, is_busy=True) == 2
    assert capacity.limit(claim_at_s, is_busy=False) == 1
    assert capacity.patience_s(claim_at_s, 0.025) < 0.025


def test_the_end_of_a_call_behind_a_stream_is_not_predicted() -> None:
    capacity = capacity_after(0.050)
    capacity.record_run(0.050, is_streaming=True)
    assert capacity.call_began(100.0) is None
    assert capacity.patience_s(100.0, 0.025) == 0.025
