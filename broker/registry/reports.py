"""Reports of the processes of an instance on themselves, and of the controller on the backends.

The latest report of each process or backend is stored in the registry under its name. A report may outlive its process,
until the controller deletes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

ReportKind = Literal["replicas", "proxies", "backends", "controllers"]

ReportedState = Literal["starting", "ready", "draining", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReport:
    """The report of one replica. The controller writes the first one, before there is a process."""

    kind: ClassVar[ReportKind] = "replicas"

    backend: str
    state: ReportedState = "starting"
    version: str = ""
    """The version of the backend that it runs; "" until it has read the record."""
    initial_config_version: int = 0
    """The version of the configuration that it started with."""
    config_version: int = 0
    """The version of the configuration that it applies; 0 until it is ready."""
    refused: int | None = None
    """The version of the configuration that the user's ``reconfigure`` rejected last."""
    capacity: int = 1
    """The number of requests that run at a time."""
    error: dict[str, Any] | None = None
    """Why it failed, or rejected a configuration: as ``to_wire`` writes it."""
    node: str = ""
    """The id of its Ray node; "" until it has started."""
    pid: int = 0
    niceness: int = 0
    """The niceness of its process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyReport:
    """The report of one proxy. The controller writes the first one, before there is a process."""

    kind: ClassVar[ReportKind] = "proxies"

    node: str = ""
    """The id of its Ray node."""
    state: ReportedState = "starting"
    address: str = ""
    """The address of its machine; "" until it has started."""
    pid: int = 0
    niceness: int = 0
    """The niceness of its process."""
    url: str | None = None
    """Where it accepts requests; None while it does not."""
    admin_url: str | None = None
    """Where it serves the pages of ``admin_port``; None while it does not."""
    version: int = 0
    """The version of the registry that it routes by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedChange:
    """A change of a backend that could not be rolled out and was undone."""

    version: str
    failing: dict[str, Any] | None
    lacking: str | None
    undone_by: int
    """The version of the configuration that replaced it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendStatus:
    """The controller's report of one backend."""

    kind: ClassVar[ReportKind] = "backends"

    version: str
    config_version: int
    wanted: int = 0
    ready: int = 0
    starting: int = 0
    rolled_out: bool = False
    """Whether this version and configuration were complete at some time: every wanted replica was ready and applied
    the configuration, and none of another version claimed requests any more."""
    failing: dict[str, Any] | None = None
    """The error of the last replica that could not start, as ``to_wire`` writes it."""
    lacking: str | None = None
    """The resources that are missing in the cluster."""
    restarts: int = 0
    """How many replicas have failed after they were ready, and were replaced."""
    refused: RefusedChange | None = None
    """The last change that was undone because it could not be rolled out; None once a later one is rolled out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerReport:
    """The controller's report of itself. There is one only while it waits."""

    kind: ClassVar[ReportKind] = "controllers"

    waits_for: str = ""


ReportT = TypeVar("ReportT", ReplicaReport, ProxyReport, BackendStatus, ControllerReport)
Report = ReplicaReport | ProxyReport | BackendStatus | ControllerReport
