"""The difference between a manifest and the deployed state, as a list of changes. Pure."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from io import BytesIO
from types import MappingProxyType
from typing import Any, Literal, NoReturn

from ...broker.registry.records import BackendRecord, Snapshot
from ..config import BackendConfig
from ..status.status import plural
from .manifest import DeclaredBackend, Manifest
from .sources import LocalCode


@dataclass(frozen=True, slots=True)
class ManifestChange:
    """One change between the deployed state and a manifest."""

    verb: Literal["create", "update", "configure", "delete"]
    """``update`` replaces the replicas; ``configure`` reconfigures them while they run."""
    kind: Literal["backend", "endpoint"]
    name: str
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        details = f": {'; '.join(self.details)}" if self.details else ""
        return f"{self.verb} {self.kind} {self.name}{details}"


def diff(
    manifest: Manifest,
    deployed: Snapshot,
    codes: Mapping[str, bytes],
    *,
    local: Mapping[str, LocalCode] = MappingProxyType({}),
    restart: Collection[str] = (),
    prune: bool = False,
) -> list[ManifestChange]:
    """Return the changes from the deployed state to ``manifest``; none if they agree.

    Args:
        manifest: the declared backends and endpoints.
        deployed: the deployed records.
        codes: the pickled code of the deployed backends, by tag.
        local: the code that this machine has of deployed backends, by tag.
        restart: the tags of backends whose replicas are replaced in any case.
        prune: also delete the backends and endpoints that the manifest does not declare.
    """
    changes: list[ManifestChange] = []
    for tag, backend in manifest.backends.items():
        record = deployed.backends.get(tag)
        if record is None:
            details = (f"{backend.target}, {plural(backend.config.spec().initial_replicas, 'replica')}",)
            changes.append(ManifestChange("create", "backend", tag, details))
            continue
        rolled = _rolled(backend, record, codes.get(tag))
        if tag in local:
            rolled += tuple(local[tag].changes(record))
        if tag in restart and not rolled:
            rolled = ("restart",)
        configured = _configured(backend.config, record)
        if rolled:
            changes.append(ManifestChange("update", "backend", tag, (*rolled, *configured)))
        elif configured:
            changes.append(ManifestChange("configure", "backend", tag, configured))
    for name, endpoint in manifest.endpoints.items():
        old = deployed.endpoints.get(name)
        if old is None:
            details = (f"{' '.join(endpoint.methods)} {endpoint.route}" if endpoint.route else "for handles only",)
            changes.append(ManifestChange("create", "endpoint", name, details))
        elif old != endpoint:
            differences = tuple(
                f"{field} {_shown(getattr(old, field))} -> {_shown(getattr(endpoint, field))}"
                for field in ("route", "methods", "call_methods", "traffic", "shadows")
                if getattr(old, field) != getattr(endpoint, field)
            )
            changes.append(ManifestChange("update", "endpoint", name, differences))
    if prune:
        changes += [
            ManifestChange("delete", "endpoint", name) for name in deployed.endpoints if name not in manifest.endpoints
        ]
        changes += [
            ManifestChange("delete", "backend", tag) for tag in deployed.backends if tag not in manifest.backends
        ]
    return changes


def _rolled(backend: DeclaredBackend, record: BackendRecord, code: bytes | None) -> tuple[str, ...]:
    """Return the differences for which the replicas must be replaced."""
    reasons: list[str] = []
    present = None if code is None else _load_plain(code)
    if present is None:
        reasons.append(f"the code becomes {backend.target}")
    elif present != backend.code:
        reasons.append(_replaced(present, backend.code))
    if backend.actor_options != record.actor_options:
        reasons.append(f"ray_actor_options {_shown(record.actor_options)} -> {_shown(backend.actor_options)}")
    if (backend.runtime_env or None) != (record.runtime_env or None):
        reasons.append("runtime_env")
    return tuple(reasons)


def _replaced(old: tuple[Any, ...], new: tuple[Any, ...]) -> str:
    """Return the difference between two targets with arguments."""
    if old[0] == new[0]:
        return f"args {_shown(old[1:])} -> {_shown(new[1:])}"
    fields = ["import" if isinstance(target, str) else "asgi" for target in (old[0], new[0])]
    was, becomes = (target if isinstance(target, str) else target[-1] for target in (old[0], new[0]))
    return f"{fields[0]} {_shown(was)} -> {fields[1] + ' ' if fields[0] != fields[1] else ''}{_shown(becomes)}"


def _configured(config: BackendConfig, record: BackendRecord) -> tuple[str, ...]:
    old, new = BackendConfig.of_spec(record.config).model_dump(), config.model_dump()
    return tuple(f"{name} {_shown(old[name])} -> {_shown(new[name])}" for name in new if old[name] != new[name])


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        # Code of the registry must not run in the process that deploys.
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is not a plain value")


def _load_plain(code: bytes) -> tuple[Any, ...] | None:
    """Return the target, the arguments and the keyword arguments, or None unless all of them are plain values."""
    try:
        target, args, kwargs, _ = _PlainUnpickler(BytesIO(code)).load()
    except Exception:  # Bytes that are not such a pickle raise exceptions of many types.
        return None
    return target, tuple(args), dict(kwargs)


def _shown(value: Any) -> str:
    text = repr(list(value) if isinstance(value, tuple) else value)  # pyright: ignore[reportUnknownArgumentType]
    return text if len(text) < 80 else text[:77] + "..."
