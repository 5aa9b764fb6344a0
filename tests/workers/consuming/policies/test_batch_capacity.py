from __future__ import annotations

from itertools import pairwise

from hypothesis import given, strategies as st

from penstock.workers.consuming.policies.batch_capacity import BatchCapacity

SAMPLE_SIZE, MAX_FETCH_S, MAX_OVERRUN_S = 6, 0.1, 0.005
TIMER_S = 0.0015
durations_s = st.floats(0.001, 2.0)
moments_s = st.floats(0.0, 1_000.0)


def after(durations: list[float], *, slots: int = 1, fetch_s: float | None = None) -> BatchCapacity:
    """The capacity of a replica whose batches took ``durations`` seconds, one after the other."""
    capacity = BatchCapacity()
    capacity.resize(slots, 0.0)
    for duration_s in durations:
        capacity.end(capacity.start(1, 0.0), duration_s)
    if fetch_s is not None:
        capacity.record_fetch(fetch_s)
    return capacity


def alike(duration_s: float) -> list[float]:
    return [duration_s] * SAMPLE_SIZE


@given(st.integers(1, 5), st.integers(0, 12), st.data())
def test_a_batch_occupies_one_slot_and_the_next_ones_queue(slots: int, started: int, data: st.DataObject) -> None:
    capacity = after([], slots=slots)
    runs = [capacity.start(1, 0.0) for _ in range(started)]
    for left in range(started, -1, -1):
        assert capacity.free == slots - min(left, slots)
        assert capacity.queued == max(0, left - slots)
        if left:
            capacity.end(runs.pop(data.draw(st.integers(0, left - 1))), 1.0)


@given(durations_s)
def test_before_four_batches_have_ended_no_end_is_predicted(duration_s: float) -> None:
    capacity = after([duration_s] * 3)
    capacity.start(1, 0.0)
    assert capacity.next_nearly_free_s(0.0) is None
    assert capacity.patience_s(0.0) is None
    assert not any(capacity.nearly_free(duration_s * tenth / 10) for tenth in range(30))


@given(durations_s, st.floats(0.001, 0.2), moments_s)
def test_the_slot_is_nearly_free_one_claim_before_the_end(duration_s: float, fetch_s: float, started_s: float) -> None:
    capacity = after(alike(duration_s), fetch_s=fetch_s)
    capacity.start(1, started_s)
    at_s = capacity.next_nearly_free_s(started_s - 1.0)
    assert at_s is not None
    lead_s = started_s + duration_s - at_s
    assert abs(lead_s - min(duration_s, min(fetch_s, MAX_FETCH_S) + TIMER_S)) < 1e-6
    assert capacity.nearly_free(at_s) == 1
    assert capacity.nearly_free(started_s + duration_s) == 1
    assert capacity.nearly_free(at_s - 2 * TIMER_S) == 0


@given(st.floats(0.02, 2.0), st.floats(0.0005, 0.01), st.integers(2, 20))
def test_a_slow_claim_counts_at_once_and_a_quick_one_slowly(long_s: float, short_s: float, more: int) -> None:
    capacity = after(alike(5.0), fetch_s=long_s)
    capacity.start(1, 0.0)
    leads_s = list[float]()
    for _ in range(more):
        at_s = capacity.next_nearly_free_s(-1.0)
        assert at_s is not None
        leads_s.append(5.0 - at_s - TIMER_S)
        capacity.record_fetch(short_s)
    assert abs(leads_s[0] - min(long_s, MAX_FETCH_S)) < 1e-9
    assert all(0.89 * earlier < later < earlier for earlier, later in pairwise(leads_s))


@given(st.lists(durations_s, min_size=4, max_size=20), st.floats(0.0005, MAX_FETCH_S), st.floats(0.0, 5.0))
def test_no_request_waits_long_behind_a_running_batch(durations: list[float], fetch_s: float, ran_s: float) -> None:
    """For any real duration: a request claimed at any moment of the batch starts or is given back soon."""
    capacity = after(durations, fetch_s=fetch_s)
    capacity.start(1, 0.0)
    if not capacity.nearly_free(ran_s):
        return
    patience_s = capacity.patience_s(ran_s)
    assert patience_s is not None
    early_s = 0.020  # the most that a claim may be early because durations differ
    assert 0 < patience_s <= fetch_s + early_s + 2 * TIMER_S + MAX_OVERRUN_S + 1e-9
    assert not capacity.nearly_free(ran_s + patience_s + 1e-9)
    assert capacity.patience_s(ran_s + patience_s + 1e-9) == 0


