"""The records of the registry: backends, endpoints, and the snapshot of all of them.

The fields of `BackendSpec`, `AutoscalingSpec` and `RetrySpec` have the defaults of ``serve.BackendConfig``,
``serve.AutoscalingConfig`` and ``serve.RetryConfig``. They are written here once; every process reads them from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalingSpec:
    """The rule by which the number of a backend's replicas follows its load; see ``serve.AutoscalingConfig``."""

    max_replicas: int
    min_replicas: int = 1
    target_queue_per_replica: float = 2.0
    upscale_delay_s: float = 0.0
    downscale_delay_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrySpec:
    """The rule by which errors of a backend's code are retried; see ``serve.RetryConfig``."""

    max_attempts: int = 3
    on: tuple[str, ...] = ("Exception",)
    backoff_s: float = 0.5
    max_backoff_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSpec:
    """The configuration of a backend: the fields of ``serve.BackendConfig``, which describes and validates them."""

    num_replicas: int = 1
    max_batch_size: int | None = None
    batch_wait_timeout: float = 0.0
    max_concurrent_queries: int | None = None
    user_config: Any = None
    autoscaling_config: AutoscalingSpec | None = None
    max_queued_requests: int = 10_000
    max_queued_bytes: int = 1024 * 1024 * 1024
    batch_share: float = 0.1
    max_deliveries: int = 3
    max_dead_letters: int = 10_000
    retry: RetrySpec | None = None
    result_ttl_s: float = 3600.0
    max_result_bytes: int = 1024 * 1024 * 1024
    graceful_shutdown_timeout_s: float = 20.0
    health_check_period_s: float = 10.0
    health_check_timeout_s: float = 30.0
    allow_pickle: bool = False

    @property
    def initial_replicas(self) -> int:
        """The number of replicas that a backend begins with."""
        if (bounds := self.autoscaling_config) is None:
            return self.num_replicas
        return min(max(self.num_replicas, bounds.min_replicas), bounds.max_replicas)


DEFAULTS = BackendSpec()
"""The defaults of all fields."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendRecord:
    """The desired state of one backend."""

    tag: str
    version: str
    """Of its code, arguments and actor options. Replicas of another version are replaced."""
    code: str
    """The digest of the pickled ``(target, init_args, init_kwargs)``; see `Registry.get_code`."""
    config: BackendSpec = field(default_factory=BackendSpec)
    """A change of it keeps the version: running replicas apply it."""
    config_version: int = 1
    actor_options: dict[str, Any] = field(default_factory=dict[str, Any])
    runtime_env: dict[str, Any] | None = None
    files: str = ""
    """The digest of the local directories that ``runtime_env`` names, stored as code is; empty if there are none."""
    accepts_batch: bool = False
    source: str = ""
    """The digest of the source of an import path where it was deployed; empty if it was not found there."""

    @property
    def stored(self) -> frozenset[str]:
        """The digests of all that `Registry.put_code` stored for it."""
        return frozenset({self.code, self.files} - {""})


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointRecord:
    """The desired state of one endpoint."""

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


class FeedPlace(NamedTuple):
    """A place in the feed of changes."""

    entry: bytes = b""
    """The id of an entry; empty before the first one."""
    mark: bytes = b""
    """The random mark of the entry; empty if it has none."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole registry at one version."""

    version: int = 0
    backends: Mapping[str, BackendRecord] = field(default_factory=dict[str, BackendRecord])
    endpoints: Mapping[str, EndpointRecord] = field(default_factory=dict[str, EndpointRecord])
    place: FeedPlace = field(default=FeedPlace(), compare=False)
    """The last entry of the feed that it includes."""


@dataclass(frozen=True, slots=True)
class Change:
    """Records to write, by name; None deletes."""

    backends: Mapping[str, BackendRecord | None] = field(default_factory=dict[str, "BackendRecord | None"])
    endpoints: Mapping[str, EndpointRecord | None] = field(default_factory=dict[str, "EndpointRecord | None"])
