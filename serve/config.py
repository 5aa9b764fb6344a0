"""Configuration values: they validate themselves and name their mistakes."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeVar, cast

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from starlette.middleware import Middleware

from ..broker.errors import ConfigError
from ..broker.registry.records import DEFAULTS, AutoscalingSpec, BackendSpec
from ..proxy.http1.connection_limit import MAX_CONNECTIONS

Location = Literal["HeadOnly", "EveryNode", "NoServer"]

_C = TypeVar("_C", bound="_Config")


class _Config(BaseModel):
    """A value whose every complaint is a `ConfigError`, or a ``TypeError``, that names the field."""

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
    )

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as e:
            raise _translated(type(self), e.errors()[0]) from None

    @classmethod
    def of(cls: type[_C], value: Any, name: str = "config") -> _C:
        """Return ``value`` as one of these: it may be one, a mapping of fields, or ``None`` for the defaults."""
        if isinstance(value, cls):
            return value
        return cls(**_fields(cls, value, name))

    def merged(self: _C, update: Any, name: str = "config") -> _C:
        """Return this value with the fields that ``update`` names replaced; of nested values as well.

        ``update`` is a mapping, or a value of this class, of which the fields count that it was made with.
        """
        merged = {field: getattr(self, field) for field in type(self).model_fields}
        for field, new in _fields(type(self), update, name).items():
            old = merged.get(field)
            merged[field] = old.merged(new, field) if isinstance(old, _Config) and new is not None else new
        return type(self)(**merged)


LEAST_QUEUED_BYTES = 1024 * 1024
"""A lower limit would leave room for hardly more than the requests that are always let through."""

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


_SCALING = AutoscalingSpec(max_replicas=1)
"""The defaults of the fields of `AutoscalingConfig`."""


class AutoscalingConfig(_Config):
    """How many replicas a backend gets, by what the broker counts: requests queued and in progress."""

    max_replicas: Count
    """Never more than this many."""

    min_replicas: Annotated[int, Field(ge=0)] = _SCALING.min_replicas
    """Never fewer than this many. With 0, no replica runs at rest; the first requests wait for one to start."""

    target_queue_per_replica: Positive = _SCALING.target_queue_per_replica
    """So many unsettled requests for each replica are wanted: more make it grow, fewer let it shrink."""

    upscale_delay_s: NotNegative = _SCALING.upscale_delay_s
    """The load must call for more replicas this long before there are more."""

    downscale_delay_s: NotNegative = _SCALING.downscale_delay_s
    """The load must call for fewer replicas this long before there are fewer."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> AutoscalingConfig:
        if self.max_replicas < self.min_replicas:
            raise ConfigError(
                f"AutoscalingConfig.max_replicas must be at least min_replicas ({self.min_replicas}), "
                f"not {self.max_replicas}"
            )
        return self


def _json(value: Any) -> Any:
    """Return ``value`` as it comes back from the registry, so that no later change to it can leak in."""
    try:
        written = orjson.dumps(value)
        json.dumps(value, allow_nan=False)  # orjson turns NaN into null, silently
    except ValueError as e:
        raise ConfigError(f"BackendConfig.user_config must be what JSON can hold: {e}") from None
    except TypeError as e:  # orjson's own error is a TypeError for types and numbers alike
        raise TypeError(f"BackendConfig.user_config must be what JSON can hold: {e}") from None
    return orjson.loads(written)


