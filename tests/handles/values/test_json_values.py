"""A JSON value means the same in the body and query of a handle, in a batch, over HTTP and on the command line."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.responses import Response

from penstock.broker.wire.requests import Entry, Header
from penstock.handles import BatchItem
from penstock.handles.connection import Connection
from penstock.handles.errors import MalformedBody
from penstock.workers.executing.request import Request
from tests.handles.site import Site, describe, echo

ROWS = [
    '{"id":123456789012345678901}',
    "[-9223372036854775809,18446744073709551616]",
    '{"01234567890123456789":0.12345678901234567890}',
    '"\\ud800"',
    '{"a":["\\udcff"]}',
    "1" + "0" * 4000,
]
"""Texts as Python's ``json`` writes them, so that they can be compared as text."""

NULLS = ["NaN", "[Infinity,-Infinity]", "1e400"]


def over_http(body: bytes) -> Request:
    header = Header("ask", "POST", headers=[("content-type", "application/json")])
    return Request(Entry("1", "", header, body))


def canonical(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_every_value_arrives_and_returns_exactly(site: Site, connected: Connection, row: str) -> None:
    value = json.loads(row)
    site.serve(describe)
    handle = connected.get_handle("ask")
    assert handle.remote(value, q=value).result(30) | {"x": None} == {
        "data": value,
        "query": {"q": value},
        "method": "GET",
        "x": None,
    }
    (result,) = connected.batch("ask").map([BatchItem(value, query={"q": value})])
    assert (result.get()["data"], result.get()["query"]) == (value, {"q": value})
    assert over_http(row.encode()).data == value


def test_nan_and_infinities_are_read_everywhere_and_returned_as_null(site: Site, connected: Connection) -> None:
    def name(request: Any) -> Any:
        return [repr(request.data), request.data]

    site.serve(name)
    for row in NULLS:
        value = over_http(row.encode()).data
        assert repr(value) == repr(json.loads(row))
    assert connected.get_handle("ask").remote(float("nan")).result(30) == ["None", None]


def test_a_response_is_read_as_json_by_the_same_rules(site: Site, connected: Connection) -> None:
    def respond(request: Any) -> Response:
        return Response(request.data)

    site.serve(respond)
    handle = connected.get_handle("ask")
    for row in ROWS:
        assert canonical(handle.remote(row.encode()).result(30).json()) == canonical(json.loads(row))
    with pytest.raises(MalformedBody, match="the response is not JSON"):
        handle.remote(b"{").result(30).json()


def test_a_mapping_with_keys_that_are_no_strings_needs_pickle(site: Site, connected: Connection) -> None:
    labels: dict[Any, str] = {0: "cat"}

    def label(request: Any) -> dict[Any, str]:
        return labels

    site.serve(label)
    site.serve(echo, "pickled", tag="pickling", allow_pickle=True)
    with pytest.raises(Exception, match=r"cannot be sent.* has the key 0 \(int\)"):
        connected.get_handle("ask").remote().result(30)
    with pytest.raises(TypeError, match=r"has the key 0 \(int\)"):
        connected.get_handle("ask").remote(labels).result(30)
    both = {1: "a", "1": "b"}
    assert connected.get_handle("pickled").remote(both).result(30) == both
