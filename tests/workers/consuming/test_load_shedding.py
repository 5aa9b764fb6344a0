from __future__ import annotations

from hypothesis import given, strategies as st

from penstock.workers.consuming.policies.load_shedding import LoadShedding


def test_what_has_time_left_is_started_as_long_as_nothing_expires() -> None:
    prospects = LoadShedding()
    prospects.record_finish(1_000, left_ms=1, now_s=0)
    assert prospects.should_start(1, now_s=0)


def test_what_has_expired_is_not_started() -> None:
    assert not LoadShedding().should_start(0, now_s=0)


def test_while_others_expire_what_cannot_end_in_time_is_left() -> None:
    prospects = LoadShedding()
    prospects.record_finish(100, left_ms=1, now_s=10)
    assert not prospects.should_start(-1, now_s=10)
    assert not prospects.should_start(90, now_s=10)
    assert prospects.should_start(200, now_s=10)
    assert prospects.should_start(90, now_s=12)  # nothing has expired for a while


def test_what_ended_too_late_says_that_others_will() -> None:
    prospects = LoadShedding()
    prospects.record_finish(100, left_ms=-1, now_s=10)
    assert not prospects.should_start(90, now_s=10)


@given(
    servers=st.integers(1, 8),
    service_ms=st.floats(20, 300),
    overload=st.floats(1.5, 10),
    deadline_ms=st.floats(800, 5_000),
)
def test_servers_of_one_queue_answer_in_time_nearly_as_often_as_they_can(
    servers: int, service_ms: float, overload: float, deadline_ms: float
) -> None:
    """First come, first served, with all of their time spent on those whom they can still answer."""
    prospects = [LoadShedding() for _ in range(servers)]
    free_ms = [0.0] * servers
    answered, number, ends_ms = 0, 0, 15 * deadline_ms
    while (now_ms := min(free_ms)) < ends_ms:
        server = free_ms.index(now_ms)
        came_ms = number * service_ms / servers / overload
        number += 1
        now_ms = max(now_ms, came_ms)
        left_ms = came_ms + deadline_ms - now_ms
        if prospects[server].should_start(left_ms, now_ms / 1000):
            now_ms += service_ms
            left_ms -= service_ms
            prospects[server].record_finish(service_ms, left_ms, now_ms / 1000)
            answered += left_ms >= 0
        free_ms[server] = now_ms
    assert answered >= 0.9 * servers * ends_ms / service_ms - 2 * servers


@given(first_ms=st.floats(1, 100_000), left_ms=st.floats(10, 1_000))
def test_a_slow_request_does_not_close_the_door_for_ever(first_ms: float, left_ms: float) -> None:
    prospects = LoadShedding()
    prospects.record_finish(first_ms, left_ms=1, now_s=0)
    prospects.should_start(-1, now_s=0)
    assert any(prospects.should_start(left_ms, now_s=n / 100) for n in range(2_000))
