"""The watchdog of an embedded server: runs the server while its owner lives, then ends it and removes its files.

It is a script, and imports only small modules of the standard library, because it stays in memory as long as the
server::

    python -I -S _watchdog.py OWNER_PID DIRECTORY SERVER [ARGUMENT ...]

The owner is the parent of this process and holds the other ends of its standard input and output. A byte on standard
input, its end, or another parent process means that the owner has ended or stops the server: then the server is ended
and ``DIRECTORY`` removed. Events go to standard output, one a line: ``up PID`` and ``down EXIT_CODE``.

This process may be killed together with its owner: Ray kills the children of a worker that it ends. A *janitor*, forked
from this process, then removes the directory.
"""

import fcntl
import os
import select
import signal
import sys
import time

_CHECK_S = 0.25
"""Time between two checks of the parent. Usually the pipe ends at once when the owner dies, but children that the owner
forked may hold its other end open.
"""

_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 1.0
_SETTLED_S = 2.0
"""A server that lived this long is restarted at once, any other after twice the last delay."""

_TERMINATE_S = 0.8
"""How long a server may take to end before it is killed. Killing it loses no write that it has answered: such writes
have reached the operating system.
"""

_LOG_LIMIT_BYTES = 1024 * 1024

_PR_SET_PDEATHSIG = 1

if sys.platform == "linux":
    import ctypes

    _prctl = ctypes.CDLL(None, use_errno=True).prctl


def main(owner_pid: int, directory: str, command: list[str]) -> None:
    os.umask(0o077)
    wake_fd = _wake_on_signals()
    janitor_pid = _fork_janitor(directory)
    server_pid = 0
    delay_s = 0.0
    started_at = start_at = time.monotonic()

    while True:
        now = time.monotonic()
        if not server_pid and now >= start_at:
            server_pid, started_at = _launch(command, os.path.join(directory, "broker.log")), now
            _report(f"up {server_pid}")

        if _owner_left(owner_pid, wake_fd, _CHECK_S if server_pid else min(_CHECK_S, start_at - now)):
            break

        if server_pid and (exit_code := _exit_code(server_pid)) is not None:
            server_pid = 0
            _report(f"down {exit_code}")
            now = time.monotonic()
            settled = now - started_at >= _SETTLED_S
            start_at = now + (0.0 if settled else delay_s)
            delay_s = _FIRST_DELAY_S if settled else min(max(2 * delay_s, _FIRST_DELAY_S), _LONGEST_DELAY_S)

    if server_pid:
        _end(server_pid)
    _remove(directory)
    os.kill(janitor_pid, signal.SIGKILL)
    os.waitpid(janitor_pid, 0)


def _wake_on_signals() -> int:
    """Return a descriptor that becomes readable when a signal arrives.

    Only the death of the server matters. Signals that ask for an end, such as SIGTERM, are ignored: the owner may need
    the server for its own shutdown, and ends this process afterwards.
    """
    # The owner may have blocked signals. The server would inherit the mask, and ignored signals.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A handler and not SIG_IGN, which the server would inherit.
        signal.signal(number, lambda _number, _frame: None)
    return read_fd


def _fork_janitor(directory: str) -> int:
    """Start the process that removes ``directory`` when the owner, all watchdogs and the server have ended."""
    if pid := os.fork():
        return pid
    try:
        signal.set_wakeup_fd(-1)
        stdin_fd = 0
        # An open lock or pipe would look like a live watchdog.
        for fd in map(int, os.listdir("/dev/fd")):
            if fd != stdin_fd:
                _close(fd)
        select.select([stdin_fd], [], [])
        fcntl.flock(os.open(directory, os.O_RDONLY), fcntl.LOCK_EX)
        _remove(directory)
    finally:
        os._exit(0)


def _close(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:
        pass  # the descriptor of the listing is closed already


def _owner_left(owner_pid: int, wake_fd: int, wait_s: float) -> bool:
    """Wait for an event, at most ``wait_s`` seconds; return whether the owner has ended or stops the server."""
    stdin_fd = 0
    readable, _, _ = select.select([stdin_fd, wake_fd], [], [], max(wait_s, 0.0))
    if wake_fd in readable:
        os.read(wake_fd, 4096)
    return stdin_fd in readable or os.getppid() != owner_pid


def _launch(command: list[str], log_path: str) -> int:
    """Start the server, its output appended to ``log_path``, and return its process id.

    If the command cannot be run, the reason goes to the log and the process ends with exit code 127.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    if os.path.exists(log_path) and os.path.getsize(log_path) > _LOG_LIMIT_BYTES:
        flags |= os.O_TRUNC  # a server that cannot start must not fill the disk
    watchdog_pid = os.getpid()
    if pid := os.fork():
        return pid
    try:
        log_fd = os.open(log_path, flags, 0o600)
        null_fd = os.open(os.devnull, os.O_RDONLY)
        for fd, standard_fd in ((null_fd, 0), (log_fd, 1), (log_fd, 2)):
            os.dup2(fd, standard_fd)
        if sys.platform == "linux":
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == watchdog_pid:  # else the watchdog died before the call of prctl
            os.execv(command[0], command)
    except BaseException as error:
        os.write(2, f"cannot run {command[0]}: {error}\n".encode(errors="replace"))
    finally:
        os._exit(127)


def _exit_code(pid: int) -> int | None:
    ended_pid, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended_pid else None


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)
    ends_at = time.monotonic() + _TERMINATE_S
    while _exit_code(pid) is None:
        if time.monotonic() > ends_at:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return
        time.sleep(0.01)


def _remove(directory: str) -> None:
    for folder, folders, files in os.walk(directory, topdown=False):
        for name in files:
            os.unlink(os.path.join(folder, name))
        for name in folders:
            os.rmdir(os.path.join(folder, name))
    os.rmdir(directory)


def _report(message: str) -> None:
    try:
        os.write(1, f"{message}\n".encode())
    except BrokenPipeError:
        pass  # the owner has died, which the next check finds


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
