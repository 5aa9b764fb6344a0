"""Ray's workers and agents as forks of processes that have done their imports.

Ray starts a Python for every actor, which spends more than a second of processor time on imports before it runs
anything. Here the first worker of a node starts a process that makes the imports once, and this worker and all later
ones of the node are forks of it. Ray knows a worker by the process id that it registers itself with, which is the
fork's. The agents of a node, for which it waits as it starts, and the dashboard of a head can be forks of one process
of the run.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from tests.support.forks import Forking, ForkServer, import_and_freeze, shared_forks, write_launcher

IMPORTS = (
    *("ray", "ray._private.node", "ray._private.async_compat", "ray._private.runtime_env.setup_hook", "uvloop"),
    *("penstock.proxy.proxy", "penstock.workers.replica", "penstock.workers.runtime_env"),
    *("penstock.serve.instance", "penstock.serve.controller.planner", "penstock.serve.controller.autoscaler"),
)
"""None makes an actor class. That takes a random number from Ray, and those after it would be alike in all forks."""

_SCRIPTS = ("ray/_private/workers/default_worker.py", "ray/_private/workers/setup_worker.py")

_AGENT_IMPORTS = (
    *("ray.dashboard.agent", "ray.dashboard.dashboard", "ray._private.runtime_env.agent.main"),
    *("ray.autoscaler._private.monitor", "ray.autoscaler.v2.monitor"),
)
_AGENTS = tuple(f"{name.replace('.', '/')}.py" for name in _AGENT_IMPORTS)

ENVIRONMENT = {
    # By default an agent ends unless its parent process is the raylet.
    "RAY_enable_pipe_based_agent_to_parent_health_check": "1",
    # A process that forks has read it already.
    "RAY_AUTH_MODE": "disabled",
}
"""The variables of a Ray whose agents are forks."""

_NO_JOB = "ffffffff"
_PREFIX = "workers-of-tests-"

_IDLE_S = 20.0
"""A process that has had no worker for so long ends. The next worker starts another one."""

# Ray reads the raylet's process id and its settings from the environment when it is imported. So workers of one
# environment share a process. The job is read then too; a worker of none gets it with its first actor. The first
# launcher makes the socket, and the others wait in its backlog.
_CONNECT = """\
import time, zlib
if arguments[0].endswith({agents!r}):
    connection = _socket.socket(_socket.AF_UNIX)
    connection.connect({agents_path!r})
else:
    arguments = [argument.replace({env_of_python!r}, {env_of_launcher!r}) for argument in arguments]
    variables = sorted(variable for variable in os.environ.items() if variable[0] != "RAY_JOB_ID")
    path = {directory!r} + "/%08x" % zlib.crc32(marshal.dumps(variables))
    for _ in range(500):
        connection = _socket.socket(_socket.AF_UNIX)
        try:
            connection.connect(path)
            break
        except OSError:
            pass
        try:
            connection.bind(path)
        except OSError:
            time.sleep(0.01)  # another one has just made it, or a process that forks is about to remove it
            continue
        connection.listen(64)
        os.set_inheritable(connection.fileno(), True)
        command = [{python!r}, "-c", {code!r}, path, str(connection.fileno())]
        null = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1)]
        environ = {{**os.environ, "RAY_JOB_ID": {no_job!r}}}
        os.posix_spawn({python!r}, command, environ, file_actions=null, setsid=True)
        connection.close()
    else:
        os.execv({python!r}, [{python!r}, *arguments])
"""

_FORKS = "from tests.support.ray_workers import fork_workers"
_CODE = f"import sys; sys.path[0] = {{root!r}}; {_FORKS}; fork_workers(*sys.argv[1:])"


def forks_with_ray() -> ForkServer:
    """Return what runs scripts that use Ray."""
    return shared_forks(*IMPORTS)


def _agents() -> ForkServer:
    """Return what runs Ray's agents."""
    return shared_forks(*_AGENT_IMPORTS, environment=ENVIRONMENT)


class RayWorkers:
    """A place for processes whose forks are workers, until the end of the context.

    Args:
        agents: whether agents are forks too. Their Ray needs the variables of `ENVIRONMENT`.
    """

    def __init__(self, *, agents: bool = False) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self.python = self._directory / "python"
        """A program with the arguments of Python, which raylets start their workers with."""
        environment = '"py_executable": "{}"'.format
        connect = _CONNECT.format(
            python=sys.executable,
            no_job=_NO_JOB,
            directory=str(self._directory),
            code=_CODE.format(root=str(Path(__file__).parents[2])),
            env_of_python=environment(sys.executable),
            env_of_launcher=environment(self.python),
            agents=_AGENTS,
            agents_path=_agents().path if agents else "",
        )
        write_launcher(self.python, (*_SCRIPTS, *_AGENTS) if agents else _SCRIPTS, connect)

    @contextmanager
    def of_the_ray_that_is_started(self) -> Generator[None]:
        """Let a Ray that is started in the context start its workers here, also after it. On Linux only."""
        python = str(self.python) if hasattr(os, "pidfd_open") else sys.executable
        with mock.patch.object(sys, "executable", python):
            yield

    @staticmethod
    def made(command_line: str) -> bool:
        """Return whether a process, by its arguments with a NUL after each, is a launcher or one that forks."""
        # A raylet's later arguments name the program that it starts workers with.
        return any(_PREFIX in argument or _FORKS in argument for argument in command_line.split("\0")[:3])

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._directory)


def fork_workers(path: str, listening: str) -> None:
    """Fork a worker for each connection, until its raylet has ended or none was started for a while."""
    raylet = os.pidfd_open(int(os.environ["RAY_RAYLET_PID"]))
    import_and_freeze(IMPORTS)
    forking = Forking(socket.socket(fileno=int(listening)), raylet, lingers=True, idle_s=_IDLE_S)
    if (request := forking.wait_for_request()) is None:
        Path(path).unlink(missing_ok=True)
        request = forking.wait_for_request()  # of a launcher that had connected before
    if request is not None:
        del forking
        request.run()
