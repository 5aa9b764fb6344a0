import dataclasses
import json
from contextlib import suppress
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, strategies as st

from penstock.broker.errors import WireError
from penstock.broker.wire.path_params import PathParam
from penstock.broker.wire.replies import Part, Reply
from penstock.broker.wire.requests import Entry, Header

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)  # surrogates are not Unicode text
SMALL_INTS = st.integers(-(2**63), 2**64 - 1)
"""What JSON's writers and readers agree on."""
JSON = st.recursive(
    st.none() | st.booleans() | SMALL_INTS | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
PAIRS = st.lists(st.tuples(TEXT, TEXT), max_size=4)
PATH_PARAMS = TEXT | st.integers() | st.floats(allow_nan=False) | st.uuids()

headers = st.builds(
    Header,
    endpoint=TEXT,
    method=TEXT,
    path=TEXT,
    path_params=st.dictionaries(TEXT, PATH_PARAMS, max_size=4),
    query=TEXT | st.dictionaries(TEXT, JSON, max_size=3),
    headers=PAIRS,
    codec=TEXT,
    deadline_ms=st.integers(0, 2**63),
    call=TEXT,
    request_id=TEXT,
    client=TEXT,
    window=st.integers(0, 2**31),
    scope=st.none() | st.dictionaries(TEXT, JSON, min_size=1, max_size=3),
)
MILLISECONDS = st.floats(allow_nan=False, allow_infinity=False)


def part(values: list[bytes], codec: str, more: bool, status: int, headers: list[tuple[str, str]]) -> Part:
    return Part("id", 0, codec, [len(value) for value in values], more, status, headers, b"".join(values))


parts = st.builds(
    part, st.lists(st.binary(max_size=20), min_size=1, max_size=5), TEXT, st.booleans(), st.integers(200, 599), PAIRS
)
entries = st.builds(Entry, TEXT, TEXT, headers, st.binary(max_size=50))
replies = st.builds(
    Reply,
    id=TEXT,
    status=st.integers(100, 599),
    codec=TEXT,
    headers=PAIRS,
    error=st.none() | st.dictionaries(TEXT, JSON, max_size=3),
    replica=TEXT,
    queue_ms=MILLISECONDS,
    run_ms=MILLISECONDS,
    body=st.binary(max_size=50),
)

MEMBERS = st.sampled_from(
    [*json.loads(Header().dump()), "scope", "status", "error", "replica", "queue_ms", "run_ms", "unheard-of"]
)
FIELDS = st.sampled_from([b"v", b"id", b"by", b"h", b"b", b"large", b"n", b"unheard-of"])


def field(fields: list[bytes], name: bytes) -> bytes:
    return fields[_at(fields, name)]


def with_field(fields: list[bytes], name: bytes, value: bytes) -> list[bytes]:
    at = _at(fields, name)
    return [*fields[:at], value, *fields[at + 1 :]]


def _at(fields: list[bytes], name: bytes) -> int:
    """Return where the value of a field is. Another field may have its name for a value."""
    return 2 * fields[::2].index(name) + 1


@given(entries)
def test_an_entry_is_read_as_it_was_written(entry: Entry) -> None:
    assert Entry.of(entry.fields()) == entry


@given(replies)
def test_a_reply_is_read_as_it_was_written(reply: Reply) -> None:
    assert Reply.of(reply.fields()) == reply


@given(replies, st.lists(st.tuples(TEXT, st.binary(max_size=50), MILLISECONDS, MILLISECONDS), min_size=1, max_size=5))
def test_alike_replies_are_written_as_one_entry(reply: Reply, others: list[tuple[str, bytes, float, float]]) -> None:
    alike = [
        dataclasses.replace(reply, headers=[], error=None, id=id_, body=body, queue_ms=queued, run_ms=ran)
        for id_, body, queued, ran in others
    ]
    fields = Reply.fields_of(alike)
    assert Reply.all_of(fields) == alike
    assert Reply.ids_of(fields) == [reply.id for reply in alike]


@given(replies)
def test_a_single_reply_is_read_like_one_of_several(reply: Reply) -> None:
    assert Reply.all_of(reply.fields()) == [reply]
    assert Reply.ids_of(reply.fields()) == [reply.id]


ALIKE = Reply.fields_of([Reply("7"), Reply("8")])


@pytest.mark.parametrize(
    "fields",
    [
        ALIKE[:-1],
        ALIKE[:-2],
        with_field(ALIKE, b"n", b"many"),
        with_field(ALIKE, b"v", b"2"),
        with_field(ALIKE, b"h", b"{"),
        with_field(ALIKE, b"h", b'{"queue_ms": [1.0], "run_ms": [1.0, 2.0]}'),
        with_field(ALIKE, b"h", b'{"queue_ms": [1.0, "2"], "run_ms": [1.0, 2.0]}'),
        with_field(ALIKE, b"h", b'{"queue_ms": 1.0, "run_ms": 2.0}'),
        [*ALIKE[:6], b"\xff", *ALIKE[7:]],
    ],
    ids=[
        *("odd", "too few", "not a number", "version", "header", "a time too few", "a time that is text", "one time"),
        "not UTF-8",
    ],
)
def test_an_entry_of_several_replies_that_cannot_be_read_is_a_wire_error(fields: list[bytes]) -> None:
    with pytest.raises(WireError):
        Reply.all_of(fields)


@given(st.lists(headers, min_size=2, max_size=2))
def test_entries_share_a_header_only_if_it_is_the_same(pair: list[Header]) -> None:
    for header in [pair[0], pair[0], pair[1], pair[0]]:
        assert Entry.of(Entry("1", "c", header).fields()).header == header


@given(entries)
def test_an_entry_can_be_read_from_a_mapping_too(entry: Entry) -> None:
    fields = entry.fields()
    assert Entry.of(dict(zip(fields[::2], fields[1::2], strict=True))) == entry


def test_a_large_body_is_not_in_its_entry_or_reply() -> None:
    entry = Entry("1", "caller", Header(), b"", large=True)
    reply = Reply("1", large=True)
    assert Entry.of(entry.fields()) == entry
    assert Reply.of(reply.fields()) == reply


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        2**64,
        -(10**5000),
        3.14,
        float("inf"),
        float("-inf"),
        5e-324,
        UUID("12345678-1234-5678-1234-567812345678"),
        "text",
        "",
        "7",
    ],
    ids=lambda value: f"{type(value).__name__} {value:.5g}" if isinstance(value, float) else type(value).__name__,
)
def test_a_path_parameter_keeps_its_type_and_value(value: PathParam) -> None:
    read = Header.load(Header(path_params={"p": value}).dump()).path_params["p"]
    assert (type(read), read) == (type(value), value)


