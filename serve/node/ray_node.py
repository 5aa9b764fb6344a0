"""A node of a Ray cluster as a child of this process: ``ray start --block``, and its processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ...runtime.processes import descendants, kill
from ..ray_actors.proxy import HTTPProxy
from ..ray_actors.replica import ReplicaActor
from ..ray_cluster import NICENESS

PROXY, REPLICA = f"ray::{HTTPProxy.__name__}", f"ray::{ReplicaActor.__name__}"
"""The titles of the processes of proxies and replicas."""

DEAD_NODES = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}
"""Ray's variables for how soon its head counts a node as dead. Replicas that died with it are replaced only then.

That is after 3 s, or 12 s if the network says nothing of the node. By Ray's own defaults (3 s, 10 s, 5 times) it is
after 15 s, or a minute.
"""

_RAY = (sys.executable, "-m", "ray.scripts.scripts")
_DRAIN_CALL_S = 10.0
"""Longest time for Ray's head to accept that a node drains."""
_END_S = 10.0
"""Longest time for Ray to end its processes, before they are killed."""


@dataclass(frozen=True, slots=True)
class Raylet:
    """Ray's process on a node."""

    pid: int
    node_id: str
    gcs_address: str
    """The address of Ray's head."""


class RayNode:
    """A node, from its start to its end.

    Args:
        arguments: those of ``ray start``.
        niceness: the niceness of the node's replicas and proxies.
    """

    def __init__(self, arguments: Sequence[str], niceness: int) -> None:
        environment = {
            **DEAD_NODES,
            **os.environ,
            NICENESS: str(niceness),
            # The node has drained before Ray receives a signal.
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        }
        # In a session of its own, so that an interruption from the terminal does not reach Ray.
        self._ray = subprocess.Popen([*_RAY, "start", "--block", *arguments], env=environment, start_new_session=True)
        self._was_running = False
        self._command: subprocess.Popen[bytes] | None = None

    def raylet(self) -> Raylet | None:
        """Return Ray's process; None while there is none."""
        for pid, command in descendants().items():
            if not command.partition(" ")[0].endswith("/raylet"):
                continue
            node_id, gcs_address = _flag("node_id", command), _flag("gcs-address", command)
            if node_id and gcs_address:
                self._was_running = True
                return Raylet(pid, node_id, gcs_address)
        return None

    def has_ended(self) -> bool:
        """Return whether Ray has ended by itself; a node that has drained and is idle does so."""
        return self._ray.poll() is not None or (self.raylet() is None and self._was_running)

    def run(self, command: str) -> None:
        """Run a shell command with the address of this node's cluster."""
        raylet = self.raylet()
        assert raylet is not None
        environment = {**os.environ, "RAY_ADDRESS": raylet.gcs_address}
        self._command = subprocess.Popen(command, shell=True, env=environment)

    def run_failure(self) -> str:
        """Return how the command failed; empty if it has not."""
        code = None if self._command is None else self._command.poll()
        return f"the command of --on-ready failed with exit code {code}" if code else ""

    def serving(self, *titles: str) -> list[int]:
        """Return the processes with one of ``titles``."""
        return [pid for pid, command in descendants().items() if command.startswith(titles)]

    def drain(self, raylet: Raylet, within_s: float) -> str:
        """Let Ray's head record that the node drains, for the controllers to act on; return why it did not, or ""."""
        command = [
            *(*_RAY, "drain-node", f"--address={raylet.gcs_address}", f"--node-id={raylet.node_id}"),
            *("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=penstock node was asked to end"),
            f"--deadline-remaining-seconds={int(within_s)}",
        ]
        try:
            ran = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=min(_DRAIN_CALL_S, within_s)
            )
        except subprocess.TimeoutExpired as e:
            return f"no answer within {e.timeout:g} s"
        return (ran.stderr or ran.stdout).strip().rpartition("\n")[2] if ran.returncode else ""

    def end(self) -> None:
        """End Ray and every process that is left of it."""
        self._ray.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._ray.wait(_END_S)
        if left := descendants():
            kill(left)
        self._ray.wait()


def terminate(pids: Iterable[int]) -> None:
    """Send SIGTERM, on which a proxy or a replica drains."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def _flag(name: str, command: str) -> str:
    found = re.search(rf"--{name}=(\S+)", command)
    return "" if found is None else found[1]
