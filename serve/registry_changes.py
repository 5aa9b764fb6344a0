"""Changes of the registry: pure functions from its records to what is written or refused.

`Registry.change` runs them, and runs them again when somebody else's change came first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from ..broker.errors import ConfigError
from ..broker.registry.records import BackendRecord, Change, EndpointRecord, Snapshot
from ..handles.errors import BackendNotFound, EndpointNotFound
from ..proxy.routing import clash
from .validation import check_traffic


def backend_of(seen: Snapshot, tag: str) -> BackendRecord:
    try:
        return seen.backends[tag]
    except KeyError:
        raise BackendNotFound(tag, seen.backends) from None


def endpoint_of(seen: Snapshot, name: str) -> EndpointRecord:
    try:
        return seen.endpoints[name]
    except KeyError:
        raise EndpointNotFound(name, seen.endpoints) from None


def add_backend(seen: Snapshot, record: BackendRecord) -> Change:
    if record.tag in seen.backends:
        raise ConfigError(f"there is a backend {record.tag!r} already; update_backend replaces it")
    return Change(backends={record.tag: record})


def update_backend(seen: Snapshot, tag: str, update: Callable[[BackendRecord], BackendRecord]) -> Change:
    """``update`` makes the new record of the old one; the ``config_version``, which only ever grows, is set here."""
    old = backend_of(seen, tag)
    new = update(old)
    if new == old:
        return Change()
    return Change(backends={tag: replace(new, config_version=old.config_version + 1)})


def undo_backend(seen: Snapshot, failed: BackendRecord, before: BackendRecord | None) -> Change:
    """Take ``failed`` back, unless somebody has changed it since."""
    if seen.backends.get(failed.tag) != failed:
        return Change()
    if before is not None:
        before = replace(before, config_version=failed.config_version + 1)
    return Change(backends={failed.tag: before})


def remove_backend(seen: Snapshot, tag: str) -> Change:
    backend_of(seen, tag)
    if users := sorted(name for name, endpoint in seen.endpoints.items() if tag in _backends_of(endpoint)):
        listed = ", ".join(map(repr, users))
        raise ConfigError(f"the backend {tag!r} is in use by {listed}: change their traffic and shadows first")
    return Change(backends={tag: None})


def add_endpoint(seen: Snapshot, new: EndpointRecord) -> Change:
    if new.name in seen.endpoints:
        raise ConfigError(f"there is an endpoint {new.name!r} already")
    for tag in new.traffic:
        backend_of(seen, tag)
    if (other := clash(seen.endpoints.values(), new)) is not None:
        raise ConfigError(
            f"the endpoint {other.name!r} has the route {other.route!r} for {', '.join(other.methods)}; "
            f"{new.name!r} cannot have {new.route!r} for {', '.join(new.methods)}"
        )
    return Change(endpoints={new.name: new})


def remove_endpoint(seen: Snapshot, name: str) -> Change:
    endpoint_of(seen, name)
    return Change(endpoints={name: None})


def set_traffic(seen: Snapshot, name: str, traffic: Mapping[str, float]) -> Change:
    endpoint = endpoint_of(seen, name)
    return Change(endpoints={name: replace(endpoint, traffic=check_traffic(traffic, seen.backends))})


def set_shadow(seen: Snapshot, name: str, tag: str, proportion: float) -> Change:
    endpoint = endpoint_of(seen, name)
    backend_of(seen, tag)
    shadows = {other: share for other, share in endpoint.shadows.items() if other != tag}
    if proportion:
        shadows[tag] = proportion
    return Change(endpoints={name: replace(endpoint, shadows=shadows)})


def _backends_of(endpoint: EndpointRecord) -> Iterable[str]:
    return endpoint.traffic.keys() | endpoint.shadows.keys()
