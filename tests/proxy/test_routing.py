import uuid
from collections.abc import Iterable

import pytest
from hypothesis import given, strategies as st
from starlette.routing import Match as StarletteMatch, Route, compile_path as starlette_compile

from penstock.broker.errors import ConfigError
from penstock.broker.registry.records import EndpointRecord
from penstock.proxy.routing import (
    MethodNotAllowed,
    NotFound,
    RouteMatch,
    Routes,
    check_route,
    clash,
    methods_of,
    mount_of,
    shape,
    specificity,
)


def endpoint(route: str | None, *methods: str, name: str = "") -> EndpointRecord:
    return EndpointRecord(name=name or f"{route}", route=route, methods=methods or ("GET",))


def routes(*of: str) -> Routes:
    return Routes(endpoint(route) for route in of)


def found(match: object) -> RouteMatch:
    assert isinstance(match, RouteMatch), match
    return match


class TestParameters:
    def test_parameters_have_the_types_of_their_convertors(self) -> None:
        params = found(routes("/api/{user_id:int}/{number:float}").match("GET", "/api/123/3.14")).params
        assert params == {"user_id": 123, "number": 3.14}
        assert {name: type(value) for name, value in params.items()} == {"user_id": int, "number": float}

    def test_a_float_may_look_like_an_int(self) -> None:
        params = found(routes("/{x:float}").match("GET", "/3")).params
        assert params == {"x": 3.0}
        assert type(params["x"]) is float

    def test_a_value_that_does_not_convert_does_not_match(self) -> None:
        assert isinstance(routes("/api/{user_id:int}/{number:float}").match("GET", "/api/abc/3.14"), NotFound)

    def test_parameters_without_a_convertor_are_strings_of_one_segment(self) -> None:
        users = routes("/api/{username}")
        assert found(users.match("GET", "/api/123")).params == {"username": "123"}
        assert isinstance(users.match("GET", "/api/"), NotFound)
        assert isinstance(users.match("GET", "/api/a/b"), NotFound)

    def test_a_uuid_parameter_is_a_uuid(self) -> None:
        of = uuid.uuid4()
        assert found(routes("/{of:uuid}").match("GET", f"/{of}")).params == {"of": of}

    def test_a_path_parameter_may_have_slashes_and_be_empty(self) -> None:
        files = routes("/files/{rest:path}")
        assert found(files.match("GET", "/files/a/b.txt")).params == {"rest": "a/b.txt"}
        assert found(files.match("GET", "/files/")).params == {"rest": ""}

    @pytest.mark.parametrize("name", ["grüße", "日本", "a b", "100%", "..", "\u202e", "☃" * 100])
    def test_parameters_may_contain_any_character(self, name: str) -> None:
        assert found(routes("/{name}").match("GET", f"/{name}")).params == {"name": name}

    def test_an_int_may_have_any_size_that_python_parses(self) -> None:
        big = routes("/{n:int}")
        assert found(big.match("GET", "/" + "9" * 4300)).params == {"n": 10**4300 - 1}
        assert isinstance(big.match("GET", "/" + "9" * 4301), NotFound)

    def test_only_ascii_digits_are_digits(self) -> None:
        assert isinstance(routes("/{n:int}").match("GET", "/١٢"), NotFound)

    def test_a_line_feed_at_the_end_is_part_of_the_path(self) -> None:
        assert isinstance(routes("/{n:int}", "/a").match("GET", "/12\n"), NotFound)
        assert isinstance(routes("/{n:int}", "/a").match("GET", "/a\n"), NotFound)


