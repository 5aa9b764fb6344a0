"""The records of the registry: backends, endpoints, and the snapshot of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, TypeVar, cast

import orjson

from ..errors import WireError

ReportKind = Literal["replicas", "proxies", "backends", "controllers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendRecord:
    """One backend as it should be."""

    tag: str
    version: str
    """Of its code, arguments and actor options. Replicas of another version are replaced."""
    code: str
    """The digest of the pickled ``(target, init_args, init_kwargs)``; see `Registry.get_code`."""
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    """All fields of ``serve.BackendConfig``. A change of them keeps the version: replicas take it over as they run."""
    config_version: int = 1
    actor_options: dict[str, Any] = field(default_factory=dict[str, Any])
    runtime_env: dict[str, Any] | None = None
    files: str = ""
    """The digest of the local directories that ``runtime_env`` names, stored as code is; empty if there are none."""
    accepts_batch: bool = False

    @property
    def stored(self) -> frozenset[str]:
        """The digests of all that `Registry.put_code` stored for it."""
        return frozenset({self.code, self.files} - {""})


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointRecord:
    """One endpoint as it should be."""

    name: str
    route: str | None = None
    methods: tuple[str, ...] = ("GET",)
    traffic: dict[str, float] = field(default_factory=dict[str, float])
    """Backend tag to weight; the weights sum to 1."""
    shadows: dict[str, float] = field(default_factory=dict[str, float])
    """Backend tag to the proportion of requests that are copied to it, 0 to 1."""
    call_methods: tuple[str, ...] | None = None
    """The methods of a backend's class that may be called through it; None: every public one."""

    def allows(self, call_method: str) -> bool:
        return self.call_methods is None or call_method in self.call_methods


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole registry at one version."""

    version: int = 0
    backends: Mapping[str, BackendRecord] = field(default_factory=dict[str, BackendRecord])
    endpoints: Mapping[str, EndpointRecord] = field(default_factory=dict[str, EndpointRecord])


@dataclass(frozen=True, slots=True)
class Change:
    """What is to be written, by name; None deletes."""

    backends: Mapping[str, BackendRecord | None] = field(default_factory=dict[str, "BackendRecord | None"])
    endpoints: Mapping[str, EndpointRecord | None] = field(default_factory=dict[str, "EndpointRecord | None"])


def parse_records(flat: list[bytes]) -> list[tuple[str, dict[str, Any]]]:
    records: list[tuple[str, dict[str, Any]]] = []
    for name, raw in zip(flat[::2], flat[1::2], strict=True):
        try:
            record = orjson.loads(raw)
        except ValueError as e:
            raise WireError(f"the registry's {name!r} is not JSON: {e}") from None
        if type(record) is not dict:
            raise WireError(f"the registry's {name!r} must be a JSON object, not {type(record).__name__}")
        records.append((name.decode(), cast("dict[str, Any]", record)))
    return records


RecordT = TypeVar("RecordT", BackendRecord, EndpointRecord)

_TYPES: Mapping[str, tuple[type, ...]] = {
    "tag": (str,),
    "version": (str,),
    "code": (str,),
    "config": (dict,),
    "config_version": (int,),
    "actor_options": (dict,),
    "runtime_env": (dict, type(None)),
    "files": (str,),
    "accepts_batch": (bool,),
    "name": (str,),
    "route": (str, type(None)),
    "methods": (list,),
    "traffic": (dict,),
    "shadows": (dict,),
    "call_methods": (list, type(None)),
}


def read_record(kind: type[RecordT], name: str, raw: Mapping[str, Any]) -> RecordT:
    """Return a record, without the fields that a later release has given it."""
    given: dict[str, Any] = {}
    for member in fields(kind):
        if member.name in raw:
            value = given[member.name] = raw[member.name]
            if type(value) not in _TYPES[member.name]:
                raise WireError(f"the registry's {name!r} has a {type(value).__name__} as its {member.name!r}")
        elif member.default is MISSING and member.default_factory is MISSING:
            raise WireError(f"the registry's {name!r} has no {member.name!r}")
    for name_of_list in ("methods", "call_methods"):
        if given.get(name_of_list) is not None:
            given[name_of_list] = tuple(given[name_of_list])
    return kind(**given)
