from __future__ import annotations

from hypothesis import given, strategies as st

from penstock.workers.consuming.policies.load_shedding import LoadShedding


def test_requests_with_time_left_start_while_none_expires() -> None:
    policy = LoadShedding()
    policy.record_finish(1_000, left_ms=1, now_s=0)
    assert policy.should_start(1, now_s=0)


def test_an_expired_request_does_not_start() -> None:
    assert not LoadShedding().should_start(0, now_s=0)


def test_while_requests_expire_those_that_cannot_finish_in_time_are_skipped() -> None:
    policy = LoadShedding()
    policy.record_finish(100, left_ms=1, now_s=10)
    assert not policy.should_start(-1, now_s=10)
    assert not policy.should_start(90, now_s=10)
    assert policy.should_start(200, now_s=10)
    assert policy.should_start(90, now_s=12)  # nothing has expired for a while


def test_a_late_finish_counts_as_an_expiry() -> None:
    policy = LoadShedding()
    policy.record_finish(100, left_ms=-1, now_s=10)
    assert not policy.should_start(90, now_s=10)


@given(
    servers=st.integers(1, 8),
    service_ms=st.floats(20, 300),
    overload=st.floats(1.5, 10),
    deadline_ms=st.floats(800, 5_000),
)
def test_replicas_of_one_queue_reply_in_time_nearly_as_often_as_possible(
    servers: int, service_ms: float, overload: float, deadline_ms: float
) -> None:
    """Compare with an ideal: first come, first served, all time spent on requests that can still finish in time."""
    policy = [LoadShedding() for _ in range(servers)]
    free_ms = [0.0] * servers
    answered, number, ends_ms = 0, 0, 15 * deadline_ms
    while (now_ms := min(free_ms)) < ends_ms:
        server = free_ms.index(now_ms)
        came_ms = number * service_ms / servers / overload
        number += 1
        now_ms = max(now_ms, came_ms)
        left_ms = came_ms + deadline_ms - now_ms
        if policy[server].should_start(left_ms, now_ms / 1000):
            now_ms += service_ms
            left_ms -= service_ms
            policy[server].record_finish(service_ms, left_ms, now_ms / 1000)
            answered += left_ms >= 0
        free_ms[server] = now_ms
    assert answered >= 0.9 * servers * ends_ms / service_ms - 2 * servers


@given(first_ms=st.floats(1, 100_000), left_ms=st.floats(10, 1_000))
def test_one_slow_request_does_not_prevent_later_starts(first_ms: float, left_ms: float) -> None:
    policy = LoadShedding()
    policy.record_finish(first_ms, left_ms=1, now_s=0)
    policy.should_start(-1, now_s=0)
    assert any(policy.should_start(left_ms, now_s=n / 100) for n in range(2_000))
