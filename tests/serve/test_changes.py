from collections.abc import Callable

import pytest

from penstock.broker.registry.records import BackendRecord, Change, EndpointRecord, Snapshot
from penstock.handles.errors import BackendNotFound, ConfigError, EndpointNotFound
from penstock.serve.registry_changes import (
    add_backend,
    add_endpoint,
    remove_backend,
    remove_endpoint,
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


def test_an_update_counts_the_configuration_up() -> None:
    change = update_backend(SEEN, "f", lambda _: backend(version="v2"))
    assert change == Change(backends={"f": backend(version="v2", config_version=2)})


def test_an_update_that_changes_nothing_writes_nothing() -> None:
    assert update_backend(SEEN, "f", lambda old: old) == Change()


def test_what_failed_is_taken_back_and_the_configuration_counts_on() -> None:
    seen = Snapshot(8, {"f": backend(version="v2", config_version=2)})
    assert undo_backend(seen, backend(version="v2", config_version=2), backend()) == Change(
        backends={"f": backend(version="v1", config_version=3)}
    )
    assert undo_backend(seen, backend(version="v2", config_version=2), None) == Change(backends={"f": None})


def test_what_somebody_else_has_changed_since_is_not_taken_back() -> None:
    seen = Snapshot(8, {"f": backend(version="v3", config_version=3)})
    assert undo_backend(seen, backend(version="v2", config_version=2), backend()) == Change()
    assert undo_backend(Snapshot(9), backend(version="v2", config_version=2), backend()) == Change()


def test_a_backend_that_nobody_uses_is_removed() -> None:
    assert remove_backend(SEEN, "g") == Change(backends={"g": None})


def test_an_endpoint_is_added_with_all_its_traffic_to_one_backend() -> None:
    new = endpoint("other", "/other")
    assert add_endpoint(SEEN, new) == Change(endpoints={"other": new})


def test_a_route_may_be_shared_with_other_methods_or_without_a_route() -> None:
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
        (lambda: add_backend(SEEN, backend("f")), ConfigError, "there is a backend 'f' already"),
        (lambda: update_backend(SEEN, "x", lambda old: old), BackendNotFound, "no backend 'x'"),
        (lambda: remove_backend(SEEN, "x"), BackendNotFound, "no backend 'x'; this instance has 'f', 'g', 'h'"),
        (lambda: remove_backend(SEEN, "f"), ConfigError, "the backend 'f' is in use by 'api'"),
        (lambda: remove_backend(SEEN, "h"), ConfigError, "the backend 'h' is in use by 'api'"),
        (lambda: add_endpoint(SEEN, endpoint("api", None)), ConfigError, "there is an endpoint 'api' already"),
        (
            lambda: add_endpoint(SEEN, endpoint("b", "/api/{y}")),
            ConfigError,
            "the endpoint 'api' has the route '/api/{x}' for GET; 'b' cannot have '/api/{y}' for GET",
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
def test_what_cannot_be_changed_raises_and_names_it(
    change: Callable[[], Change], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind) as raised:
        change()
    assert says in str(raised.value)
