from collections import Counter

import pytest
from hypothesis import given, strategies as st

from penstock.handles.calls.traffic import choose

TAGS = st.text(max_size=8)
WEIGHTS = st.just(0.0) | st.floats(1e-9, 1.0)
TRAFFIC = st.dictionaries(TAGS, WEIGHTS, max_size=5)
KEYS = st.text(max_size=20)
RANDOM = st.floats(0, 1, exclude_max=True)
BELOW_ONE = 1 - 2**-53


def shares(traffic: dict[str, float], keys: int = 20_000) -> dict[str, float]:
    """Return the share of keys that each backend gets."""
    counts = Counter(choose(traffic, f"user-{n}", 0.0) for n in range(keys))
    return {tag: counts[tag] / keys for tag in traffic}


@given(TRAFFIC, KEYS, RANDOM, RANDOM)
def test_the_same_key_maps_to_the_same_backend(traffic: dict[str, float], key: str, one: float, other: float) -> None:
    in_another_order = dict(reversed(traffic.items()))
    assert choose(traffic, key, one) == choose(in_another_order, key, other)


def test_the_same_key_maps_to_the_same_backend_in_every_process_and_release() -> None:
    mapped = [choose({"a": 0.5, "b": 0.3, "c": 0.2}, f"user-{n}", 0.0) for n in range(12)]
    assert mapped == list("caacaaaccbba")


@given(TRAFFIC, st.none() | KEYS, RANDOM | st.just(0.0) | st.just(BELOW_ONE))
def test_a_backend_without_weight_gets_nothing(traffic: dict[str, float], key: str | None, random: float) -> None:
    chosen = choose(traffic, key, random)
    if chosen is None:
        assert not any(traffic.values())
    else:
        assert traffic[chosen] > 0


@given(TRAFFIC, TRAFFIC, KEYS)
def test_a_key_moves_only_from_a_backend_that_lost_weight_or_to_one_that_gained_it(
    before: dict[str, float], after: dict[str, float], key: str
) -> None:
    old, new = choose(before, key, 0.0), choose(after, key, 0.0)
    if old != new:
        lost = old is not None and after.get(old, 0.0) < before[old]
        gained = new is not None and after[new] > before.get(new, 0.0)
        assert lost or gained


@pytest.mark.parametrize(
    "traffic",
    [
        {"a": 1.0},
        {"a": 0.5, "b": 0.5},
        {"a": 0.9, "b": 0.1},
        {"a": 0.6, "b": 0.3, "c": 0.1},
        {"a": 0.7, "b": 0.0, "c": 0.3},
    ],
)
def test_the_shares_of_keys_follow_the_weights(traffic: dict[str, float]) -> None:
    assert shares(traffic) == pytest.approx(traffic, abs=0.015)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any))
def test_the_shares_of_requests_follow_the_weights(parts: list[int]) -> None:
    traffic = {str(n): part / sum(parts) for n, part in enumerate(parts)}
    counts = Counter(choose(traffic, None, (n + 0.5) / 1_000) for n in range(1_000))
    assert {tag: counts[tag] / 1_000 for tag in traffic} == pytest.approx(traffic, abs=0.002)


@pytest.mark.parametrize(
    ("before", "after", "moved"),
    [
        ({"a": 1.0}, {"a": 0.9, "b": 0.1}, 0.1),
        ({"a": 0.5, "b": 0.5}, {"a": 0.0, "b": 1.0}, 0.5),
        ({"a": 0.4, "b": 0.4, "c": 0.2}, {"a": 0.4, "b": 0.4, "c": 0.2}, 0.0),
        ({"a": 0.5, "b": 0.5}, {"a": 0.6, "b": 0.4}, 0.1),
        ({"a": 0.6, "b": 0.4}, {"a": 0.54, "b": 0.36, "c": 0.1}, 0.1),
        ({"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 0.625, "b": 0.375}, 0.2),
    ],
)
def test_a_change_of_weights_moves_no_more_keys_than_the_weights_changed(
    before: dict[str, float], after: dict[str, float], moved: float
) -> None:
    keys = [f"user-{n}" for n in range(20_000)]
    changed = sum(choose(before, key, 0.0) != choose(after, key, 0.0) for key in keys)
    assert changed / len(keys) == pytest.approx(moved, abs=0.015)


def test_a_key_with_lone_surrogates_is_mapped() -> None:
    assert choose({"a": 1.0}, "\ud800", 0.0) == "a"
