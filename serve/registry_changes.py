"""Changes of the registry: pure functions from the present records to the change, or to an error.

`Registry.change` calls them, and calls them again when another client's change was written first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from ..broker.errors import ConfigError
from ..broker.registry.records import BackendRecord, Change, EndpointRecord, Snapshot
from ..handles.errors import BackendNotFound, EndpointNotFound
from ..proxy.routing import clash
from .validation import check_traffic


def backend_of(snapshot: Snapshot, tag: str) -> BackendRecord:
    try:
        return snapshot.backends[tag]
    except KeyError:
        raise BackendNotFound(tag, snapshot.backends) from None


def endpoint_of(snapshot: Snapshot, name: str) -> EndpointRecord:
    try:
        return snapshot.endpoints[name]
    except KeyError:
        raise EndpointNotFound(name, snapshot.endpoints) from None


def add_backend(snapshot: Snapshot, record: BackendRecord) -> Change:
    if record.tag in snapshot.backends:
        raise ConfigError(f"backend {record.tag!r} already exists; update_backend replaces its code")
    return Change(backends={record.tag: record})


def update_backend(snapshot: Snapshot, tag: str, update: Callable[[BackendRecord], BackendRecord]) -> Change:
    """Return the change to the record that ``update`` returns for the present one, with the next ``config_version``."""
    old = backend_of(snapshot, tag)
    new = update(old)
    if new == old:
        return Change()
    return Change(backends={tag: replace(new, config_version=old.config_version + 1)})


def undo_backend(snapshot: Snapshot, failed: BackendRecord, before: BackendRecord | None) -> Change:
    """Return the change from ``failed`` back to ``before``; none if another client has changed the backend since."""
    if snapshot.backends.get(failed.tag) != failed:
        return Change()
    if before is not None:
        before = replace(before, config_version=failed.config_version + 1)
    return Change(backends={failed.tag: before})


def remove_backend(snapshot: Snapshot, tag: str) -> Change:
    backend_of(snapshot, tag)
    if users := sorted(name for name, endpoint in snapshot.endpoints.items() if tag in _backends_of(endpoint)):
        listed = ", ".join(map(repr, users))
        raise ConfigError(
            f"backend {tag!r} is used by endpoint{'s' * (len(users) > 1)} {listed}: change traffic and shadows first"
        )
    return Change(backends={tag: None})


def add_endpoint(snapshot: Snapshot, new: EndpointRecord) -> Change:
    if new.name in snapshot.endpoints:
        raise ConfigError(f"endpoint {new.name!r} already exists; set_traffic changes its backends")
    for tag in new.traffic:
        backend_of(snapshot, tag)
    if (other := clash(snapshot.endpoints.values(), new)) is not None:
        raise ConfigError(
            f"endpoint {other.name!r} has the route {other.route!r} for {', '.join(other.methods)}; "
            f"endpoint {new.name!r} cannot have {new.route!r} for {', '.join(new.methods)}"
        )
    return Change(endpoints={new.name: new})


def replace_endpoint(snapshot: Snapshot, new: EndpointRecord, kept: Collection[str]) -> Change:
    """Return the change that puts ``new`` in the place of the endpoints that have its name or its route.

    Those of ``kept`` are not replaced: for them it raises as `add_endpoint` does.
    """
    if new.name in kept:
        return add_endpoint(snapshot, new)
    for tag in new.traffic:
        backend_of(snapshot, tag)
    others = {name: endpoint for name, endpoint in snapshot.endpoints.items() if name != new.name}
    replaced: dict[str, EndpointRecord | None] = {}
    while (other := clash(others.values(), new)) is not None:
        if other.name in kept:
            return add_endpoint(replace(snapshot, endpoints=others), new)
        del others[other.name]
        replaced[other.name] = None
    return Change(endpoints={**replaced, new.name: new})


def remove_endpoint(snapshot: Snapshot, name: str) -> Change:
    endpoint_of(snapshot, name)
    return Change(endpoints={name: None})


def set_traffic(snapshot: Snapshot, name: str, traffic: Mapping[str, float]) -> Change:
    endpoint = endpoint_of(snapshot, name)
    return Change(endpoints={name: replace(endpoint, traffic=check_traffic(traffic, snapshot.backends))})


def set_shadow(snapshot: Snapshot, name: str, tag: str, proportion: float) -> Change:
    endpoint = endpoint_of(snapshot, name)
    backend_of(snapshot, tag)
    shadows = {other: share for other, share in endpoint.shadows.items() if other != tag}
    if proportion:
        shadows[tag] = proportion
    return Change(endpoints={name: replace(endpoint, shadows=shadows)})


def _backends_of(endpoint: EndpointRecord) -> Iterable[str]:
    return endpoint.traffic.keys() | endpoint.shadows.keys()
