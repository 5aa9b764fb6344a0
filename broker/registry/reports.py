"""Reports of the processes of an instance on themselves, of the controller on the backends, and of jobs.

The latest report of each process, backend or job is stored in the registry under its name. A report may outlive its
process, until the controller deletes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

ReportKind = Literal["replicas", "proxies", "backends", "controllers", "jobs"]

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
    """The resources that are missing in the cluster, and for which no node will be added."""
    waits_for_nodes: str | None = None
    """The resources that are missing in the cluster, and for which Ray's autoscaler may add nodes."""
    restarts: int = 0
    """How many replicas have failed after they were ready, and were replaced."""
    refused: RefusedChange | None = None
    """The last change that was undone because it could not be rolled out; None once a later one is rolled out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerReport:
    """The controller's report of itself. There is one only while it waits."""

    kind: ClassVar[ReportKind] = "controllers"

    waits_for: str = ""


JobState = Literal["running", "finished", "failed", "stopped"]

JOB_REPORT_S = 2.0
"""Seconds between two reports of a job."""

_SILENT_JOB_MS = 5 * JOB_REPORT_S * 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class JobReport:
    """The report of a batch job by its producer. It is kept for as long as the results of the job are."""

    kind: ClassVar[ReportKind] = "jobs"

    job: str
    """Its name."""
    endpoint: str
    source: str = ""
    """The file or directory of its items; "" for a Python iterable."""
    state: JobState = "running"
    """``stopped`` is a job whose producer ended before the job did: another one can continue it."""
    done: int = 0
    """Items that have a result, those of earlier producers included."""
    errors: int = 0
    """Those of them that failed."""
    total: int | None = None
    """All items; None while their number is not known."""
    share: float | None = None
    """How much of the input has been read, 0 to 1; None if that is not known."""
    in_flight: int = 0
    """Items that were sent and have no result."""
    retried: int = 0
    waits_for: str | None = None
    """See ``BatchProgress`` for these."""
    started_ms: float = 0.0
    """When this producer began. Times are Unix times in milliseconds, by the broker's clock."""
    at_ms: float = 0.0
    """When it reported."""
    ttl_s: float = 0.0
    """Seconds for which the results are kept after that."""

    def state_at(self, now_ms: float) -> JobState:
        """Return the state at a time: a job without reports is no longer running."""
        return "stopped" if self.state == "running" and now_ms - self.at_ms > _SILENT_JOB_MS else self.state

    def has_expired(self, now_ms: float) -> bool:
        """Return whether the results of the job are gone."""
        return now_ms - self.at_ms > self.ttl_s * 1000


ReportT = TypeVar("ReportT", ReplicaReport, ProxyReport, BackendStatus, ControllerReport, JobReport)
Report = ReplicaReport | ProxyReport | BackendStatus | ControllerReport | JobReport