class TestMethods:
    def test_another_method_gets_the_allowed_ones(self) -> None:
        assert routes("/a").match("POST", "/a") == MethodNotAllowed(("GET", "HEAD"))

    def test_get_includes_head(self) -> None:
        assert found(routes("/a").match("HEAD", "/a")).endpoint.name == "/a"
        only_post = Routes([endpoint("/a", "POST")])
        assert only_post.match("HEAD", "/a") == MethodNotAllowed(("POST",))

    def test_options_is_refused_unless_an_endpoint_allows_it(self) -> None:
        assert routes("/{a}").match("OPTIONS", "/a") == MethodNotAllowed(("GET", "HEAD"))
        takes = Routes([endpoint("/a", "options")])
        assert found(takes.match("OPTIONS", "/a")).endpoint.name == "/a"

    def test_endpoints_may_share_a_route_with_methods_of_their_own(self) -> None:
        both = Routes([endpoint("/a/{x}", "GET", name="read"), endpoint("/a/{y}", "put", name="write")])
        assert found(both.match("GET", "/a/1")) == (both.match("GET", "/a/1")[0], {"x": "1"})
        assert found(both.match("PUT", "/a/1")).params == {"y": "1"}
        assert both.match("POST", "/a/1") == MethodNotAllowed(("GET", "HEAD", "PUT"))

    def test_a_method_that_a_specific_route_lacks_goes_to_the_next_matching_route(self) -> None:
        both = Routes([endpoint("/a/me", "GET", name="me"), endpoint("/a/{x}", "POST", name="any")])
        assert found(both.match("POST", "/a/me")).endpoint.name == "any"
        assert found(both.match("GET", "/a/me")).endpoint.name == "me"
        assert both.match("PUT", "/a/me") == MethodNotAllowed(("GET", "HEAD", "POST"))


class TestOrder:
    @pytest.mark.parametrize(
        ("path", "wins"),
        [
            ("/users/me", "/users/me"),
            ("/users/7", "/users/{id:int}"),
            ("/users/7.5", "/users/{x:float}"),
            ("/users/5f0c2d6e-0b1a-4c3d-8e9f-000000000000", "/users/{u:uuid}"),
            ("/users/u7", "/users/u{n}"),
            ("/users/anna", "/users/{name}"),
            ("/users/anna/posts", "/users/{name}/posts"),
            ("/users/anna/files", "/users/{rest:path}"),
            ("/other", "/{rest:path}"),
            ("/", "/{rest:path}"),
        ],
    )
    def test_the_most_specific_route_wins(self, path: str, wins: str) -> None:
        of = [
            "/{rest:path}",
            "/users/{rest:path}",
            "/users/{name}",
            "/users/{name}/posts",
            "/users/u{n}",
            "/users/{x:float}",
            "/users/{id:int}",
            "/users/{u:uuid}",
            "/users/me",
        ]
        for order in (of, of[::-1]):
            assert found(routes(*order).match("GET", path)).endpoint.route == wins

    def test_literal_text_at_the_beginning_precedes_literal_text_at_the_end(self) -> None:
        assert found(routes("/{x}/b", "/a/{y}").match("GET", "/a/b")).endpoint.route == "/a/{y}"


class TestSlashes:
    def test_a_path_that_differs_by_its_last_slash_is_redirected(self) -> None:
        assert routes("/a/{n:int}", "/b/").match("GET", "/a/1/") == NotFound("/a/1")
        assert routes("/a/{n:int}", "/b/").match("POST", "/b") == NotFound("/b/")
        assert routes("/a").match("GET", "/b/") == NotFound(None)

    def test_no_redirect_leads_to_another_host(self) -> None:
        assert routes("/{rest:path}/end").match("GET", "//example.com/end/") == NotFound(None)


class TestValidRoutes:
    @pytest.mark.parametrize("route", ["/", "/a", "/a/", "/{x}", "/{x:path}", "/é/{x_1:int}.json", "/-", "/a b"])
    def test_these_routes_are_valid(self, route: str) -> None:
        assert check_route(route) == route

    @pytest.mark.parametrize(
        ("route", "because"),
        [
            ("", "must begin with '/'"),
            ("a", "must begin with '/'"),
            ("/{x:nosuch}", "'nosuch'; the convertors are float, int, path, str, uuid"),
            ("/{x}/{x}", "'x' twice"),
            ("/{x-y}", "brace"),
            ("/{x", "brace"),
            ("/{}", "brace"),
            ("/a?b=1", "'?'"),
            ("/a#b", "'#'"),
            ("/a\n", "printable"),
            ("/\udc80", "printable"),
            ("/-/healthz", "'/-/'"),
        ],
    )
    def test_these_routes_are_invalid(self, route: str, because: str) -> None:
        with pytest.raises(ConfigError) as raised:
            check_route(route)
        assert repr(route) in str(raised.value)
        assert because in str(raised.value)

    @pytest.mark.parametrize("route", [None, 1, b"/a"])
    def test_a_route_is_a_string(self, route: object) -> None:
        with pytest.raises(TypeError, match=type(route).__name__):
            check_route(route)

    def test_an_invalid_record_harms_no_other_endpoint(self) -> None:
        some = Routes([endpoint("/{x:nosuch}", name="bad"), endpoint("/a", name="good"), endpoint(None, name="none")])
        assert some.listing() == {"/a": {"endpoint": "good", "methods": ["GET", "HEAD"]}}


