"""Call ids cannot be guessed, and shown ids do not reveal them."""

import re
from itertools import islice

from hypothesis import given, strategies as st

from penstock.broker.wire.call_ids import ItemIds, new_ids, shown_id
from penstock.broker.wire.replies import Part, Reply
from penstock.broker.wire.requests import Entry, Header, RawEntry

SECRET, OTHER_SECRET = bytes(32), bytes(31) + b"\x01"
INDICES = st.integers(0, 10**18 - 1)


def test_ids_are_128_random_bits_each() -> None:
    ids = list(islice(new_ids(), 10_000))
    assert len(set(ids)) == 10_000
    assert all(re.fullmatch("[0-9a-f]{32}", id_) for id_ in ids)
    # Every hexadecimal digit varies, so no part of an id is a counter or a name.
    assert all(len({id_[at] for id_ in ids}) == 16 for at in range(32))


def test_two_sources_have_no_id_in_common() -> None:
    assert not set(islice(new_ids(), 1_000)) & set(islice(new_ids(), 1_000))


@given(INDICES)
def test_every_producer_of_a_job_derives_the_same_id_of_an_item(index: int) -> None:
    id_ = ItemIds(SECRET).id_of(index)
    assert ItemIds(SECRET).id_of(index) == id_
    assert ItemIds(SECRET).index_of(id_) == index
    assert ItemIds(OTHER_SECRET).index_of(id_) is None


def test_items_share_no_part_of_their_secrets() -> None:
    ids = ItemIds(SECRET)
    assert len({ids.id_of(index).partition("-")[0] for index in range(1_000)}) == 1_000


@given(INDICES, INDICES)
def test_the_id_of_one_item_is_not_valid_for_another(index: int, other: int) -> None:
    ids = ItemIds(SECRET)
    secret = ids.id_of(index).partition("-")[0]
    assert ids.index_of(f"{secret}-{other}") == (index if other == index else None)


@given(st.one_of(st.text(max_size=60), INDICES.map(lambda index: f"job:j-{index}"), INDICES.map(str)))
def test_an_id_that_is_not_of_an_item_is_none(id_: str) -> None:
    assert ItemIds(SECRET).index_of(id_) is None


def test_an_index_has_only_one_spelling() -> None:
    ids = ItemIds(SECRET)
    secret = ids.id_of(7).partition("-")[0]
    for index in ("07", "\N{ARABIC-INDIC DIGIT SEVEN}", "+7", "7 ", "7" * 5_000, ""):
        assert ids.index_of(f"{secret}-{index}") is None


@given(st.text(alphabet="0123456789abcdef", min_size=32, max_size=32))
def test_a_shown_id_contains_no_part_of_the_id(id_: str) -> None:
    shown = shown_id("", id_)
    assert re.fullmatch("call-[0-9a-f]{12}", shown)
    assert shown == shown_id("", id_)
    assert shown_id("web-1", id_) == "web-1"


def test_the_repr_of_an_entry_shows_neither_its_id_nor_its_caller() -> None:
    id_, caller = next(new_ids()), "alice@0123456789ab"
    header = Header(request_id="web-1")
    raw = RawEntry(id_.encode(), caller.encode(), header.dump(), b"")
    for shown in (Entry(id_, caller, header), raw, Reply(id_), Part(id_, 0)):
        assert id_ not in repr(shown)
        assert caller not in repr(shown)
    assert "web-1" in repr(Entry(id_, caller, header))
