from __future__ import annotations

from hypothesis import given, settings, strategies as st

from penstock.workers.consuming.policies.fairness import Fairness

shares = st.floats(0.0, 1.0)
rooms = st.lists(st.integers(1, 64), min_size=1, max_size=200)


@settings(deadline=None)
@given(shares, rooms)
def test_under_constant_interactive_load_batch_items_get_their_share_and_no_more(
    share: float, rooms: list[int]
) -> None:
    """After every claim, and with a difference of less than one slot."""
    fairness, claimed, batch = Fairness(share), 0, 0
    for room in rooms:
        owed = fairness.owed(room)
        fairness = fairness.after(room - owed, owed, waiting=True)
        claimed, batch = claimed + room, batch + owed
        assert share * claimed - 1 < batch + 1e-6
        assert batch <= share * claimed + 1e-6


@settings(deadline=None)
@given(shares, st.lists(st.tuples(st.integers(1, 64), st.integers(0, 64)), max_size=100))
def test_slots_beyond_their_share_do_not_count_against_batch_items(share: float, claims: list[tuple[int, int]]) -> None:
    """After any history, a stretch of constant interactive load begins without a debt of batch items."""
    fairness = Fairness(share)
    for room, wanted in claims:
        interactive = min(room, wanted)
        fairness = fairness.after(interactive, room - interactive, waiting=True)
    claimed = batch = 0
    for _ in range(50):
        owed = fairness.owed(8)
        fairness = fairness.after(8 - owed, owed, waiting=True)
        claimed, batch = claimed + 8, batch + owed
    assert batch > share * claimed - 1 - 1e-6


@settings(deadline=None)
@given(shares, rooms)
def test_nothing_is_owed_while_no_batch_item_waits(share: float, rooms: list[int]) -> None:
    fairness = Fairness(share)
    for room in rooms:
        fairness = fairness.after(room, 0, waiting=False)
    assert fairness == Fairness(share)


@settings(deadline=None)
@given(st.floats(0.0, 1e6), shares, st.integers(0, 1_000))
def test_at_most_the_room_is_owed(credit: float, share: float, room: int) -> None:
    assert 0 <= Fairness(share, credit).owed(room) <= room


def test_a_share_of_a_tenth_of_single_slots_is_every_tenth_slot() -> None:
    fairness, turns = Fairness(0.1), list[int]()
    for _ in range(30):
        turns.append(owed := fairness.owed(1))
        fairness = fairness.after(1 - owed, owed, waiting=True)
    assert [turn for turn, owed in enumerate(turns, 1) if owed] == [10, 20, 30]
