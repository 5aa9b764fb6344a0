"""The manifest: the backends and endpoints that a file declares, and the mistakes in it by line.

::

    backends:
      digits:
        import: models.digits:Digits          # where the replicas find the code
        args: [0.5]                           # arguments of the class's constructor
        kwargs: {scale: true}
        config: {num_replicas: 2, max_batch_size: 32}
        ray_actor_options: {num_cpus: 0.5}
        runtime_env: {pip: [scikit-learn]}
      api:
        asgi: web.api:app                     # an ASGI application, instead of import
    endpoints:
      digit:
        route: /digit
        methods: [POST]                       # or: all
        backend: digits                       # or: traffic: {digits: 0.9, digits-next: 0.1}
        shadows: {digits-next: 0.1}

A field that the file leaves out has its default, not its deployed value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import yaml

from ...broker.errors import ConfigError, PenstockError
from ...broker.registry.records import EndpointRecord, Snapshot
from ...broker.wire.keys import check_name
from ...proxy.routing import check_route, clash
from ...workers.asgi.application import AsgiApplication, asgi
from ...workers.executing.user_code import plain_target
from ...workers.import_paths import check_import_path
from .. import validation
from ..config import BackendConfig

T = TypeVar("T")

Members = dict[str, tuple[yaml.Node, yaml.Node]]
"""The members of a mapping by name: the nodes of the key and of the value."""

_TOP = ("backends", "endpoints")
_BACKEND = ("import", "asgi", "args", "kwargs", "config", "ray_actor_options", "runtime_env")
_ALL = "all"
"""The methods of an endpoint with all of them."""
_ENDPOINT = ("route", "methods", "call_methods", "backend", "traffic", "shadows")


@dataclass(frozen=True, slots=True, order=True)
class Mistake:
    """An error in a file, with its line."""

    line: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredBackend:
    """One backend of a file."""

    tag: str
    target: str
    """``"package.module:Name"``."""
    is_asgi: bool = False
    """Whether that is an ASGI application."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    config: BackendConfig = field(default_factory=BackendConfig)
    actor_options: dict[str, Any] = field(default_factory=dict[str, Any])
    runtime_env: dict[str, Any] | None = None

    @property
    def deployable(self) -> str | AsgiApplication:
        """The target as `Client.create_backend` takes it."""
        return asgi(self.target) if self.is_asgi else self.target

    @property
    def code(self) -> tuple[Any, ...]:
        """The target, the arguments and the keyword arguments, as they are pickled."""
        return plain_target(self.deployable), self.args, self.kwargs


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of a file."""

    backends: dict[str, DeclaredBackend]
    endpoints: dict[str, EndpointRecord]


def read(text: str, seen: Snapshot) -> tuple[Manifest, list[Mistake]]:
    """Return the manifest in ``text``, and every mistake in it, by line.

    The manifest must fit beside the deployed records of ``seen``. If there are mistakes, it contains what is correct.
    """
    reading = _Reading()
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        problem = ": ".join(part for part in (e.context, e.problem) if part)
        return Manifest({}, {}), [Mistake(mark.line + 1 if mark else 1, f"this is not YAML: {problem}")]
    except yaml.YAMLError as e:
        return Manifest({}, {}), [Mistake(1, f"this is not YAML: {e}")]
    if root is None:
        return Manifest({}, {}), [Mistake(1, "the file is empty; it must declare backends or endpoints")]
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


class _Reading:
    """Reads the nodes of a YAML document and collects the mistakes."""

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
                complaint = f"{what} must have names as keys, not {name!r}"
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
        for name in ("import", "asgi"):
            if name in members:
                target = self.value(members[name][1])
                self.check(members[name][1], partial(_check_target, name, target))
        is_asgi = "asgi" in members
        if is_asgi:
            for name in ("import", "args", "kwargs"):
                if name in members:
                    self.note(members[name][0], f"{what} has both 'asgi' and {name!r}; leave out one of them")
        elif "import" not in members and isinstance(node, yaml.MappingNode):
            self.note(key, f"{what} needs an 'import' such as 'package.module:Name', or an 'asgi' application")
        args = self._list(members, "args", what)
        kwargs = self._mapping(members, "kwargs", what)
        options: dict[str, Any] | None = self._mapping(members, "ray_actor_options", what)
        environment: dict[str, Any] | None = self._mapping(members, "runtime_env", what)
        config = self._config(members, what)
        if is_asgi and config is not None and len(self.mistakes) == before:
            fits = partial(validation.check_fits, config, asgi(target), takes_batch=False)
            self.check(members["config"][1] if "config" in members else key, fits)
        if "ray_actor_options" in members:
            options = self.check(members["ray_actor_options"][1], partial(validation.check_actor_options, options))
        if "runtime_env" in members:
            environment = self.check(members["runtime_env"][1], partial(validation.check_runtime_env, environment))
        if len(self.mistakes) > before or config is None:
            return None
        return DeclaredBackend(
            tag=tag,
            target=target,
            is_asgi=is_asgi,
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
            given = self.value(members["methods"][1])
            given = validation.ALL_METHODS if given == _ALL else given
            methods = self.check(members["methods"][1], lambda: validation.check_methods(given))
        call_methods: tuple[str, ...] | None = None
        if "call_methods" in members:
            names = self.value(members["call_methods"][1])
            call_methods = self.check(members["call_methods"][1], lambda: validation.check_call_methods(names))
        if "backend" in members and "traffic" in members:
            self.note(members["traffic"][0], f"{what} has both 'backend' and 'traffic'; leave out one of them")
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

    def _nested(self, node: yaml.Node) -> Any:
        """Return a mapping with the text of its keys as they are written: YAML 1.1 reads the key ``on`` as true."""
        members = cast("list[tuple[yaml.Node, yaml.Node]]", node.value if isinstance(node, yaml.MappingNode) else [])
        if not members or not all(isinstance(key, yaml.ScalarNode) for key, _ in members):
            return self.value(node)
        return {str(key.value): self.value(value) for key, value in members}

    def _config(self, members: Members, what: str) -> BackendConfig | None:
        if "config" not in members or _is_null(members["config"][1]):
            return BackendConfig()
        node = members["config"][1]
        fields: dict[str, Any] = {}
        before = len(self.mistakes)
        for name, (key, value) in self.members(node, f"config of {what}").items():
            # Each field is checked alone, so that its mistake has its own line.
            fields[name] = self._nested(value) if name == "retry" else self.value(value)
            self.check(key, partial(BackendConfig, **{name: fields[name]}))
        if len(self.mistakes) > before:
            return None
        return self.check(node, lambda: BackendConfig(**fields))


def _check_target(name: str, target: object) -> None:
    if not isinstance(target, str):
        raise ConfigError(f"{name} must be an import path such as 'package.module:Name', not {target!r}")
    check_import_path(target)


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "nothing" if _is_null(node) else f"{node.value!r}"
