from __future__ import annotations

import math

from hypothesis import given, strategies as st

from penstock.workers.consuming.policies.prefetch import CallTimePredictor

CALLS, ALIKE_S, SHORT_S = 8, 0.002, 0.1
any_calls = st.lists(st.floats(0.0, 0.2), max_size=30)
moments = st.floats(0.0, 10_000.0)


@st.composite
def alike(draw: st.DrawFn, count: int = CALLS) -> list[float]:
    shortest = draw(st.floats(0.010, SHORT_S - ALIKE_S))
    return [shortest + draw(st.floats(0.0, 0.99 * ALIKE_S)) for _ in range(count)]


def after(calls: list[float]) -> CallTimePredictor:
    foresight = CallTimePredictor()
    for run_s in calls:
        foresight.begin(0.0)
        foresight.end(run_s)
    return foresight


@given(any_calls, alike(), moments)
def test_after_similar_calls_the_next_request_is_claimed_just_before_the_end(
    before: list[float], calls: list[float], now_s: float
) -> None:
    foresight = after(before + calls)
    ask_at_s = foresight.begin(now_s)
    assert ask_at_s is not None
    assert min(calls) - 0.003 < ask_at_s - now_s < min(calls)
    assert foresight.nears_end(ask_at_s)
    assert foresight.nears_end(now_s + max(calls))
    assert not foresight.nears_end(now_s)


@given(any_calls, st.data())
def test_after_dissimilar_calls_no_end_is_predicted(calls: list[float], data: st.DataObject) -> None:
    lately = calls[-CALLS:]
    foresight = after(calls)
    asked = foresight.begin(0.0)
    if len(lately) < CALLS or max(lately) - min(lately) > ALIKE_S or max(lately) > SHORT_S:
        assert asked is None
        assert not foresight.nears_end(data.draw(st.floats(0.0, 0.3)))
        assert foresight.patience_s(0.1, unpredictable_s=0.025) == 0.025


@given(alike(), st.floats(0.1, 10.0), st.integers(0, CALLS - 1), alike(CALLS - 1))
def test_one_slow_call_prevents_predictions_until_it_leaves_the_sample(
    calls: list[float], slow_s: float, more: int, others: list[float]
) -> None:
    foresight = after([*calls, SHORT_S + slow_s, *others[:more]])
    assert foresight.begin(0.0) is None


@given(any_calls | alike(), moments, st.floats(0.0, 0.3))
def test_no_request_waits_behind_a_call_for_more_than_eleven_milliseconds(
    calls: list[float], began_s: float, run_s: float
) -> None:
    """For any real duration, and a request that was claimed at any moment of the call."""
    foresight = after(calls)
    foresight.begin(began_s)
    now_s = began_s + run_s
    if foresight.nears_end(now_s):
        patience_s = foresight.patience_s(now_s, unpredictable_s=math.inf)
        assert 0 < patience_s < 0.011
        assert not foresight.nears_end(now_s + patience_s + 1e-6)
        assert foresight.patience_s(now_s + patience_s + 1e-6, unpredictable_s=math.inf) == 0


@given(alike(), moments)
def test_between_calls_no_end_is_near(calls: list[float], now_s: float) -> None:
    foresight = after(calls)
    foresight.begin(now_s)
    foresight.end(calls[0])
    assert not foresight.nears_end(now_s + calls[0])
    assert foresight.patience_s(now_s, unpredictable_s=0.025) == 0.025
