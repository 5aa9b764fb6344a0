"""Python scripts that run in forks of one process, which has imported what they need.

Imports of Ray and Penstock take a second or two of processor time, and the tests start hundreds of processes. A fork is
a process of its own with the arguments, the environment, the directory, the signal mask, the files and the network that
it was started with; only its imports are done already.
"""

from __future__ import annotations

import gc
import importlib
import marshal
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import IO

_OWN_NETWORK = "/proc/self/ns/net"
_CLONE_NEWNET = 0x40000000

_LAUNCHER = """\
#!{python} -ISB
import marshal, os, sys, _signal, _socket
arguments = sys.argv[1:]
if arguments[:1] == ["-u"]:
    del arguments[0]  # a fork's output has the buffers of Python's own
if not arguments or not arguments[0].endswith({scripts!r}):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
{connect}
forwarded = (_signal.SIGINT, _signal.SIGTERM)
mask = [int(number) for number in _signal.pthread_sigmask(_signal.SIG_BLOCK, forwarded)]
request = marshal.dumps((arguments, dict(os.environ), os.getcwd(), mask))
numbers = [0, 1, 2]
if os.path.exists({network!r}):
    numbers.append(os.open({network!r}, os.O_RDONLY))
files = b"".join(number.to_bytes(4, sys.byteorder) for number in numbers)
try:
    connection.sendmsg([len(request).to_bytes(4, "big")], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, files)])
    connection.sendall(request)
    fork = int.from_bytes(connection.recv(4), "big")
except OSError:
    fork = 0
if not fork:  # the process that forks has ended
    _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)
    os.execv({python!r}, [{python!r}, *arguments])
for number in forwarded:
    _signal.signal(number, lambda number, _: os.kill(fork, number))
_signal.pthread_sigmask(_signal.SIG_SETMASK, mask)
code = int.from_bytes(connection.recv(4), "big", signed=True)
if code < 0:
    _signal.pthread_sigmask(_signal.SIG_SETMASK, [])
    if -code != _signal.SIGKILL:
        _signal.signal(-code, _signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""
"""Imports nothing that takes time. It lives as long as the fork, forwards signals to it, and is killed with it."""

_CONNECT = """\
connection = _socket.socket(_socket.AF_UNIX)
connection.connect({path!r})
"""


def write_launcher(program: Path, scripts: tuple[str, ...], connect: str) -> None:
    """Write a program with the arguments of Python.

    Args:
        program: its path.
        scripts: what the first argument must end with to be run in a fork; all else runs in Python as usual.
        connect: code that sets ``connection`` to a socket of a process that forks, and may change ``arguments``.
    """
    filled = _LAUNCHER.format(python=sys.executable, scripts=scripts, connect=connect, network=_OWN_NETWORK)
    program.write_text(filled)
    program.chmod(0o700)


class ForkServer:
    """A process that runs scripts in forks, until `close`.

    Args:
        directory: a new one, for its files; removed with it.
        imports: the modules that it imports first.
        scripts: what the first argument of Python must end with to be run in a fork; all else runs in Python as usual.
        first: code that each fork runs before its script.
        environment: variables of the process, besides those of this one. A fork has its own; some imports read them.
    """

    def __init__(
        self,
        directory: Path,
        imports: Sequence[str],
        scripts: tuple[str, ...],
        first: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._directory = directory
        self.path = str(directory / "forks")
        """The socket that launchers connect to."""
        self.python = directory / "python"
        """A program with the arguments of Python."""
        write_launcher(self.python, scripts, _CONNECT.format(path=self.path))
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", __name__, self.path, first, *imports]
        environ = {**os.environ, **(environment or {})}
        # There is the package `tests`; the folder of a test may be another one.
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, start_new_session=True, env=environ, cwd=Path(__file__).parents[2]
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def close(self) -> None:
        """End the process, and with it every fork that runs still; remove the directory."""
        with self._process:
            pass  # which closes its standard input
        shutil.rmtree(self._directory)


_shared: dict[tuple[str, ...], ForkServer] = {}


def shared_forks(*imports: str, environment: Mapping[str, str] | None = None) -> ForkServer:
    """Return the server of this run that has made these imports and runs code, modules' files and other scripts.

    ``environment`` is that of `ForkServer`, for the first call.
    """
    if imports not in _shared:
        directory = Path(tempfile.mkdtemp())
        _shared[imports] = ForkServer(directory, imports, ("-c", ".py"), environment=environment)
    return _shared[imports]


def close_shared_forks() -> None:
    """End all of them."""
    for server in _shared.values():
        server.close()
    _shared.clear()


class Request:
    """A script to run, with all that a process is started with."""

    def __init__(self, connection: socket.socket) -> None:
        """Read it. Raises ``EOFError`` if its launcher was killed meanwhile."""
        head, files, _, _ = socket.recv_fds(connection, 4, 4)
        self._files, self._networks = files[:3], files[3:]
        try:
            with connection.makefile("rb") as sent:
                fields = marshal.loads(sent.read(int.from_bytes(head, "big")))
        except (EOFError, OSError) as e:
            self.close()
            raise EOFError from e
        self._arguments, self._environ, self._directory, self._mask = fields

    def close(self) -> None:
        """Close its files in a process that does not run it."""
        for file in (*self._files, *self._networks):
            os.close(file)

    def run(self, first: str = "") -> None:
        """Run it in this process, as Python does; before it ``first``."""
        os.setpgid(0, 0)  # Ray kills the group of a worker that ends
        for standard, file in enumerate(self._files):
            os.dup2(file, standard)
            os.close(file)
        for network in self._networks:
            if not os.path.samestat(os.fstat(network), os.stat(_OWN_NETWORK)):  # entering takes root
                enter_network(network)
            os.close(network)
        before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        os.environ.clear()
        os.environ.update(self._environ)
        os.chdir(self._directory)
        script, *arguments = self._arguments
        path = ["" if script == "-c" else str(Path(script).parent)]
        path += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        sys.path[:] = [*path, *(entry for entry in sys.path[1:] if entry not in before)]
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        exec(first)
        if script == "-c":
            code, *arguments = arguments
            sys.argv[:] = ["-c", *arguments]
            sys.modules["__main__"] = main = ModuleType("__main__")
            exec(compile(code, "<string>", "exec"), main.__dict__)
        else:
            sys.argv[:] = [script, *arguments]
            runpy.run_path(script, run_name="__main__")


class Forking:
    """The loop of a process that forks.

    Args:
        listening: where launchers connect.
        end: what is readable when the process is to end.
        lingers: whether it then waits for its forks, which end by themselves, in place of killing them.
        idle_s: it also ends when it has had no fork for so long.
    """

    def __init__(
        self, listening: socket.socket, end: int | IO[bytes], *, lingers: bool = False, idle_s: float | None = None
    ) -> None:
        self._selector = selectors.DefaultSelector()
        self._listening, self._end, self._lingers, self._timeout_s = listening, end, lingers, idle_s
        self._ended, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno())
        signal.signal(signal.SIGCHLD, _do_nothing)
        for file in (self._listening, self._ended, end):
            self._selector.register(file, selectors.EVENT_READ)
        self._launchers: dict[int, socket.socket] = {}

    def wait_for_request(self) -> Request | None:
        """Return in a fork for each request; None in this process, when it is to end."""
        while True:
            events = self._selector.select(self._timeout_s)
            if not events and not self._launchers:
                return None
            for key, _ in events:
                if key.fileobj is self._end:
                    if not self._lingers:
                        self._kill_forks()
                        return None
                    self._selector.unregister(self._end)
                    self._timeout_s = _LINGER_S
                elif key.fileobj is self._ended:
                    self._ended.recv(1000)
                    self._report_ended()
                elif key.fileobj is self._listening:
                    if (request := self._accept()) is not None:
                        return request
                elif self._launchers.get(key.data) is key.fileobj:
                    os.kill(key.data, signal.SIGKILL)  # its launcher was killed
                    self._selector.unregister(key.fileobj)

    def _accept(self) -> Request | None:
        """Fork for a request; return it in the fork."""
        launcher, _ = self._listening.accept()
        try:
            request = Request(launcher)
        except EOFError:
            launcher.close()
            return None
        if (pid := os.fork()) == 0:
            launcher.close()
            self._leave()
            return request
        request.close()
        with suppress(OSError):  # it was killed, which the end of its connection shows
            launcher.sendall(pid.to_bytes(4, "big"))
        self._launchers[pid] = launcher
        self._selector.register(launcher, selectors.EVENT_READ, pid)
        return None

    def _kill_forks(self) -> None:
        signal.set_wakeup_fd(-1)
        for pid in self._launchers:
            os.kill(pid, signal.SIGKILL)

    def _report_ended(self) -> None:
        """Send the exit codes of the forks that have ended to their launchers."""
        while self._launchers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            with self._launchers.pop(pid) as launcher:
                if launcher in self._selector.get_map():
                    self._selector.unregister(launcher)
                with suppress(OSError):
                    launcher.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))

    def _leave(self) -> None:
        """Close in a fork what is not its own."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        if isinstance(self._end, int):
            os.close(self._end)
        for file in (self._listening, self._ended, self._wakeup, *self._launchers.values()):
            file.close()


_LINGER_S = 0.2
"""Without a fork, after the end."""


def _do_nothing(*_: object) -> None:
    """Handle SIGCHLD: a signal that is ignored would not wake the selector."""


def enter_network(file: int) -> None:
    """Move the calling thread into a network namespace, of which ``file`` is open."""
    # Python 3.12 has os.setns for this.
    import ctypes  # none of the other forks needs it

    if ctypes.CDLL(None, use_errno=True).setns(file, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter the network namespace")


def import_and_freeze(imports: Sequence[str]) -> None:
    """Import the modules for all forks, none of which copies them by collecting garbage."""
    for name in imports:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def _main(path: str, first: str, *imports: str) -> None:
    import_and_freeze(imports)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(64)
    forking = Forking(listening, sys.stdin.buffer)
    print("ready", flush=True)
    if (request := forking.wait_for_request()) is not None:
        del forking
        request.run(first)


if __name__ == "__main__":
    _main(*sys.argv[1:])
