"""Directories of embedded servers, and the locks that show that one is in use.

The locks (``flock``) end with the last process that holds them, however it dies.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

from ..errors import EmbeddedServerError

SOCKET_NAME = "broker.sock"
LOG_NAME = "broker.log"

_DIRECTORY_PREFIX = "penstock-broker-"
_LOCK_NAME = "penstock.lock"

_SOCKET_PATH_LIMIT_BYTES = 103
"""Longest address of a Unix socket on macOS; Linux allows four bytes more."""

_LOCK_WAIT_S = 2.0
"""How long to wait for a lock. The server of an owner that was just killed needs about a second to end."""


def prepare_data_dir(data_dir: Path | str) -> Path:
    """Create a data directory for this user alone if it is missing; return its absolute path."""
    path = Path(data_dir).absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise EmbeddedServerError(f"data_dir {str(path)!r} cannot be created: {error}") from error
    return path


def make_private_directory() -> Path:
    """Return a new directory for this user alone, with a path that is short enough for the address of a socket.

    Removes directories whose processes were all killed at once.
    """
    for parent in (tempfile.gettempdir(), "/tmp"):
        _sweep(Path(parent))
        directory = Path(tempfile.mkdtemp(prefix=_DIRECTORY_PREFIX, dir=parent))
        if len(os.fsencode(directory / SOCKET_NAME)) <= _SOCKET_PATH_LIMIT_BYTES:
            return directory
        directory.rmdir()
    raise AssertionError("/tmp is short")


def _sweep(parent: Path) -> None:
    """Remove the directories of servers that were killed together with their watchdogs and owners."""
    for directory in parent.glob(f"{_DIRECTORY_PREFIX}*"):
        with contextlib.suppress(OSError):
            # A directory without a log may be so new that it is not locked yet.
            if directory.stat().st_uid == os.geteuid() and (directory / LOG_NAME).exists():
                fd = open_directory(directory)
                try:
                    if lock(fd, wait_s=0):
                        shutil.rmtree(directory)
                finally:
                    os.close(fd)


def open_directory(directory: Path) -> int:
    """Return a file descriptor of a directory, for `lock`. The lock also keeps systemd-tmpfiles from removing it."""
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


@contextlib.contextmanager
def locked_data_dir(data_dir: Path) -> Generator[int, None, None]:
    """Lock a data directory; yield the file descriptor that holds the lock.

    Raises:
        EmbeddedServerError: another server uses the directory, or it is not writable.
    """
    # A file and not the directory: network file systems lock only files that are open for writing.
    try:
        fd = os.open(data_dir / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise EmbeddedServerError(f"data_dir {str(data_dir)!r} cannot be used: {error}") from error
    try:
        if not lock(fd, _LOCK_WAIT_S):
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
            raise EmbeddedServerError(
                f"data_dir {str(data_dir)!r} is in use by the embedded server of process {holder or 'unknown'}: "
                "stop that process first, or give another directory"
            )
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        yield fd
    finally:
        os.close(fd)


def lock(fd: int, wait_s: float) -> bool:
    """Lock a file or directory, waiting at most ``wait_s`` seconds; return whether it is locked."""
    ends_at = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= ends_at:
                return False
        time.sleep(0.02)
