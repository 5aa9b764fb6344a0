"""The wait for a rollout: when it is complete, when it has failed, and the log lines for a person who waits."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ..broker.errors import ConfigError, PenstockError
from ..broker.registry.records import BackendRecord
from ..broker.registry.reports import BackendStatus
from ..handles.errors import BackendError, from_wire
from ..workers.runtime_env import WORKING_DIR

log = logging.getLogger(__name__)

NODES_WAIT_S = 900.0
"""How long a change waits until Ray's autoscaler adds a node: a machine takes minutes, and so does a large image."""

_SLOW_START_S = 30.0
_STILL_STARTING = (
    "backend %r is still starting after %g s: %d of %d replicas are ready. Their constructors may be slow, or other "
    "actors may hold the resources that they need; `ray status` shows those"
)
_WAITING = "backend %r waits for nodes, which Ray's autoscaler may add: %s"


class RolloutWait:
    """The wait for the rollout of ``record``, from ``now_s`` on. The caller reads the statuses and the clock."""

    def __init__(self, record: BackendRecord, now_s: float) -> None:
        self._record, self._started_s = record, now_s
        self._has_warned = False
        self._missing, self._missing_since_s = "", now_s

    def is_over(self, status: BackendStatus | None, now_s: float) -> bool:
        """Return whether the rollout is complete.

        Args:
            status: the status of the backend; None if there is none yet, or none of this version and configuration.
            now_s: the time.

        Raises:
            BackendError: a replica could not start, or did not apply the configuration.
            ConfigError: the cluster does not have the resources, and has not got them in time.
        """
        if status is not None:
            if status.rolled_out:
                return True
            if status.failing:
                raise _with_hint(from_wire(status.failing), self._record.runtime_env or {})
            if status.lacking:
                raise ConfigError(f"backend {self._record.tag!r}: {status.lacking}")
            if self._waits_for_nodes(status.waits_for_nodes or "", now_s):
                self._started_s = now_s
                return False
        if not self._has_warned and now_s - self._started_s > _SLOW_START_S:
            self._has_warned = True
            ready, wanted = (0, 0) if status is None else (status.ready, status.wanted)
            log.warning(_STILL_STARTING, self._record.tag, _SLOW_START_S, ready, wanted)
        return False

    def _waits_for_nodes(self, missing: str, now_s: float) -> bool:
        if missing != self._missing:  # A node has joined, or left.
            self._missing, self._missing_since_s = missing, now_s
            if missing:
                log.warning(_WAITING, self._record.tag, missing)
        elif missing and now_s - self._missing_since_s > NODES_WAIT_S:
            raise ConfigError(
                f"backend {self._record.tag!r}: {missing}; Ray's autoscaler has added no node for it within "
                f"{NODES_WAIT_S:g} s: `ray status` shows its limits and its errors"
            )
        return bool(missing)


def _with_hint(error: PenstockError, runtime_env: Mapping[str, Any]) -> PenstockError:
    """Return the error of a replica's start; that of a missing module with the way to provide it."""
    if not isinstance(error, BackendError) or error.type_name != "ModuleNotFoundError":
        return error
    hint = "name the directory of a module of yours as working_dir, or the module in py_modules, of runtime_env"
    if (working_dir := runtime_env.get(WORKING_DIR)) is not None:
        hint = (
            f"the working_dir of runtime_env, {working_dir!r}, does not contain it: name the directory that does; a "
            "relative one begins at the current directory of the process that deploys"
        )
    return BackendError(error.type_name, f"{error.message}; {hint}", error.traceback, error.status)