class TestMounts:
    @pytest.mark.parametrize(
        ("route", "name"),
        [
            ("/{path:path}", "path"),
            ("/api/{tenant}/{rest:path}", "rest"),
            ("/api/{rest}", ""),
            ("/api/x{rest:path}", ""),
            ("/{rest:path}/x", ""),
            ("/api", ""),
        ],
    )
    def test_a_route_mounts_by_a_path_parameter_of_its_own_at_the_end(self, route: str, name: str) -> None:
        assert mount_of(route) == name


class TestClashes:
    def test_routes_with_a_common_method_clash(self) -> None:
        there = [endpoint("/a", "GET", name="one"), endpoint("/b", "GET", "POST", name="two")]
        assert clash(there, endpoint("/b", "post", "PUT", name="new")) is there[1]
        assert clash(there, endpoint("/a", "POST", name="new")) is None
        assert clash(there, endpoint("/c", name="new")) is None
        assert clash(there, endpoint(None, name="new")) is None

    def test_names_of_parameters_do_not_matter_but_convertors_do(self) -> None:
        there = [endpoint("/a/{x:int}/{y}", name="one")]
        assert clash(there, endpoint("/a/{n:int}/{m:str}", name="new")) is there[0]
        assert clash(there, endpoint("/a/{x}/{y}", name="new")) is None

    def test_get_clashes_with_head(self) -> None:
        there = [endpoint("/a", "GET", name="one")]
        assert clash(there, endpoint("/a", "HEAD", name="new")) is there[0]

    def test_an_endpoint_does_not_clash_with_itself(self) -> None:
        assert clash([endpoint("/a", name="one")], endpoint("/a", name="one")) is None


def test_endpoints_that_share_a_route_are_all_listed() -> None:
    both = Routes([endpoint("/a", "GET", name="read"), endpoint("/a", "POST", name="write")])
    assert both.listing() == {
        "/a": {
            "endpoint": "read",
            "methods": ["GET", "HEAD"],
            "also": [{"endpoint": "write", "methods": ["POST"]}],
        }
    }


# Segments as lists of parts: literal text, or the name of a convertor.
_LITERALS = st.sampled_from(["a", "b", "1", "2.5", "x-"])
_CONVERTORS = st.sampled_from(["{int}", "{float}", "{str}", "{uuid}"])
_SEGMENTS = st.lists(st.one_of(_LITERALS, _CONVERTORS), min_size=1, max_size=3)
Parts = list[list[str]]
_SAMPLES = {
    "{int}": st.integers(0, 10**30).map(str),
    "{float}": st.floats(0, 1e9).map(lambda x: f"{x:.3f}"),
    "{uuid}": st.uuids().map(str),
    "{str}": st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1),
    "{path}": st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"])),
}


@st.composite
def patterns(draw: st.DrawFn) -> Parts:
    segments = draw(st.lists(_SEGMENTS, min_size=1, max_size=4))
    if draw(st.booleans()):
        segments[draw(st.integers(0, len(segments) - 1))] = ["{path}"]
    return segments


def spelled(parts: Parts, prefix: str = "p") -> str:
    """Return a pattern as a route, with a name for each parameter."""
    number = 0
    route = ""
    for segment in parts:
        route += "/"
        for part in segment:
            if part.startswith("{"):
                number += 1
                part = f"{{{prefix}{number}:{part[1:-1]}}}"
            route += part
    return route


@st.composite
def paths(draw: st.DrawFn, parts: Parts) -> str:
    """Draw a path that the pattern matches."""
    return "".join(
        "/" + "".join(draw(_SAMPLES[part]) if part.startswith("{") else part for part in segment) for segment in parts
    )


_WIDER = {"{int}": ["{float}", "{str}"], "{float}": ["{str}"], "{uuid}": ["{str}"], "{str}": []}


@st.composite
def widened(draw: st.DrawFn, parts: Parts) -> Parts:
    """Draw a pattern that matches every path of ``parts``, and others."""
    segments = [list(segment) for segment in parts]
    at = draw(st.integers(0, len(segments) - 1))
    wide = draw(st.sampled_from(["part", "segment", "rest"]))
    if wide == "rest":
        return [*segments[:at], ["{path}"]]
    if "{path}" in segments[at]:
        return segments
    if wide == "segment":
        segments[at] = ["{str}"]
        return segments
    where = draw(st.integers(0, len(segments[at]) - 1))
    part = segments[at][where]
    if options := _WIDER.get(part, ["{str}"]):
        segments[at][where] = draw(st.sampled_from(options))
    return segments


