"""The connection of this process to a Ray cluster, which is started on this machine if necessary."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import ray

from ..broker.errors import ConfigError, PenstockError
from ..runtime.processes import descendants, kill

_REACHABLE_S = 1.5
"""How long a node of a Ray cluster may take to accept a connection."""

NICENESS = "RAY_worker_niceness"
"""The variable by which Ray sets the niceness of replicas and proxies."""

DEFAULT_NICENESS = 0
"""Ray's own default is 15. On a busy machine that leaves replicas hardly any time: a p50 of 0.3 s became 24 s."""


def join_ray(*, detached: bool) -> bool:
    """Connect this process to Ray unless it is connected; return whether this connected it.

    It connects to the cluster of ``RAY_ADDRESS``. Without one, a detached instance needs the cluster that ``ray start``
    has started on this machine, and any other instance gets a local cluster that ends with this process.

    Raises:
        ConfigError: there is no cluster that outlives this process, or that of ``RAY_ADDRESS`` cannot be reached.
        PenstockError: a local cluster cannot be started.
    """
    if ray.is_initialized():
        return False
    if address := os.environ.get("RAY_ADDRESS"):
        join_address(address, logging_level=logging.ERROR)
    elif not detached:
        _start_local_ray()
    elif not join_lasting_ray(logging_level=logging.ERROR):
        raise ConfigError(
            "a detached instance outlives this process, and so must its Ray cluster: none was started on this machine, "
            "and RAY_ADDRESS is not set; `ray start --head` starts one"
        )
    return True


def leave_ray() -> None:
    """Disconnect this process from Ray. A local cluster that `join_ray` has started ends."""
    cast(Any, ray.shutdown)()


def join_address(address: str, **options: Any) -> None:
    """Connect to the cluster at ``address``. Raises `ConfigError` if it cannot be reached."""
    _check_reachable(address)
    try:
        cast(Any, ray.init)(address=address, **options)
    except (ConnectionError, RuntimeError) as e:
        hint = "" if "RAY_AUTH_MODE" in os.environ else "; if it requires a token, set RAY_AUTH_MODE=token"
        raise ConfigError(f"the Ray cluster at {address} (RAY_ADDRESS) cannot be reached: {e}{hint}") from None


def _check_reachable(address: str) -> None:
    """Raise `ConfigError` unless ``address`` accepts connections. Ray itself would try for more than 100 s."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError as e:
        raise ConfigError(f"RAY_ADDRESS {address!r} is not an address such as '10.0.0.1:6379': {e}") from None
    if host is None or port is None:
        return  # "auto", "local", or a scheme whose port Ray knows
    try:
        socket.create_connection((host, port), timeout=_REACHABLE_S).close()
    except OSError as e:
        raise ConfigError(
            f"the Ray cluster at {address} (RAY_ADDRESS) cannot be reached: {e.strerror or e}; is it running? "
            "`ray start --head` starts one, and without RAY_ADDRESS a local one is started"
        ) from None


def join_lasting_ray(**options: Any) -> bool:
    """Connect to the cluster that ``ray start`` has started on this machine; return whether there is one.

    Ray's own search could also find the local cluster of a script, which ends with that script.
    """
    if not _may_have_lasting_ray():
        return False
    try:
        cast(Any, ray.init)(address="auto", **options)
    except ConnectionError:
        return False
    return True


def _may_have_lasting_ray() -> bool:
    """Return whether ``ray start`` has noted a cluster on this machine; True if this Ray does not tell."""
    try:
        from ray._private.utils import read_ray_address
    except ImportError:
        return True
    return bool(read_ray_address())


def join_or_start_lasting_ray() -> bool:
    """Connect to the cluster of ``RAY_ADDRESS``, or to that of this machine; return whether this had to start it.

    Raises:
        ConfigError: the cluster of ``RAY_ADDRESS`` cannot be reached.
        PenstockError: a cluster cannot be started.
    """
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address := os.environ.get("RAY_ADDRESS"):
        join_address(address, **options)
        return False
    if join_lasting_ray(**options):
        return False
    # Written first, so that it is known whatever the outcome is.
    print("no Ray cluster was started on this machine: starting one; `ray stop` ends it", file=sys.stderr, flush=True)
    # Port 0 is a free one. Ray's default port is that of Redis.
    arguments = ["start", "--head", "--port=0", "--include-dashboard=false"]
    command = [sys.executable, "-m", "ray.scripts.scripts", *arguments]
    with _niceness():
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode or not join_lasting_ray(**options):
        raise PenstockError(f"Ray cannot be started on this machine: {ran.stderr.strip()}{_logs()}")
    return True


@contextmanager
def _niceness() -> Generator[None]:
    """Let a Ray that is started meanwhile give its processes our default niceness, unless the environment names one."""
    if NICENESS in os.environ:
        yield
        return
    os.environ[NICENESS] = str(DEFAULT_NICENESS)
    try:
        yield
    finally:
        del os.environ[NICENESS]


def _start_local_ray() -> None:
    print("penstock: starting Ray on this machine", file=sys.stderr, flush=True)
    before = descendants()
    try:
        with _niceness():
            ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR)
    except BaseException as e:
        # Ray leaves the processes that it has started so far.
        with suppress(Exception):
            cast(Any, ray.shutdown)()
        kill(pid for pid, command in descendants().items() if pid not in before and _is_rays(command))
        if not isinstance(e, Exception):
            raise
        raise PenstockError(
            f"Ray cannot be started on this machine: {str(e).strip() or type(e).__name__}{_logs()}"
        ) from None


def _logs() -> str:
    """Return where the logs of the last start of Ray are, as the end of a sentence."""
    temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or tempfile.gettempdir()
    logs = Path(temporary, "ray", "session_latest", "logs")
    return f"; its logs are in {logs.resolve()}" if logs.is_dir() else ""


def _is_rays(command: str) -> bool:
    return str(Path(ray.__file__).parent) in command or command.startswith("ray::")
