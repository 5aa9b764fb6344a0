"""Programs under test: started under a reaper, watched, and ended by their ids."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from . import reaper

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
GRACE_S = 3.0
END_WITHIN_S = GRACE_S + reaper.KILL_WITHIN_S + 5.0


class ProgramFailed(Exception):
    """A program under test failed; the end of its output is in the message."""


class Program:
    """One command, everything it starts, and a folder of its own that goes with it.

    As a context manager: on leaving, whatever the reason, all of its processes are gone.
    """

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
        # Ray makes Unix sockets far below this folder, and their paths must stay under 108 bytes.
        self.scratch = Path(tempfile.mkdtemp(prefix="bench-", dir="/tmp"))
        self._log = self.scratch / "output"
        environment = {**os.environ, "TMPDIR": str(self.scratch), "RAY_TMPDIR": str(self.scratch), **(env or {})}
        environment.pop("RAY_ADDRESS", None)  # a cluster that happens to run here is none of our business
        with self._log.open("wb") as log:
            self._reaper = subprocess.Popen(
                [sys.executable, reaper.__file__, str(GRACE_S), *command],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                env=environment, cwd=self.scratch, start_new_session=True,
            )  # fmt: skip

    def output(self, last: int = 4_000) -> str:
        """The end of its output."""
        return self._log.read_text(errors="replace")[-last:]

    def wait_until(self, ready: Callable[[], bool], *, within_s: float) -> float:
        """Wait until ``ready()``, and return how long that took.

        Raises:
            ProgramFailed: it left, or was not ready in time.
        """
        began = time.monotonic()
        while not ready():
            took_s = time.monotonic() - began
            if self._reaper.poll() is not None:
                raise ProgramFailed(f"left with {self._reaper.returncode} before it was ready:\n{self.output()}")
            if took_s > within_s:
                raise ProgramFailed(f"was not ready after {took_s:.0f} s:\n{self.output()}")
            time.sleep(0.02)
        return time.monotonic() - began

    def run_to_end(self, *, within_s: float) -> str:
        """Wait until it leaves by itself, and return all it printed.

        Raises:
            ProgramFailed: it left with an error, or not in time.
        """
        try:
            code = self._reaper.wait(within_s)
        except subprocess.TimeoutExpired:
            raise ProgramFailed(f"was still running after {within_s:.0f} s:\n{self.output()}") from None
        if code != 0:
            raise ProgramFailed(f"left with {code}:\n{self.output()}")
        return self._log.read_text(errors="replace")

    def cpu_s(self) -> dict[int, tuple[str, float]]:
        """Name and CPU seconds so far of every process of it that lives."""
        return cpu_s_below(self._reaper.pid)

    def end(self) -> None:
        """End all of its processes and remove its folder. May be called twice."""
        if self._reaper.stdin is not None:
            self._reaper.stdin.close()
        try:
            self._reaper.wait(END_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._reaper.kill()
            self._reaper.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


def cpu_s_below(keeper_pid: int) -> dict[int, tuple[str, float]]:
    """Name and CPU seconds so far of every process that lives below a reaper."""
    used: dict[int, tuple[str, float]] = {}
    for pid in reaper.descendants(keeper_pid):
        with contextlib.suppress(OSError, IndexError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            used[pid] = name_of(pid), (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    return used


def name_of(pid: int) -> str:
    """A short name for a process: its title, or the program or module that its Python runs."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    title = words[0].strip()
    if "ray::" in title:
        return re.sub(r"[#:].*", "", title.replace("ray::", "ray ").split(":")[0].split("(")[0])
    name = Path(title.split(" ")[0]).name
    if name.startswith("python"):
        for word in words[1:]:
            if "multiprocessing" in word:
                return "python worker"
            if word.endswith(".py") or (word and not word.startswith("-") and " " not in word):
                return Path(word).name
    return name or f"pid {pid}"


def busy_s() -> float:
    """CPU seconds that the whole machine has spent on anything, time stolen by its host included."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S
