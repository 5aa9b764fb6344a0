from collections.abc import Callable

import pytest

from penstock.broker.registry.records import BackendRecord, Change, EndpointRecord, Snapshot
from penstock.handles.errors import BackendNotFound, ConfigError, EndpointNotFound
from penstock.serve.registry_changes import (
    add_backend,
    add_endpoint,
    remove_backend,
    remove_endpoint,
    replace_endpoint,
    set_shadow,
    set_traffic,
    undo_backend,
    update_backend,
)


def backend(tag: str = "f", version: str = "v1", config_version: int = 1) -> BackendRecord:
    return BackendRecord(tag=tag, version=version, code="digest", config_version=config_version)


def endpoint(name: str = "api", route: str | None = "/api/{x}", methods: tuple[str, ...] = ("GET",)) -> EndpointRecord:
    return EndpointRecord(name=name, route=route, methods=methods, traffic={"f": 1.0}, shadows={"h": 0.5})


SEEN = Snapshot(7, {tag: backend(tag) for tag in "fgh"}, {"api": endpoint()})


def test_a_new_backend_is_added() -> None:
    assert add_backend(SEEN, backend("new")) == Change(backends={"new": backend("new")})


def test_an_update_increments_the_version_of_the_configuration() -> None:
    change = update_backend(SEEN, "f", lambda _: backend(version="v2"))
    assert change == Change(backends={"f": backend(version="v2", config_version=2)})


def test_an_update_that_changes_nothing_writes_nothing() -> None:
    assert update_backend(SEEN, "f", lambda old: old) == Change()


def test_a_failed_change_is_undone_with_the_next_version_of_the_configuration() -> None:
    seen = Snapshot(8, {"f": backend(version="v2", config_version=2)})
    assert undo_backend(seen, backend(version="v2", config_version=2), backend()) == Change(
        backends={"f": backend(version="v1", config_version=3)}
    )
    assert undo_backend(seen, backend(version="v2", config_version=2), None) == Change(backends={"f": None})


def test_a_change_is_not_undone_after_another_client_changed_the_backend() -> None:
    seen = Snapshot(8, {"f": backend(version="v3", config_version=3)})
    assert undo_backend(seen, backend(version="v2", config_version=2), backend()) == Change()
    assert undo_backend(Snapshot(9), backend(version="v2", config_version=2), backend()) == Change()


def test_a_reload_replaces_the_endpoint_of_the_same_name_or_route() -> None:
    assert replace_endpoint(SEEN, endpoint(route="/new"), ()) == Change(endpoints={"api": endpoint(route="/new")})
    renamed = endpoint("renamed")
    assert replace_endpoint(SEEN, renamed, ()) == Change(endpoints={"api": None, "renamed": renamed})


def test_a_reload_does_not_replace_the_endpoints_that_it_has_made() -> None:
    with pytest.raises(ConfigError, match="endpoint 'api' already exists"):
        replace_endpoint(SEEN, endpoint(), {"api"})
    with pytest.raises(ConfigError, match="endpoint 'api' has the route"):
        replace_endpoint(SEEN, endpoint("other"), {"api"})
    with pytest.raises(BackendNotFound):
        replace_endpoint(Snapshot(1), endpoint(), ())


def test_a_backend_that_no_endpoint_uses_is_removed() -> None:
    assert remove_backend(SEEN, "g") == Change(backends={"g": None})


def test_an_endpoint_is_added_with_all_its_traffic_to_one_backend() -> None:
    new = endpoint("other", "/other")
    assert add_endpoint(SEEN, new) == Change(endpoints={"other": new})


def test_endpoints_may_share_a_route_with_different_methods_or_have_none() -> None:
    for new in (endpoint("b", "/api/{y}", ("POST",)), endpoint("b", None), endpoint("b", "/api/{x:int}")):
        assert add_endpoint(SEEN, new).endpoints == {"b": new}


def test_traffic_and_shadows_are_replaced() -> None:
    assert set_traffic(SEEN, "api", {"f": 0.25, "g": 0.75}).endpoints["api"] == EndpointRecord(
        name="api", route="/api/{x}", traffic={"f": 0.25, "g": 0.75}, shadows={"h": 0.5}
    )
    changed = set_shadow(SEEN, "api", "g", 1.0).endpoints["api"]
    assert changed is not None
    assert changed.shadows == {"h": 0.5, "g": 1.0}
    changed = set_shadow(SEEN, "api", "h", 0.0).endpoints["api"]
    assert changed is not None
    assert changed.shadows == {}


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (lambda: add_backend(SEEN, backend("f")), ConfigError, "backend 'f' already exists"),
        (lambda: update_backend(SEEN, "x", lambda old: old), BackendNotFound, "no backend 'x'"),
        (lambda: remove_backend(SEEN, "x"), BackendNotFound, "no backend 'x'; this instance has 'f', 'g', 'h'"),
        (lambda: remove_backend(SEEN, "f"), ConfigError, "backend 'f' is used by endpoint 'api'"),
        (lambda: remove_backend(SEEN, "h"), ConfigError, "backend 'h' is used by endpoint 'api'"),
        (lambda: add_endpoint(SEEN, endpoint("api", None)), ConfigError, "endpoint 'api' already exists"),
        (
            lambda: add_endpoint(SEEN, endpoint("b", "/api/{y}")),
            ConfigError,
            "endpoint 'api' has the route '/api/{x}' for GET; endpoint 'b' cannot have '/api/{y}' for GET",
        ),
        (
            lambda: add_endpoint(SEEN, EndpointRecord(name="b", traffic={"x": 1.0})),
            BackendNotFound,
            "no backend 'x'",
        ),
        (lambda: remove_endpoint(SEEN, "x"), EndpointNotFound, "no endpoint 'x'; this instance has 'api'"),
        (lambda: set_traffic(SEEN, "x", {"f": 1}), EndpointNotFound, "no endpoint 'x'"),
        (lambda: set_traffic(SEEN, "api", {"x": 1}), BackendNotFound, "no backend 'x'"),
        (lambda: set_traffic(SEEN, "api", {"f": 0.5}), ConfigError, "they sum to 0.5"),
        (lambda: set_shadow(SEEN, "api", "x", 1.0), BackendNotFound, "no backend 'x'"),
    ],
)
def test_an_invalid_change_raises_and_names_the_thing(
    change: Callable[[], Change], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind) as raised:
        change()
    assert says in str(raised.value)
