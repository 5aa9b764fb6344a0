"""Run one command, and end everything it ever started.

Servers leave processes behind that no process group holds: Ray's daemons, an HAProxy that outlives ``ray stop``.
The reaper is the *subreaper* of the command, so such orphans become its children and are found by their parent's
id. It ends them when its standard input closes, which also happens when the benchmark itself is killed; when it is
told to by SIGTERM; or when the command has left by itself.

    python reaper.py GRACE_S COMMAND [ARGUMENT…]
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PID = "BENCHMARK_KEEPER"
"""The environment variable by which programs know their reaper."""
PR_SET_CHILD_SUBREAPER = 36
KILL_WITHIN_S = 10.0


def parents() -> dict[int, int]:
    """The parent of every process that there is."""
    found: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                # The name in brackets may itself hold brackets and spaces; nothing after the last one does.
                found[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def descendants(of: int) -> Iterator[int]:
    """Every process below ``of``, parents first."""
    below: dict[int, list[int]] = {}
    for pid, parent in parents().items():
        below.setdefault(parent, []).append(pid)
    waiting = list(below.get(of, ()))
    while waiting:
        pid = waiting.pop(0)
        yield pid
        waiting.extend(below.get(pid, ()))


def reap() -> dict[int, int]:
    """Collect children that have left: their ids and exit codes."""
    left: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            left[pid] = os.waitstatus_to_exitcode(status)
    return left


def ask_to_leave(main: int, grace_s: float) -> None:
    """Let the command end its own business, for a while."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(main, signal.SIGTERM)
    give_up = time.monotonic() + grace_s
    while main not in reap() and time.monotonic() < give_up:
        time.sleep(0.02)


def kill_the_rest() -> None:
    """Kill whatever is below us until nothing is."""
    give_up = time.monotonic() + KILL_WITHIN_S
    while time.monotonic() < give_up and (still := list(descendants(os.getpid()))):
        for pid in still:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
        reap()


def main(grace_s: float, command: list[str]) -> int:
    """Keep ``command`` until it leaves, standard input closes or SIGTERM arrives."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "this system cannot make a process a subreaper; Linux 3.4 can")
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**os.environ, PID: str(os.getpid())}).pid
    selector = selectors.DefaultSelector()
    selector.register(woken, selectors.EVENT_READ)
    selector.register(sys.stdin, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fd == woken and signal.SIGTERM not in os.read(woken, 4096):
                if (code := reap().get(child)) is None:
                    continue
                kill_the_rest()
                return code if code >= 0 else 128 - code
            ask_to_leave(child, grace_s)
            kill_the_rest()
            return 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
