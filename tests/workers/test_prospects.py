from __future__ import annotations

from hypothesis import given, strategies as st

from penstock.workers.prospects import Prospects


def test_what_has_time_left_is_started_as_long_as_nothing_expires() -> None:
    prospects = Prospects()
    prospects.saw(1_000)
    assert prospects.are_good(1, now_s=0)


def test_what_has_expired_is_not_started() -> None:
    assert not Prospects().are_good(0, now_s=0)


def test_while_others_expire_what_cannot_end_in_time_is_left() -> None:
    prospects = Prospects()
    prospects.saw(100)
    assert not prospects.are_good(-1, now_s=10)
    assert not prospects.are_good(90, now_s=10)
    assert prospects.are_good(200, now_s=10)
    assert prospects.are_good(90, now_s=12)  # nothing has expired for a while


@given(service_ms=st.floats(1, 300), overload=st.floats(1.5, 10), deadline_ms=st.floats(800, 5_000))
def test_one_server_answers_in_time_nearly_as_often_as_it_can(
    service_ms: float, overload: float, deadline_ms: float
) -> None:
    """First come, first served, with all of its time spent on those whom it can still answer."""
    prospects = Prospects()
    answered, now_ms, number = 0, 0.0, 0
    ends_ms = 40 * deadline_ms
    while now_ms < ends_ms:
        came_ms = number * service_ms / overload
        now_ms = max(now_ms, came_ms)
        left_ms = came_ms + deadline_ms - now_ms
        if prospects.are_good(left_ms, now_ms / 1000):
            now_ms += service_ms
            prospects.saw(service_ms)
            answered += now_ms <= came_ms + deadline_ms
        number += 1
    assert answered >= 0.9 * ends_ms / service_ms - 2


@given(first_ms=st.floats(1, 100_000), left_ms=st.floats(10, 1_000))
def test_a_slow_request_does_not_close_the_door_for_ever(first_ms: float, left_ms: float) -> None:
    prospects = Prospects()
    prospects.saw(first_ms)
    prospects.are_good(-1, now_s=0)
    assert any(prospects.are_good(left_ms, now_s=n / 100) for n in range(2_000))
