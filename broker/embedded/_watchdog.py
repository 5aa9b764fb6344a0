"""The watchdog of an embedded server: runs it while its owner lives, then removes it and its files.

Run as a script, with the standard library's small modules only, because it stays in memory as long as the
server::

    python -I -S _watchdog.py OWNER_PID DIRECTORY SERVER [ARGUMENT ...]

The owner is the parent of this process and holds the other ends of standard input and output. Anything on
standard input, its end, or another parent means that the owner has gone or wants to stop: the server is ended
and ``DIRECTORY`` removed. Standard output tells the owner ``up PID`` and ``down EXIT_CODE``, one a line.

The owner may take this process along: Ray kills the children of a worker that it ends. So there is a *janitor*, forked
from this process, that removes the directory if this one could not.
"""

import fcntl
import os
import select
import signal
import sys
import time

_LOOK_S = 0.25
"""How often to look for the parent. Usually the pipe tells at once, but children that the owner forked may
hold its other end open after the owner has died."""

_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 1.0
_SETTLED_S = 2.0
"""A server that lived this long is restarted at once, the others after twice the delay of the time before."""

_TERMINATE_S = 0.8
"""How long a server may take to end in order. Killing it then loses nothing that it has answered: such writes
have reached the operating system."""

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
            _tell(f"up {server_pid}")

        if _owner_left(owner_pid, wake_fd, _LOOK_S if server_pid else min(_LOOK_S, start_at - now)):
            break

        if server_pid and (exit_code := _exit_code(server_pid)) is not None:
            server_pid = 0
            _tell(f"down {exit_code}")
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

    Of all signals only the death of the server matters. Requests to end are for the owner, which may need the
    server for its own orderly end; that is the one that ends this process.
    """
    # The owner may have blocked signals, and both the mask and ignored signals would reach the server.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A handler and not SIG_IGN, which the server would inherit.
        signal.signal(number, lambda _number, _frame: None)
    return read_fd


def _fork_janitor(directory: str) -> int:
    """Start the process that removes ``directory`` once the owner, all watchdogs and the server have gone."""
    if pid := os.fork():
        return pid
    try:
        signal.set_wakeup_fd(-1)
        stdin_fd = 0
        # What remains open must not pass for a living watchdog: neither our locks nor the owner's other pipe.
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
        pass  # the one that read the listing is closed already


def _owner_left(owner_pid: int, wake_fd: int, wait_s: float) -> bool:
    """Wait up to ``wait_s`` seconds, less when something happens, and return whether the owner has left."""
    stdin_fd = 0
    readable, _, _ = select.select([stdin_fd, wake_fd], [], [], max(wait_s, 0.0))
    if wake_fd in readable:
        os.read(wake_fd, 4096)
    return stdin_fd in readable or os.getppid() != owner_pid


def _launch(command: list[str], log_path: str) -> int:
    """Start the server, its output appended to ``log_path``, and return its process id.

    A command that cannot be run says so in the log and ends with exit code 127.
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
        if os.getppid() == watchdog_pid:  # else it died before we asked to be told
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
    give_up_at = time.monotonic() + _TERMINATE_S
    while _exit_code(pid) is None:
        if time.monotonic() > give_up_at:
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


def _tell(message: str) -> None:
    try:
        os.write(1, f"{message}\n".encode())
    except BrokenPipeError:
        pass  # the owner has died; the next look sees it


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
