import gc
import json
from collections.abc import Callable
from typing import Any

import pytest

from penstock.handles.codec import decode
from penstock.handles.errors import ConfigError, MalformedBody
from penstock.handles.json_bounds import MAX_ITEMS, MAX_ITEMS_VARIABLE, read_bounded, read_uncollected
from penstock.workers.executing.request import Request
from tests.workers.requests import from_http


def array_of(item: bytes, count: int) -> bytes:
    return b"[" + b",".join([item] * count) + b"]"


@pytest.mark.parametrize("item", [b"[]", b"{}", b'""'])
def test_a_body_of_millions_of_arrays_objects_or_strings_is_refused(item: bytes) -> None:
    body = array_of(item, MAX_ITEMS)
    request = Request(from_http(body, content_type="application/json"))
    with pytest.raises(MalformedBody, match="2,000,001 strings, arrays and objects, and at most 2,000,000 are read"):
        _ = request.data


async def test_json_has_the_same_limit_as_data() -> None:
    with pytest.raises(MalformedBody, match="at most 2,000,000 are read"):
        await Request(from_http(array_of(b"[]", MAX_ITEMS))).json()


def test_numbers_are_not_counted() -> None:
    assert len(read_bounded(json.loads, array_of(b"0", 2 * MAX_ITEMS + 1))) == 2 * MAX_ITEMS + 1


@pytest.mark.parametrize("limit", ["200000", "0"])
def test_the_limit_can_be_set(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setenv(MAX_ITEMS_VARIABLE, limit)
    assert read_bounded(json.loads, array_of(b"[]", 10)) == [[]] * 10  # a small body is not counted
    with pytest.raises(MalformedBody, match=f"at most {int(limit):,} are read"):
        read_bounded(json.loads, array_of(b"[]", 200_000))


def test_a_wrong_limit_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAX_ITEMS_VARIABLE, "many")
    with pytest.raises(ConfigError, match=f"{MAX_ITEMS_VARIABLE} must be a number of JSON values, not 'many'"):
        read_bounded(json.loads, array_of(b"[]", 200_000))


def collections_during(read: Callable[[bytes], Any], body: bytes) -> int:
    collections = 0

    def count(phase: str, info: object) -> None:
        nonlocal collections
        collections += phase == "start"

    gc.collect()
    gc.callbacks.append(count)
    try:
        kept = read(body)
    finally:
        gc.callbacks.remove(count)
    assert len(kept) == 200_000
    return collections


def test_no_garbage_is_collected_while_a_large_body_is_parsed() -> None:
    body = array_of(b"[]", 200_000)
    assert collections_during(lambda raw: read_bounded(json.loads, raw), body) <= 1  # the one after it
    assert collections_during(lambda raw: decode("json", raw), body) <= 1
    assert collections_during(json.loads, body) > 10
    assert gc.isenabled()


def test_garbage_collection_continues_after_a_malformed_body() -> None:
    with pytest.raises(ValueError, match="Expecting"):
        read_uncollected(json.loads, b"[" + b" " * 300_000)
    assert gc.isenabled()


def test_garbage_collection_stays_off_where_it_was_off() -> None:
    gc.disable()
    try:
        read_uncollected(json.loads, array_of(b"0", 200_000))
        assert not gc.isenabled()
    finally:
        gc.enable()