def test_a_path_parameter_that_cannot_travel_is_refused_by_name() -> None:
    convertors_make_anything: Any = {"when": object()}
    with pytest.raises(WireError, match=r"the path parameter 'when' cannot travel.*object"):
        Header(path_params=convertors_make_anything).dump()


def test_a_body_travels_as_raw_bytes_beside_the_json() -> None:
    body = bytes(range(256))
    assert body in Entry("1", "c", Header(), body).fields()
    assert body in Reply("1", body=body).fields()


@given(entries, replies, st.binary(max_size=20), JSON)
def test_fields_of_a_later_release_are_ignored(entry: Entry, reply: Reply, value: bytes, member: Any) -> None:
    for written in (entry, reply):
        fields = written.fields()
        header = json.loads(field(fields, b"h")) | {"unheard-of": member}
        fields = with_field(fields, b"h", json.dumps(header).encode())
        assert type(written).of([*fields, b"unheard-of", value]) == written


def test_a_field_that_an_earlier_release_did_not_write_has_its_default() -> None:
    assert Header.load(b"{}") == Header()
    assert Reply.of([b"v", b"1", b"id", b"7", b"h", b"{}"]) == Reply("7")


@pytest.mark.parametrize("kind", [Entry, Reply])
def test_an_unknown_version_is_refused_by_name(kind: type[Entry] | type[Reply]) -> None:
    fields = [*Entry("1", "c", Header()).fields()]
    with pytest.raises(WireError, match=r"cannot read wire version b'2'; this process reads b'1'"):
        kind.of(with_field(fields, b"v", b"2"))
    with pytest.raises(WireError, match="cannot read wire version None"):
        kind.of(fields[2:])


@pytest.mark.parametrize("name", [b"id", b"by", b"h"])
def test_a_missing_field_is_named(name: bytes) -> None:
    fields = Entry("1", "c", Header()).fields()
    at = fields.index(name)
    with pytest.raises(WireError, match=f"no field {name!r}"):
        Entry.of(fields[:at] + fields[at + 2 :])


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("endpoint", 1),
        ("path", None),
        ("query", ["a"]),
        ("deadline_ms", True),
        ("deadline_ms", 1.5),
        ("headers", [["a", 1]]),
        ("headers", {"a": "b"}),
        ("params", ["a"]),
        ("params", {"headers": ["int", "x"]}),
        ("params", {"headers": ["complex", "1"]}),
    ],
)
def test_a_member_of_the_wrong_type_is_named(member: str, value: Any) -> None:
    with pytest.raises(WireError, match=f"{member}|headers"):
        Header.load(json.dumps({member: value}).encode())


