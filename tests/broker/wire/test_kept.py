"""Results and ids of kept requests."""

from contextlib import suppress

import pytest
from hypothesis import given, strategies as st

from penstock.broker.errors import WireError
from penstock.broker.wire.kept import NewIds, Result, backend_mark, key_digest, mark_of
from penstock.broker.wire.replies import Reply

PIECES = st.lists(st.tuples(st.sampled_from(["json", "text"]), st.integers(0, 2**40), st.booleans()), max_size=4)


@given(st.binary(max_size=300), st.integers(100, 599), st.text(max_size=20), PIECES)
def test_a_result_is_read_as_it_was_written(
    body: bytes, status: int, name: str, pieces: list[tuple[str, int, bool]]
) -> None:
    result = Result(
        Reply("", status, "json", [("x", name)] if name.isprintable() else [], run_ms=1.5, body=body), pieces
    )
    assert Result.load(result.dump()) == result


@given(st.binary(max_size=40), st.data())
def test_any_string_is_read_or_refused(raw: bytes, data: st.DataObject) -> None:
    whole = Result(Reply("", body=b"body")).dump()
    cut = data.draw(st.integers(0, len(whole)))
    for other in (raw, whole[:cut], whole[:cut] + raw):
        with suppress(WireError):
            assert isinstance(Result.load(other), Result)


@pytest.mark.parametrize("raw", [b"", b"1", b"3:ab", b"1:v", b":v", b"-1:v", b"1:v1:1", b"9999999999999:v"])
def test_a_string_that_is_no_result_is_refused(raw: bytes) -> None:
    with pytest.raises(WireError):
        Result.load(raw)


def test_ids_are_distinct_and_end_with_the_mark_of_their_backend() -> None:
    new_ids = NewIds()
    ids = {new_ids.next("model") for _ in range(1_000)}
    assert len(ids) == 1_000
    assert {mark_of(id_) for id_ in ids} == {backend_mark("model")}
    assert all(len(id_) == 48 for id_ in ids)
    assert not ids & {NewIds().next("model") for _ in range(1_000)}


def test_a_digest_depends_on_each_part_of_the_scope_of_a_key() -> None:
    digests = {
        key_digest(endpoint, credentials, key)
        for endpoint in ("a", "ab")
        for credentials in (b"", b"b", b"bc")
        for key in ("k", "bk", "")
    }
    assert len(digests) == 18
