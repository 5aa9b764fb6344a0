"""Configuration of backends, autoscaling and HTTP: pydantic models whose errors name the field and its limits."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeVar, cast

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from starlette.middleware import Middleware

from ..broker.errors import ConfigError
from ..broker.registry.records import DEFAULTS, AutoscalingSpec, BackendSpec, RetrySpec
from ..proxy.options import DEFAULTS as PROXY_DEFAULTS
from ..proxy.pages.admin_token import digest_of

Location = Literal["HeadOnly", "EveryNode", "NoServer"]

_C = TypeVar("_C", bound="_Config")


class _Config(BaseModel):
    """A model whose validation raises a `ConfigError`, or a ``TypeError``, that names the field."""

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
    def parse(cls: type[_C], value: Any, name: str = "config") -> _C:
        """Return ``value`` as a model: it may be one, a mapping of fields, or None for the defaults."""
        if isinstance(value, cls):
            return value
        return cls(**_fields(cls, value, name))

    def merged(self: _C, update: Any, name: str = "config") -> _C:
        """Return a copy with the fields of ``update`` replaced, also those of nested models.

        Args:
            update: a mapping, or a model, of which only the fields count that it was constructed with.
            name: the name of the argument, for error messages.
        """
        merged = {field: getattr(self, field) for field in type(self).model_fields}
        for field, new in _fields(type(self), update, name).items():
            old = merged.get(field)
            merged[field] = old.merged(new, field) if isinstance(old, _Config) and new is not None else new
        return type(self)(**merged)


LEAST_QUEUED_BYTES = 1024 * 1024
"""Smallest ``max_queued_bytes``. A lower one would admit little more than the requests that are always admitted."""

LEAST_RESULT_BYTES = 1024 * 1024
"""A lower limit would leave room for hardly any result."""

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


_SCALING = AutoscalingSpec(max_replicas=1)
"""The defaults of the fields of `AutoscalingConfig`."""


class AutoscalingConfig(_Config):
    """Autoscaling of a backend by the requests that the broker counts, queued and in progress."""

    max_replicas: Count
    """The largest number of replicas."""

    min_replicas: Annotated[int, Field(ge=0)] = _SCALING.min_replicas
    """The smallest number of replicas. With 0 an idle backend has none, and the next request waits for a start."""

    target_queue_per_replica: Positive = _SCALING.target_queue_per_replica
    """The desired number of unsettled requests per replica: with more it scales up, with fewer it may scale down."""

    upscale_delay_s: NotNegative = _SCALING.upscale_delay_s
    """Seconds for which the load must require more replicas before it scales up."""

    downscale_delay_s: NotNegative = _SCALING.downscale_delay_s
    """Seconds for which the load must require fewer replicas before it scales down."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> AutoscalingConfig:
        if self.max_replicas < self.min_replicas:
            raise ConfigError(
                f"AutoscalingConfig.max_replicas must be at least min_replicas ({self.min_replicas}), "
                f"not {self.max_replicas}"
            )
        return self