@given(st.data())
def test_a_path_made_from_a_pattern_matches_it_as_in_starlette(data: st.DataObject) -> None:
    parts = data.draw(patterns())
    route, path = spelled(parts), data.draw(paths(parts))
    ours = routes(route).match("GET", path)

    async def app(_: object) -> None: ...

    match, scope = Route(route, app).matches({"type": "http", "method": "GET", "path": path})
    assert match is StarletteMatch.FULL
    assert found(ours).params == scope["path_params"]


@given(st.data())
def test_a_narrower_route_is_never_hidden_by_a_wider_one(data: st.DataObject) -> None:
    narrow = data.draw(patterns())
    wide = data.draw(widened(narrow))
    if shape(spelled(wide)) == shape(spelled(narrow)):
        return
    assert specificity(spelled(narrow)) < specificity(spelled(wide))
    both = Routes([endpoint(spelled(wide), name="wide"), endpoint(spelled(narrow), name="narrow")])
    assert found(both.match("GET", data.draw(paths(narrow)))).endpoint.name == "narrow"


def _any_order(of: Iterable[EndpointRecord]) -> st.SearchStrategy[list[EndpointRecord]]:
    return st.permutations(list(of))


@given(st.data())
def test_routes_that_follow_changes_are_those_of_the_last_snapshot(data: st.DataObject) -> None:
    some = data.draw(st.lists(patterns(), min_size=1, max_size=4))
    spellings = st.none() | st.sampled_from([*map(spelled, some), "/literal", "/{x:nosuch}"])
    methods = st.sampled_from([("GET",), ("POST",), ("GET", "POST")])
    snapshot: dict[str, EndpointRecord] = {}
    followed = Routes()
    for _ in range(data.draw(st.integers(1, 5))):
        changes = data.draw(st.dictionaries(st.sampled_from("abcd"), st.none() | st.tuples(spellings, methods)))
        snapshot = {name: one for name, one in snapshot.items() if name not in changes}
        for name, change in changes.items():
            if change is not None:
                snapshot[name] = EndpointRecord(name=name, route=change[0], methods=change[1])
        followed = Routes(snapshot.values(), followed)
    whole = Routes(snapshot.values())
    assert followed.listing() == whole.listing()
    for path in ("/literal", *(data.draw(paths(parts)) for parts in some)):
        for method in ("GET", "POST", "PUT"):
            assert followed.match(method, path) == whole.match(method, path)


def test_a_route_that_did_not_change_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def compile_path(path: str) -> object:
        compiled.append(path)
        return starlette_compile(path)

    monkeypatch.setattr("penstock.proxy.routing.compile_path", compile_path)
    before = {name: endpoint(f"/{name}/{{x}}", name=name) for name in "abc"}
    first = Routes(before.values())
    after = {**before, "b": endpoint("/other/{x}", name="b")}
    assert found(Routes(after.values(), first).match("GET", "/other/1")).endpoint.name == "b"
    assert compiled == ["/a/{x}", "/b/{x}", "/c/{x}", "/other/{x}"]


@given(st.data())
def test_the_order_of_creation_does_not_matter(data: st.DataObject) -> None:
    some = data.draw(st.lists(patterns(), min_size=1, max_size=4))
    of = [endpoint(spelled(parts), name=f"e{n}") for n, parts in enumerate(some)]
    path = data.draw(paths(some[0]))
    matches = {found(Routes(data.draw(_any_order(of))).match("GET", path)).endpoint.name for _ in range(3)}
    assert len(matches) == 1


@given(st.data())
def test_routes_of_the_same_shape_clash(data: st.DataObject) -> None:
    parts = data.draw(patterns())
    one, other = endpoint(spelled(parts, "p"), name="one"), endpoint(spelled(parts, "q"), name="other")
    assert clash([one], other) is one


@given(st.lists(st.sampled_from(["get", "GET", "Post", "DELETE"]), min_size=1))
def test_methods_are_case_insensitive(methods: list[str]) -> None:
    assert all(method.isupper() for method in methods_of(endpoint("/a", *methods)))
