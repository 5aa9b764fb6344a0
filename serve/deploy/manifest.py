"""The manifest: an application as a file declares it, and its difference from what is deployed.

::

    backends:
      digits:
        import: models.digits:Digits          # where the replicas find the code
        args: [0.5]                           # what a class is constructed with
        kwargs: {scale: true}
        config: {num_replicas: 2, max_batch_size: 32}
        ray_actor_options: {num_cpus: 0.5}
        runtime_env: {pip: [scikit-learn]}
    endpoints:
      digit:
        route: /digit
        methods: [POST]
        backend: digits                       # or: traffic: {digits: 0.9, digits-next: 0.1}
        shadows: {digits-next: 0.1}

What a file does not say is the default, not what there is. Nothing here does anything.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from typing import Any, Literal, NoReturn, TypeVar, cast

import yaml

from ...broker.errors import ConfigError, PenstockError
from ...broker.registry.records import BackendRecord, EndpointRecord, Snapshot
from ...broker.wire.keys import check_name
from ...proxy.routing import check_route, clash
from .. import validation
from ..config import BackendConfig

T = TypeVar("T")

Members = dict[str, tuple[yaml.Node, yaml.Node]]
"""What a mapping has, by name: the nodes of the key and of the value."""

_TOP = ("backends", "endpoints")
_BACKEND = ("import", "args", "kwargs", "config", "ray_actor_options", "runtime_env")
_ENDPOINT = ("route", "methods", "call_methods", "backend", "traffic", "shadows")


@dataclass(frozen=True, slots=True, order=True)
class Mistake:
    """What is wrong in a file, and where."""

    line: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredBackend:
    """One backend as a file declares it."""

    tag: str
    target: str
    """``"package.module:Name"``."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    config: BackendConfig = field(default_factory=BackendConfig)
    actor_options: dict[str, Any] = field(default_factory=dict[str, Any])
    runtime_env: dict[str, Any] | None = None

    @property
    def code(self) -> tuple[Any, ...]:
        return self.target, self.args, self.kwargs


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that a file declares."""

    backends: dict[str, DeclaredBackend]
    endpoints: dict[str, EndpointRecord]


@dataclass(frozen=True, slots=True)
class ManifestChange:
    """One change that deploying makes."""

    verb: Literal["create", "update", "configure", "delete"]
    """``configure``: the replicas take it over as they run."""
    kind: Literal["backend", "endpoint"]
    name: str
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        details = f": {'; '.join(self.details)}" if self.details else ""
        return f"{self.verb} {self.kind} {self.name}{details}"


def read(text: str, seen: Snapshot) -> tuple[Manifest, list[Mistake]]:
    """Return what ``text`` declares beside what there is, and every mistake in it, by line.

    If there are mistakes, the application is what could be read.
    """
    reading = _Reading()
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        said = ": ".join(part for part in (e.context, e.problem) if part)
        return Manifest({}, {}), [Mistake(mark.line + 1 if mark else 1, f"this is not YAML: {said}")]
    except yaml.YAMLError as e:
        return Manifest({}, {}), [Mistake(1, f"this is not YAML: {e}")]
    if root is None:
        return Manifest({}, {}), [Mistake(1, "the file is empty; it declares backends and endpoints")]
    backends: dict[str, DeclaredBackend] = {}
    endpoints: dict[str, EndpointRecord] = {}
    sections = reading.members(root, "the file", _TOP)
    for tag, (key, value) in reading.entries(sections, "backends").items():
        if (backend := reading.backend(tag, key, value)) is not None:
            backends[tag] = backend
    declared = set(reading.entries(sections, "backends", quiet=True))
    for name, (key, value) in reading.entries(sections, "endpoints").items():
        endpoint = reading.endpoint(name, key, value, declared | set(seen.backends))
        if endpoint is None:
            continue
        others = {**seen.endpoints, **endpoints}
        others.pop(name, None)
        if (other := clash(others.values(), endpoint)) is not None:
            reading.note(value, f"endpoint {name!r} has the route of endpoint {other.name!r}: {other.route!r}")
        endpoints[name] = endpoint
    return Manifest(backends, endpoints), sorted(set(reading.mistakes))


def plan(
    application: Manifest, seen: Snapshot, codes: Mapping[str, bytes], *, prune: bool = False
) -> list[ManifestChange]:
    """Return what it takes to get from what is ``seen``, with its ``codes`` by tag, to what is declared; maybe nothing.

    With ``prune`` all that is not declared goes.
    """
    steps: list[ManifestChange] = []
    for tag, backend in application.backends.items():
        record = seen.backends.get(tag)
        if record is None:
            details = (f"{backend.target}, {backend.config.spec().initial_replicas} replicas",)
            steps.append(ManifestChange("create", "backend", tag, details))
            continue
        rolled = _rolled(backend, record, codes.get(tag))
        configured = _configured(backend.config, record)
        if rolled:
            steps.append(ManifestChange("update", "backend", tag, (*rolled, *configured)))
        elif configured:
            steps.append(ManifestChange("configure", "backend", tag, configured))
    for name, endpoint in application.endpoints.items():
        old = seen.endpoints.get(name)
        if old is None:
            details = (f"{' '.join(endpoint.methods)} {endpoint.route}" if endpoint.route else "for handles alone",)
            steps.append(ManifestChange("create", "endpoint", name, details))
        elif old != endpoint:
            said = tuple(
                f"{what} {_shown(getattr(old, what))} -> {_shown(getattr(endpoint, what))}"
                for what in ("route", "methods", "call_methods", "traffic", "shadows")
                if getattr(old, what) != getattr(endpoint, what)
            )
            steps.append(ManifestChange("update", "endpoint", name, said))
    if prune:
        steps += [
            ManifestChange("delete", "endpoint", name) for name in seen.endpoints if name not in application.endpoints
        ]
        steps += [ManifestChange("delete", "backend", tag) for tag in seen.backends if tag not in application.backends]
    return steps


def _rolled(backend: DeclaredBackend, record: BackendRecord, code: bytes | None) -> tuple[str, ...]:
    """Return why its replicas must be replaced, if they must."""
    reasons: list[str] = []
    there = None if code is None else _plain(code)
    if there is None:
        reasons.append(f"its code becomes {backend.target}")
    elif there != backend.code:
        what = "import" if there[0] != backend.target else "args"
        old, new = (there[0], backend.target) if what == "import" else (there[1:], backend.code[1:])
        reasons.append(f"{what} {_shown(old)} -> {_shown(new)}")
    if backend.actor_options != record.actor_options:
        reasons.append(f"ray_actor_options {_shown(record.actor_options)} -> {_shown(backend.actor_options)}")
    if (backend.runtime_env or None) != (record.runtime_env or None):
        reasons.append("runtime_env")
    return tuple(reasons)


def _configured(config: BackendConfig, record: BackendRecord) -> tuple[str, ...]:
    old, new = BackendConfig.of_spec(record.config).model_dump(), config.model_dump()
    return tuple(f"{name} {_shown(old[name])} -> {_shown(new[name])}" for name in new if old[name] != new[name])


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        # What lies in the registry is not to run code here.
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is no plain value")


def _plain(code: bytes) -> tuple[Any, ...] | None:
    """Return the target, the arguments and the keyword arguments, if all of them are plain values."""
    try:
        target, args, kwargs, _ = _PlainUnpickler(BytesIO(code)).load()
    except Exception:  # whatever bytes that are no such pickle can bring about
        return None
    return target, tuple(args), dict(kwargs)


def _shown(value: Any) -> str:
    text = repr(list(value) if isinstance(value, tuple) else value)  # pyright: ignore[reportUnknownArgumentType]
    return text if len(text) < 80 else text[:77] + "..."


class _Reading:
    """Reads the nodes of a file and notes what is wrong with them."""

    def __init__(self) -> None:
        self.mistakes: list[Mistake] = []

    def note(self, node: yaml.Node, message: object) -> None:
        self.mistakes.append(Mistake(node.start_mark.line + 1, str(message)))

    def members(
        self, node: yaml.Node, what: str, known: Iterable[str] | None = None, *, quiet: bool = False
    ) -> Members:
        """Return the key and value nodes of a mapping, by name."""
        found: Members = {}
        if not isinstance(node, yaml.MappingNode):
            if not quiet:
                self.note(node, f"{what} must be a mapping, not {_kind(node)}")
            return found
        names = None if known is None else tuple(known)
        for key, value in cast("list[tuple[yaml.Node, yaml.Node]]", node.value):
            name = self.value(key)
            if not isinstance(name, str):
                complaint = f"{what} must have names for keys, not {name!r}"
            elif names is not None and name not in names:
                complaint = f"{what} has no {name!r}; it may have {', '.join(names)}"
            elif name in found:
                complaint = f"{what} has {name!r} twice"
            else:
                found[name] = (key, value)
                continue
            if not quiet:
                self.note(key, complaint)
        return found

    def entries(self, sections: Members, name: str, *, quiet: bool = False) -> Members:
        if name not in sections or _is_null(sections[name][1]):
            return {}
        return self.members(sections[name][1], name, quiet=quiet)

    def backend(self, tag: str, key: yaml.Node, node: yaml.Node) -> DeclaredBackend | None:
        before = len(self.mistakes)
        what = f"backend {tag!r}"
        self.check(key, lambda: validation.check_tag(tag))
        members = self.members(node, what, _BACKEND)
        target = ""
        if "import" in members:
            target = self.value(members["import"][1])
            self.check(members["import"][1], lambda: _check_target(target))
        elif isinstance(node, yaml.MappingNode):
            self.note(key, f"{what} needs an 'import', such as 'package.module:Name'")
        args = self._list(members, "args", what)
        kwargs = self._mapping(members, "kwargs", what)
        options: dict[str, Any] | None = self._mapping(members, "ray_actor_options", what)
        environment: dict[str, Any] | None = self._mapping(members, "runtime_env", what)
        config = self._config(members, what)
        if "ray_actor_options" in members:
            options = self.check(members["ray_actor_options"][1], partial(validation.check_actor_options, options))
        if "runtime_env" in members:
            environment = self.check(members["runtime_env"][1], partial(validation.check_runtime_env, environment))
        if len(self.mistakes) > before or config is None:
            return None
        return DeclaredBackend(
            tag=tag,
            target=target,
            args=tuple(args),
            kwargs=kwargs,
            config=config,
            actor_options=options or {},
            runtime_env=environment or None,
        )

    def endpoint(self, name: str, key: yaml.Node, node: yaml.Node, known: set[str]) -> EndpointRecord | None:
        before = len(self.mistakes)
        what = f"endpoint {name!r}"
        self.check(key, lambda: check_name("an endpoint", name))
        members = self.members(node, what, _ENDPOINT)
        route: str | None = None
        methods: tuple[str, ...] | None = None
        traffic: dict[str, float] | None = None
        shadows: dict[str, float] = {}
        if "route" in members and not _is_null(members["route"][1]):
            route = self.check(members["route"][1], lambda: check_route(self.value(members["route"][1])))
        if "methods" in members:
            methods = self.check(
                members["methods"][1], lambda: validation.check_methods(self.value(members["methods"][1]))
            )
        call_methods: tuple[str, ...] | None = None
        if "call_methods" in members:
            names = self.value(members["call_methods"][1])
            call_methods = self.check(members["call_methods"][1], lambda: validation.check_call_methods(names))
        if "backend" in members and "traffic" in members:
            self.note(members["traffic"][0], f"{what} has a 'backend' and 'traffic': it needs one of them")
        elif "backend" in members:
            tag = self.value(members["backend"][1])
            traffic = self.check(members["backend"][1], lambda: validation.check_traffic({tag: 1.0}, known))
        elif "traffic" in members:
            weights = self.value(members["traffic"][1])
            traffic = self.check(members["traffic"][1], lambda: validation.check_traffic(weights, known))
        elif isinstance(node, yaml.MappingNode):
            self.note(key, f"{what} needs a 'backend', or 'traffic' with a weight for each")
        if "shadows" in members:
            for tag, (tag_node, share_node) in self.members(members["shadows"][1], f"shadows of {what}").items():
                if tag not in known:
                    self.note(tag_node, f"no backend {tag!r}")
                share = self.check(share_node, partial(validation.check_proportion, self.value(share_node)))
                if share:
                    shadows[tag] = share
        if len(self.mistakes) > before:
            return None
        return EndpointRecord(
            name=name,
            route=route,
            methods=methods or ("GET",),
            traffic=traffic or {},
            shadows=shadows,
            call_methods=call_methods,
        )

    def value(self, node: yaml.Node) -> Any:
        try:
            loader = yaml.SafeLoader("")
            try:
                return cast(Any, loader).construct_document(node)
            finally:
                loader.dispose()
        except (yaml.YAMLError, ValueError) as e:
            self.note(node, getattr(e, "problem", None) or e)
            return None

    def check(self, node: yaml.Node, check: Callable[[], T]) -> T | None:
        try:
            return check()
        except (TypeError, PenstockError) as e:
            self.note(node, e)
            return None

    def _list(self, members: Members, name: str, what: str) -> list[Any]:
        if name not in members or _is_null(node := members[name][1]):
            return []
        if not isinstance(node, yaml.SequenceNode):
            self.note(node, f"{name} of {what} must be a list, not {_kind(node)}")
            return []
        return cast("list[Any]", self.value(node))

    def _mapping(self, members: Members, name: str, what: str) -> dict[str, Any]:
        if name not in members or _is_null(node := members[name][1]):
            return {}
        return {key: self.value(value) for key, (_, value) in self.members(node, f"{name} of {what}").items()}

    def _config(self, members: Members, what: str) -> BackendConfig | None:
        if "config" not in members or _is_null(members["config"][1]):
            return BackendConfig()
        node = members["config"][1]
        fields: dict[str, Any] = {}
        before = len(self.mistakes)
        for name, (key, value) in self.members(node, f"config of {what}").items():
            # One by one, as each has a line of its own.
            fields[name] = self.value(value)
            self.check(key, partial(BackendConfig, **{name: fields[name]}))
        if len(self.mistakes) > before:
            return None
        return self.check(node, lambda: BackendConfig(**fields))


def _check_target(target: object) -> None:
    if not isinstance(target, str):
        raise ConfigError(f"import must be where to find the code, such as 'package.module:Name', not {target!r}")
    validation.check_callable(target, (), {}, takes_batch=True)


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "nothing" if _is_null(node) else f"{node.value!r}"
