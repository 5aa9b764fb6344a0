"""Processes below this one, by ``/proc``: found by their ancestors, and killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_KILL_S = 5.0
"""Longest wait for the end of killed processes."""


def descendants() -> dict[int, str]:
    """Return the command lines of this process's descendants by process id; empty where there is no /proc."""
    parents: dict[int, int] = {}
    commands: dict[int, str] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):  # The process has ended.
            pid = int(entry.name)
            # The command in parentheses may contain spaces and parentheses.
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[pid] = int(parent)
                commands[pid] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    found, generation = dict[int, str](), {os.getpid()}
    while generation:
        generation = {pid for pid, parent in parents.items() if parent in generation and pid not in found}
        found.update((pid, commands.get(pid, "")) for pid in generation)
    return found


def kill(pids: Iterable[int]) -> None:
    """Kill processes and wait until they have ended."""
    left = set(pids)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    ends_at_s = time.monotonic() + _KILL_S
    while left and time.monotonic() < ends_at_s:
        for pid in set(left):
            with suppress(ChildProcessError):  # A grandchild: init reaps it.
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    continue
            left.discard(pid)
        time.sleep(0.01)
