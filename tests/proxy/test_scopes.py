"""The ASGI scope in a replica is the one that the proxy's application saw."""

import datetime
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import pytest
from hypothesis import given, strategies as st
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.broker.wire.requests import Entry, Header
from penstock.proxy.scopes import carried
from penstock.workers.executing.request import Request
from tests.proxy.site import WAYS, Site, running, text

SEEN = ("scheme", "http_version", "root_path", "path", "raw_path", "query_string", "client", "server", "state")


class Edits:
    """Edits scopes, and records those that the application then gets."""

    def __init__(self, app: ASGIApp, edit: Callable[[Scope], object], seen: list[Scope]) -> None:
        self.app, self.edit, self.seen = app, edit, seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.edit(scope)
        self.seen.append({name: scope[name] for name in SEEN})
        await self.app(scope, receive, send)


def edited(url: str, edit: Callable[[Scope], object], seen: list[Scope]) -> AbstractAsyncContextManager[Site]:
    return running(url, way="direct", middlewares=(Middleware(Edits, edit=edit, seen=seen),))


def arrived(site: Site) -> Mapping[str, Any]:
    """Return the scope that code in a replica gets for the last request."""
    entry = Entry.of(site.started[-1].fields())
    scope = Request(entry).scope
    return {name: scope[name] for name in SEEN}


def nothing(scope: Scope) -> None: ...


EDITS: dict[str, Callable[[Scope], object]] = {
    "nothing": nothing,
    "scheme": lambda scope: scope.update(scheme="https"),
    "client": lambda scope: scope.update(client=("2001:db8::7", 0)),
    "client without a port": lambda scope: scope.update(client=("192.0.2.7", None)),
    "server": lambda scope: scope.update(server=("api.example.org", 443)),
    "socket": lambda scope: scope.update(server=("/run/penstock.sock", None)),
    "root path": lambda scope: scope.update(root_path="/tenant"),
    "path": lambda scope: scope.update(path="/s/é %", raw_path=b"/s/%C3%A9%20%25"),
    "raw path": lambda scope: scope.update(raw_path=b"/s/%78"),
    "http version": lambda scope: scope.update(http_version="2"),
    "state": lambda scope: scope["state"].update(user={"name": "Ada", "roles": ["a", 1, 2.5, None, True]}),
    "all": lambda scope: scope.update(
        scheme="https", client=("192.0.2.7", 1), server=("x", 1), root_path="/t", state={"a": {"b": [1]}}
    ),
}


@pytest.mark.parametrize("what", EDITS)
@pytest.mark.parametrize("path", ["/s/x?a=1&b=%20", "/s/%C3%A9%2F%25?", "/s/a%7Cb|c;d=1,2"])
async def test_a_scope_arrives_as_the_application_saw_it(redis_url: str, what: str, path: str) -> None:
    seen: list[Scope] = []
    async with edited(redis_url, EDITS[what], seen) as site:
        await site.endpoint("/s/{rest:path}", text("fine"))
        for host in ({}, {"host": "www.example.org"}):
            response = await site.http.get(path, headers=host)
            assert response.text == "fine"
            assert arrived(site) == seen[-1]


async def test_a_plain_request_carries_no_members_of_its_scope(redis_url: str) -> None:
    async with running(redis_url, way="direct") as site:
        await site.endpoint("/hello/{name}", text("fine"))
        for _ in range(2):
            assert (await site.http.get("/hello/ada?a=%20", headers={"x-a": "1"})).text == "fine"
        assert [entry.header.scope for entry in site.started] == [None, None]
        assert b'"scope"' not in site.started[-1].header.dump()


async def test_members_of_the_state_that_are_json_arrive(redis_url: str) -> None:
    def note(scope: Scope) -> None:
        scope["state"] |= {
            "user": "Ada",
            "limits": {"n": 1},
            "since": datetime.datetime(2026, 1, 1),
            "session": object(),
            "numbered": {1: 2},
            "huge": 2**70,
            "nan": float("nan"),
            "lone": "\ud800",
            "roles": ("a", "b"),
        }

    async with edited(redis_url, note, []) as site:
        await site.endpoint("/", text("fine"))
        assert (await site.http.get("/")).text == "fine"
        assert arrived(site)["state"] == {"user": "Ada", "limits": {"n": 1}}


async def test_requests_that_share_a_header_do_not_share_their_state(redis_url: str) -> None:
    raw = Header(scope={"state": {"seen": []}}).dump()
    first, second = (Request(Entry.of({b"v": b"1", b"id": b"i", b"by": b"c", b"h": raw})) for _ in range(2))
    first.state.seen.append(1)
    assert second.state.seen == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prefix", ["", "/api/é"])
async def test_the_scope_has_the_root_path_of_the_options(redis_url: str, way: str, prefix: str) -> None:
    """Whether a gateway in front of the proxy strips the prefix or leaves it."""
    async with running(redis_url, way=way, root_path="/api/é") as site:
        await site.endpoint("/hello/{name}", text("fine"))
        assert (await site.http.get(f"{prefix}/hello/a%20b")).text == "fine"
        scope = arrived(site)
        assert (scope["root_path"], scope["path"]) == ("/api/é", "/api/é/hello/a b")
        assert scope["raw_path"] == b"/api/%C3%A9/hello/a%20b"


async def test_urls_of_a_request_behind_tls_are_https(redis_url: str) -> None:
    async with edited(redis_url, EDITS["scheme"], []) as site:
        await site.endpoint("/", text("fine"))
        response: httpx.Response = await site.http.get("/", headers={"host": "www.example.org"})
        assert response.text == "fine"
        assert str(Request(Entry.of(site.started[-1].fields())).url) == "https://www.example.org/"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
members = st.sampled_from(["scheme", "http_version", "root_path", "raw_path", "client", "server", "state", "later"])


@given(st.dictionaries(members, json_values))
def test_any_carried_members_make_a_valid_scope(carried_members: dict[str, Any]) -> None:
    scope = Request(Entry("1", "", Header(client="192.0.2.7:1", scope=carried_members))).scope
    assert isinstance(scope["scheme"], str)
    assert isinstance(scope["raw_path"], bytes)
    assert isinstance(scope["state"], dict)
    assert "later" not in scope


@given(
    st.fixed_dictionaries(
        {"path": st.just("/")},
        optional={
            "state": st.dictionaries(st.text(max_size=3), json_values, max_size=3),
            "scheme": st.sampled_from(["http", "https"]),
            "server": st.just(["127.0.0.1", 80]) | st.just(("::1", 80)) | st.none(),
            "client": st.just(["127.0.0.1", 80]) | st.none(),
        },
    )
)
def test_an_incomplete_scope_is_carried_as_far_as_possible(scope: Scope) -> None:
    carried_members = carried(scope, b"127.0.0.1:80", "/", "")
    assert carried_members is None or set(carried_members) <= {"state", "scheme", "server"}
    Header(scope=carried_members).dump()