@given(durations_s, st.floats(2.0, 100.0))
def test_one_unusual_batch_changes_no_prediction(duration_s: float, factor: float) -> None:
    usual, unusual = after(alike(duration_s)), after([*alike(duration_s), duration_s * factor])
    for capacity in (usual, unusual):
        capacity.start(1, 0.0)
    assert usual.next_nearly_free_s(-1.0) == unusual.next_nearly_free_s(-1.0)


def test_a_queued_batch_takes_the_slot_that_is_nearly_free_and_starts_when_it_is_free() -> None:
    capacity = after(alike(1.0), fetch_s=0.01)
    first = capacity.start(1, 0.0)
    assert capacity.nearly_free(0.999) == 1
    second = capacity.start(1, 0.999)
    assert capacity.nearly_free(0.999) == 0
    capacity.end(first, 1.0)
    assert (capacity.free, capacity.queued) == (0, 0)
    assert capacity.nearly_free(1.999) == 1
    capacity.end(second, 2.0)
    assert capacity.free == 1


class Call:
    """A call of user code that began at a known time."""

    def __init__(self, began_s: float) -> None:
        self.began_s = began_s


@given(durations_s, st.floats(0.0, 1.0), st.floats(0.0, 0.02))
def test_a_batch_ended_when_its_successor_began_however_late_the_loop_learns_of_it(
    duration_s: float, late_s: float, fetch_s: float
) -> None:
    capacity = BatchCapacity()
    capacity.record_fetch(fetch_s)
    run = capacity.start(1, 0.0)
    for ended in range(1, SAMPLE_SIZE + 1):
        successor = capacity.start(1, 0.0)
        successor.call = Call(ended * duration_s)
        capacity.end(run, ended * duration_s + late_s)
        run = successor
    on_time = after(alike(duration_s), fetch_s=fetch_s)
    on_time.start(1, SAMPLE_SIZE * duration_s)
    expected_s, found_s = on_time.next_nearly_free_s(0.0), capacity.next_nearly_free_s(0.0)
    assert expected_s is not None
    assert found_s is not None
    assert abs(found_s - expected_s) < 1e-6


def test_a_queued_batch_that_has_not_begun_starts_when_the_one_before_has_ended() -> None:
    capacity = after(alike(1.0), fetch_s=0.0)
    first, second = capacity.start(1, 0.0), capacity.start(1, 0.5)
    second.call = Call(0.0)
    capacity.end(first, 1.0)
    at_s = capacity.next_nearly_free_s(1.0)
    assert at_s is not None
    assert 1.9 < at_s < 2.0


def test_a_returned_queued_batch_leaves_the_running_one_its_slot() -> None:
    capacity = after(alike(1.0))
    running = capacity.start(1, 0.0)
    capacity.end(capacity.start(1, 0.5), 0.6)
    assert (capacity.free, capacity.queued) == (0, 0)
    capacity.end(running, 1.0)
    assert capacity.free == 1


def test_each_of_several_slots_is_nearly_free_at_its_own_time() -> None:
    capacity = after(alike(1.0), slots=3, fetch_s=0.01)
    for started_s in (0.0, 0.3, 0.6):
        capacity.start(1, started_s)
    counts = [capacity.nearly_free(now_s) for now_s in (0.5, 0.999, 1.299, 1.599)]
    assert counts == [0, 1, 1, 1], "an overdue batch is not one that is about to end"
    at_s = capacity.next_nearly_free_s(1.0)
    assert at_s is not None
    assert 1.28 < at_s < 1.3


def test_queued_batches_start_when_there_are_more_slots() -> None:
    capacity = after([])
    for _ in range(3):
        capacity.start(1, 0.0)
    capacity.resize(2, 1.0)
    assert (capacity.free, capacity.queued) == (0, 1)
    capacity.resize(4, 1.0)
    assert (capacity.free, capacity.queued) == (1, 0)