_RETRY = RetrySpec()
"""The defaults of the fields of `RetryConfig`."""

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def _as_tuple(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise TypeError(f"RetryConfig.on must be a list of names of exceptions, not {type(value).__name__}")
    return tuple(cast("list[object]", value))


def _error_names(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ConfigError("RetryConfig.on must name at least one exception; retry=None turns retries off")
    for name in names:
        if _NAME.fullmatch(name) is None:
            raise ConfigError(
                f"RetryConfig.on must hold names of exceptions, such as 'ConnectionError' or 'httpx.TransportError', "
                f"not {name!r}"
            )
    return names


class RetryConfig(_Config):
    """Retries of requests whose code raised. A waiting request occupies no slot and counts as unsettled."""

    max_attempts: Count = _RETRY.max_attempts
    """How often the code is called for a request at most, the first time included."""

    on: Annotated[tuple[str, ...], BeforeValidator(_as_tuple), AfterValidator(_error_names)] = _RETRY.on
    """The exceptions that are retried: names of classes or of their bases, bare or with their module."""

    backoff_s: NotNegative = _RETRY.backoff_s
    """The next attempt begins after a random time between 0 and this, which doubles with each attempt."""

    max_backoff_s: NotNegative = _RETRY.max_backoff_s
    """The most that it doubles to."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> RetryConfig:
        if self.max_backoff_s < self.backoff_s:
            raise ConfigError(
                f"RetryConfig.max_backoff_s must be at least backoff_s ({self.backoff_s:g}), not {self.max_backoff_s:g}"
            )
        return self


def _json(value: Any) -> Any:
    """Return ``value`` as it is read from the registry: a copy, unaffected by later changes of the original."""
    try:
        written = orjson.dumps(value)
        json.dumps(value, allow_nan=False)  # orjson writes NaN as null without an error.
    except ValueError as e:
        raise ConfigError(f"BackendConfig.user_config must be a JSON value: {e}") from None
    except TypeError as e:  # orjson's error for types and for numbers is a TypeError.
        raise TypeError(f"BackendConfig.user_config must be a JSON value: {e}") from None
    return orjson.loads(written)


class BackendConfig(_Config):
    """Configuration of a backend."""

    num_replicas: Count = DEFAULTS.num_replicas
    """The number of replicas; with ``autoscaling_config`` the initial number."""

    max_batch_size: Count | None = DEFAULTS.max_batch_size
    """The largest number of requests in one call. Needs ``@serve.accept_batch``."""

    batch_wait_timeout: NotNegative = DEFAULTS.batch_wait_timeout
    """Seconds that a batch waits for more requests, counted from its first one."""

    max_concurrent_queries: Count | None = DEFAULTS.max_concurrent_queries
    """The largest number of concurrent calls in one replica; by default 1 for blocking code, 100 for ``async def``.

    With 2, a batch is prepared while a GPU computes another. Then two threads call the same object.
    """

    user_config: Annotated[Any, AfterValidator(_json)] = DEFAULTS.user_config
    """A JSON value that is passed to the class's ``reconfigure`` at the start and on every update."""

    autoscaling_config: AutoscalingConfig | None = None
    """Autoscaling. Without it there are always ``num_replicas``."""

    max_queued_requests: Count = DEFAULTS.max_queued_requests
    """The largest number of unsettled requests, waiting and running; beyond it publishing raises ``Overloaded``."""

    max_queued_bytes: Annotated[int, Field(ge=LEAST_QUEUED_BYTES)] = DEFAULTS.max_queued_bytes
    """The largest number of bytes of unsettled requests, heads and bodies; at least 1 MiB.

    Each request counts as at least 4 KiB. Beyond the limit publishing raises ``Overloaded``; a single request above it
    raises ``PayloadTooLarge``.
    """

    batch_share: Annotated[float, Field(ge=0, le=1)] = DEFAULTS.batch_share
    """While batch items wait, at least this share of the claimed requests are batch items, 0 to 1."""

    max_deliveries: Count = DEFAULTS.max_deliveries
    """The number of replica deaths after which a request becomes a dead letter."""

    max_dead_letters: Count = DEFAULTS.max_dead_letters
    """The largest number of dead letters, each kept for at most 14 days. The oldest are dropped and counted."""

    retry: RetryConfig | None = None
    """Retries of requests whose code raised. Without it only what raises `Retry` is run again."""

    result_ttl_s: Annotated[float, Field(ge=1, le=366 * 24 * 3600)] = DEFAULTS.result_ttl_s
    """Seconds that the result of a submitted request, or of one with an idempotency key, stays after its end."""

    max_result_bytes: Annotated[int, Field(ge=LEAST_RESULT_BYTES)] = DEFAULTS.max_result_bytes
    """The most bytes of such results and their records, each counted as at least 1 KiB; at least 1 MiB.

    Beyond it submitting, and requests with an idempotency key, raise ``ResultsFull``.
    """

    graceful_shutdown_timeout_s: NotNegative = DEFAULTS.graceful_shutdown_timeout_s
    """Seconds that a draining replica may take to finish the requests that it runs."""

    health_check_period_s: Positive = DEFAULTS.health_check_period_s
    """Seconds between health checks of a replica, which call ``check_health`` of a class that has one."""

    health_check_timeout_s: Positive = DEFAULTS.health_check_timeout_s
    """Seconds after which a replica that does not answer a health check is replaced."""

    allow_pickle: bool = DEFAULTS.allow_pickle
    """Whether handles and replicas may pickle values that JSON cannot represent. Data from HTTP is never unpickled."""

    @classmethod
    def of_spec(cls, spec: BackendSpec) -> BackendConfig:
        """Return the configuration of a backend's record."""
        return cls(**asdict(spec))

    def spec(self) -> BackendSpec:
        """Return the configuration as a backend's record holds it."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        if (scaling := self.autoscaling_config) is not None:
            fields["autoscaling_config"] = AutoscalingSpec(**scaling.model_dump())
        if (retry := self.retry) is not None:
            fields["retry"] = RetrySpec(**retry.model_dump())
        return BackendSpec(**fields)


def _no_server(value: Any) -> Any:
    return "NoServer" if value is None else value


def _path_prefix(value: str) -> str:
    if value and (not value.startswith("/") or value.endswith("/")):
        raise ConfigError(f"HTTPOptions.root_path must be empty, or start with '/' and not end with it, not {value!r}")
    return value


class HTTPOptions(_Config):
    """HTTP options of an instance."""

    host: Annotated[str, Field(min_length=1)] = PROXY_DEFAULTS.host
    """The address to listen on; ``"0.0.0.0"`` means all IPv4 addresses of a node."""

    port: Annotated[int, Field(ge=0, le=65535)] = PROXY_DEFAULTS.port
    """The port; 0 picks a free one, which ``client.http_url`` shows."""

    middlewares: list[Middleware] = Field(default_factory=list[Middleware])
    """Starlette middlewares, the outermost first. They must be picklable, because they run in the proxies."""

    location: Annotated[Location, BeforeValidator(_no_server)] = "HeadOnly"
    """Where proxies run: ``"HeadOnly"``, the node that called ``start``; ``"EveryNode"``; ``"NoServer"`` or None."""

    proxies_per_node: Count = PROXY_DEFAULTS.proxies_per_node
    """The number of proxies on a node, which share its port."""

    request_timeout_s: Positive = PROXY_DEFAULTS.request_timeout_s
    """Seconds after which a request without a response is answered with 504."""

    max_body_bytes: Annotated[int, Field(ge=0)] = PROXY_DEFAULTS.max_body_bytes
    """The largest request body; a larger one is answered with 413."""

    max_buffered_bytes: int | None = None
    """The largest number of bytes of request and response bodies that a proxy holds.

    Beyond it requests are answered with 503. By default an eighth of the node's memory, shared by its proxies, and
    never less than ``max_body_bytes``.
    """

    max_connections: Count = PROXY_DEFAULTS.max_connections
    """The largest number of open connections of one proxy; further ones are answered with 503 and closed."""

    drain_delay_s: NotNegative = PROXY_DEFAULTS.drain_delay_s
    """Seconds for which a proxy that begins to drain, on SIGTERM or because its node leaves, accepts connections.

    ``/-/readyz`` is 503 meanwhile, so that load balancers stop sending to it before it refuses them.
    """

    unready_after_s: NotNegative = PROXY_DEFAULTS.unready_after_s
    """Seconds of an outage of the broker after which ``/-/readyz`` is 503; ``/-/healthz`` is so at once."""

    root_path: Annotated[str, AfterValidator(_path_prefix)] = ""
    """The path prefix at which a gateway in front of the proxies mounts them (``root_path`` of ASGI)."""

    admin_port: Annotated[int, Field(ge=0, le=65535)] | None = PROXY_DEFAULTS.admin_port
    """The port of metrics, routes and the dashboard, which are then not at ``port``; None for the same port.

    Of several proxies of a node one has it, and answers for all of them. 0 picks a free one, which ``client.status()``
    shows.
    """

    admin_host: Annotated[str, Field(min_length=1)] = PROXY_DEFAULTS.admin_host
    """The address on which ``admin_port`` listens: by default this machine alone."""

    admin_token: Annotated[str, AfterValidator(digest_of)] | None = PROXY_DEFAULTS.admin_token
    """The token with which the dashboard replays and drops dead letters; without one it changes nothing.

    At least 16 characters, or ``"sha256:"`` and the digest of such a token in hexadecimal digits. Only the digest is
    kept: it is what this field has after the construction. By default ``PENSTOCK_ADMIN_TOKEN`` where ``serve.start`` is
    called, if there is an ``admin_port``.
    """

    ray_serve_metrics: bool = PROXY_DEFAULTS.ray_serve_metrics
    """Whether ``/-/metrics`` also has metrics under the names of Ray Serve."""

    debug: bool = False
    """Whether HTTP responses to errors contain tracebacks."""

    access_log: bool = PROXY_DEFAULTS.access_log
    """Whether proxies log a line for each request: method, path, status, milliseconds, request id and backend."""

    @model_validator(mode="after")
    def _admin_options_fit(self) -> HTTPOptions:
        if self.admin_port and self.admin_port == self.port:
            raise ConfigError(f"HTTPOptions.admin_port must differ from port ({self.port}), or be None to share it")
        if self.admin_token is not None and self.admin_port is None:
            raise ConfigError("HTTPOptions.admin_token is for the dashboard, which is on admin_port: give that too")
        return self

    @model_validator(mode="after")
    def _a_body_fits(self) -> HTTPOptions:
        if self.max_buffered_bytes is not None and self.max_buffered_bytes < self.max_body_bytes:
            raise ConfigError(
                f"HTTPOptions.max_buffered_bytes must be at least max_body_bytes ({self.max_body_bytes}), "
                f"not {self.max_buffered_bytes}"
            )
        return self


def _fields(kind: type[_Config], value: Any, name: str) -> dict[str, Any]:
    """Return the fields that ``value`` contains."""
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
    """Return pydantic's error as one that names the field, the allowed values and the given one."""
    if isinstance(own := error.get("ctx", {}).get("error"), ConfigError):
        return own
    # The location continues with union members and indices, which do not help the reader.
    field = f"{kind.__name__}.{error['loc'][0]}" if error["loc"] else kind.__name__
    given = error["input"]
    if error["type"] == "extra_forbidden":
        unknown = str(error["loc"][0])
        near = difflib.get_close_matches(unknown, kind.model_fields, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; its fields are {', '.join(kind.model_fields)}"
        return ConfigError(f"{kind.__name__} has no field {unknown!r}{hint}")
    if error["type"] == "missing":
        return ConfigError(f"{field} must be given")
    allowed = error["msg"].replace("Input should be", "must be").replace("String should", "must")
    if error["type"].endswith("_type") or error["type"] == "is_instance_of":
        return TypeError(f"{field} {allowed}, not {type(given).__name__}")
    return ConfigError(f"{field} {allowed}, not {given!r}")