@pytest.mark.parametrize("status", [99, 600, -1, True, "200"])
def test_a_reply_has_a_status_of_http(status: Any) -> None:
    with pytest.raises(WireError, match="status"):
        Reply.of([b"v", b"1", b"id", b"7", b"h", json.dumps({"status": status}).encode()])


def read_or_refuse(fields: list[bytes]) -> None:
    for read in (Entry.of, Reply.of, Reply.all_of):
        with suppress(WireError):
            read(fields)
    Reply.ids_of(fields)


@given(st.lists(st.binary(max_size=30), max_size=12))
def test_random_fields_give_a_wire_error_and_no_other(fields: list[bytes]) -> None:
    read_or_refuse(fields)


@given(st.lists(st.tuples(FIELDS, st.binary(max_size=30) | st.just(b"1")), max_size=8))
def test_random_values_give_a_wire_error_and_no_other(pairs: list[tuple[bytes, bytes]]) -> None:
    read_or_refuse([b"v", b"1", *(part for pair in pairs for part in pair)])


@given(JSON | st.dictionaries(MEMBERS, JSON, max_size=6), st.integers(0, 40))
def test_random_json_gives_a_wire_error_and_no_other(header: Any, cut: int) -> None:
    whole = json.dumps(header).encode()
    for raw in (whole, whole[:cut], whole + b"}", b"[" * 5000):
        read_or_refuse([b"v", b"1", b"id", b"1", b"by", b"c", b"h", raw, b"b", b""])


@given(entries, st.data())
def test_a_flipped_byte_gives_a_wire_error_and_no_other(entry: Entry, data: st.DataObject) -> None:
    fields = entry.fields()
    at = data.draw(st.integers(0, len(fields) - 1))
    broken = bytearray(fields[at] or b"x")
    broken[data.draw(st.integers(0, len(broken) - 1))] ^= data.draw(st.integers(1, 255))
    read_or_refuse([*fields[:at], bytes(broken), *fields[at + 1 :]])


def test_every_member_of_a_header_travels() -> None:
    """A member that somebody adds and forgets to write, or to read, fails here."""
    sentinels: dict[str, Any] = {
        "path_params": {"n": 3},
        "query": {"q": 1},
        "headers": [("a", "b")],
        "deadline_ms": 17,
        "window": 18,
        "scope": {"scheme": "https"},
    }
    names = [member.name for member in dataclasses.fields(Header) if member.init]
    header = Header(**{name: sentinels.get(name, f"<{name}>") for name in names})
    assert Header.load(header.dump()) == header


@given(parts)
def test_a_part_is_read_as_it_was_written(part: Part) -> None:
    assert Part.of(part.fields()) == part


@given(parts)
def test_a_reader_without_support_for_parts_refuses_them(part: Part) -> None:
    with pytest.raises(WireError, match="cannot read wire version b'part-1'"):
        Reply.of(part.fields())


@given(st.dictionaries(st.sampled_from(["n", "codec", "sizes", "more", "status", "headers", "later"]), JSON))
def test_a_part_that_cannot_be_read_is_a_wire_error(members: dict[str, Any]) -> None:
    fields = [b"v", b"part-1", b"id", b"a", b"h", json.dumps(members).encode(), b"b", b"abc"]
    with suppress(WireError):
        part = Part.of(fields)
        assert sum(part.sizes) == 3


def test_a_sealed_header_is_written_like_any_other() -> None:
    header = Header(endpoint="e", codec="json", query={})
    assert header.seal().dump() == Header(endpoint="e", codec="json", query={}).dump()
    assert Entry.of(Entry("1", "c", header, b"x").fields()).header == header


@pytest.mark.parametrize("header", [Header(path_params={"n": 1}), Header(query={"q": [1]})])
def test_two_requests_share_no_mutable_value(header: Header) -> None:
    one, other = (Entry.of(Entry(id_, "c", header).fields()).header for id_ in ("1", "2"))
    one.path_params["n"] = 2
    assert isinstance(one.query, str) or one.query["q"].append(2) is None
    assert other == header