class BackendConfig(_Config):
    """How a backend runs."""

    num_replicas: Count = DEFAULTS.num_replicas
    """How many replicas; with ``autoscaling_config``, how many to begin with."""

    max_batch_size: Count | None = DEFAULTS.max_batch_size
    """The most requests that one call gets. Needs ``@serve.accept_batch``."""

    batch_wait_timeout: NotNegative = DEFAULTS.batch_wait_timeout
    """Seconds that a batch waits to fill, counted from its first entry."""

    max_concurrent_queries: Count | None = DEFAULTS.max_concurrent_queries
    """The most calls that one replica runs at a time; by default 1 for blocking code and 100 for ``async def``."""

    user_config: Annotated[Any, AfterValidator(_json)] = DEFAULTS.user_config
    """Anything JSON can hold: given to the class's ``reconfigure``, at start and on every update."""

    autoscaling_config: AutoscalingConfig | None = None
    """How many replicas, by load. Without it there are always ``num_replicas``."""

    max_queued_requests: Count = DEFAULTS.max_queued_requests
    """Publishing beyond this many unsettled requests, waiting and running, raises ``Overloaded``."""

    max_queued_bytes: Annotated[int, Field(ge=LEAST_QUEUED_BYTES)] = DEFAULTS.max_queued_bytes
    """The most bytes of heads and bodies of unsettled requests, each counted as at least 4 KiB; at least 1 MiB.

    Beyond it publishing raises ``Overloaded``; a request that is larger by itself raises ``PayloadTooLarge``.
    """

    batch_share: Annotated[float, Field(ge=0, le=1)] = DEFAULTS.batch_share
    """While batch items wait, replicas take at least this share of what they take from them, whatever else there is."""

    max_deliveries: Count = DEFAULTS.max_deliveries
    """A request whose replica died this many times is a dead letter."""

    max_dead_letters: Count = DEFAULTS.max_dead_letters
    """So many dead letters are kept, for at most 14 days; the oldest are dropped, and counted."""

    graceful_shutdown_timeout_s: NotNegative = DEFAULTS.graceful_shutdown_timeout_s
    """A replica that has to go may take this long to finish what it has begun."""

    health_check_period_s: Positive = DEFAULTS.health_check_period_s
    """A replica is asked this often whether it is well; ``check_health`` of a class is part of that."""

    health_check_timeout_s: Positive = DEFAULTS.health_check_timeout_s
    """A replica that has not answered after this long is replaced."""

    allow_pickle: bool = DEFAULTS.allow_pickle
    """Values that are not JSON may travel between handles and replicas by pickle. Never those from HTTP."""

    @classmethod
    def of_spec(cls, spec: BackendSpec) -> BackendConfig:
        """Return the configuration of a backend's record."""
        return cls(**asdict(spec))

    def spec(self) -> BackendSpec:
        """Return the configuration as a backend's record holds it."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        if (scaling := self.autoscaling_config) is not None:
            fields["autoscaling_config"] = AutoscalingSpec(**scaling.model_dump())
        return BackendSpec(**fields)


def _no_server(value: Any) -> Any:
    return "NoServer" if value is None else value


def _path_prefix(value: str) -> str:
    if value and (not value.startswith("/") or value.endswith("/")):
        raise ConfigError(f"HTTPOptions.root_path must be empty, or start with '/' and not end with it, not {value!r}")
    return value


class HTTPOptions(_Config):
    """How an instance is reached over HTTP."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """The address to listen on; ``"0.0.0.0"`` is all of a node's."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0 picks a free one, which ``client.http_url`` then tells."""

    middlewares: list[Middleware] = Field(default_factory=list[Middleware])
    """Starlette's, the outermost first. They must be picklable, since they run in the proxies."""

    location: Annotated[Location, BeforeValidator(_no_server)] = "HeadOnly"
    """``"HeadOnly"``: on the node that called ``start``. ``"EveryNode"``. ``"NoServer"`` or ``None``."""

    proxies_per_node: Count = 1
    """How many processes share the port on a node."""

    request_timeout_s: Positive = 60.0
    """A request without an answer after this long gets a 504."""

    max_body_bytes: Annotated[int, Field(ge=0)] = 64 * 1024 * 1024
    """A longer body gets a 413."""

    max_buffered_bytes: int | None = None
    """The most bytes of bodies that a proxy holds, of requests that are not answered and of replies that are not sent.

    Beyond it requests get a 503. By default an eighth of the node's memory, shared by its proxies, and never less than
    ``max_body_bytes``.
    """

    max_connections: Count = MAX_CONNECTIONS
    """Open connections of one proxy; further ones get a 503 and are closed."""

    root_path: Annotated[str, AfterValidator(_path_prefix)] = ""
    """Where a gateway in front of the proxies has mounted them (ASGI's ``root_path``)."""

    debug: bool = False
    """Let HTTP callers see tracebacks."""

    @model_validator(mode="after")
    def _a_body_fits(self) -> HTTPOptions:
        if self.max_buffered_bytes is not None and self.max_buffered_bytes < self.max_body_bytes:
            raise ConfigError(
                f"HTTPOptions.max_buffered_bytes must be at least max_body_bytes ({self.max_body_bytes}), "
                f"not {self.max_buffered_bytes}"
            )
        return self


def _fields(kind: type[_Config], value: Any, name: str) -> dict[str, Any]:
    """Return the fields that ``value`` names."""
    if value is None:
        return {}
    if isinstance(value, kind):
        return {field: getattr(value, field) for field in value.model_fields_set}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be {kind.__name__}, a dict of its fields or None, not {type(value).__name__}")
    fields: dict[Any, Any] = dict(cast(Any, value))
    for field in fields:
        if not isinstance(field, str):
            raise TypeError(f"{name} must have field names (str) for keys, not {type(field).__name__}")
    return fields


def _translated(kind: type[_Config], error: ErrorDetails) -> ConfigError | TypeError:
    """Say what pydantic found in our words: the field, what it may be, what it was."""
    if isinstance(own := error.get("ctx", {}).get("error"), ConfigError):
        return own
    # Behind the field come union members and indices, which say nothing to the reader.
    field = f"{kind.__name__}.{error['loc'][0]}" if error["loc"] else kind.__name__
    met = error["input"]
    if error["type"] == "extra_forbidden":
        unknown = str(error["loc"][0])
        near = difflib.get_close_matches(unknown, kind.model_fields, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(kind.model_fields)}"
        return ConfigError(f"{kind.__name__} has no field {unknown!r}{hint}")
    if error["type"] == "missing":
        return ConfigError(f"{field} must be given")
    allowed = error["msg"].replace("Input should be", "must be").replace("String should", "must")
    if error["type"].endswith("_type") or error["type"] == "is_instance_of":
        return TypeError(f"{field} {allowed}, not {type(met).__name__}")
    return ConfigError(f"{field} {allowed}, not {met!r}")
