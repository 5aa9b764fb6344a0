"""Command line of every server under test: a port, a workload, a number of replicas.

A server program answers ``POST`` (and ``GET`` where its system has a word for it) on 127.0.0.1 alone, runs until
it is ended, and need not clean up: its reaper ends whatever it started.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

NOOP_ANSWER = {"ok": True}
SLEEP_S = 0.010
BATCH_CALLS_MS = (3, 10, 20, 50)
WORKLOADS = ("noop", "echo", "sleep", "digits", *(f"batch-{ms}" for ms in BATCH_CALLS_MS))
MAX_BATCH_SIZE = 64
BATCH_WAIT_S = 0.001
"""How long the peers let a batch of digits fill up: the least that Mosec can. Penstock's default is not to wait."""


@dataclass(frozen=True, slots=True)
class Job:
    """``noop`` answers a tiny JSON object, ``echo`` its body, ``sleep`` blocks for ``SLEEP_S`` and is a no-op then.

    ``digits`` is given an image as a JSON list of 64 numbers and answers ``{"digit": n}``, in batches of up to
    ``MAX_BATCH_SIZE``. ``batch-20`` takes such batches too, and sleeps for 20 ms for each.
    """

    port: int
    workload: str
    replicas: int

    @property
    def takes_batches(self) -> bool:
        return self.workload == "digits" or self.workload.startswith("batch-")

    @property
    def batch_call_s(self) -> float:
        """How long a call of ``batch-…`` sleeps; 0 for other workloads."""
        kind, _, milliseconds = self.workload.partition("-")
        return int(milliseconds) / 1000 if kind == "batch" else 0.0


class SleepingModel:
    """Sleeps for each batch, and appends its size to a file in the scratch folder, a line for each."""

    def __init__(self, call_s: float) -> None:
        self._call_s = call_s
        self._sizes = Path(tempfile.gettempdir()) / "batch-sizes"

    def answers(self, count: int) -> list[Any]:
        time.sleep(self._call_s)
        with self._sizes.open("a") as sizes:
            sizes.write(f"{count}\n")
        return [NOOP_ANSWER] * count


def parse() -> Job:
    """Read the job, and leave nothing in ``sys.argv`` for systems that read it too."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--workload", choices=WORKLOADS, default="noop")
    parser.add_argument("--replicas", type=int, default=1)
    asked = parser.parse_args()
    del sys.argv[1:]
    return Job(asked.port, asked.workload, asked.replicas)


def run_until_ended() -> None:
    """Wait for SIGTERM; it arrives as ``SystemExit``, so that context managers close."""

    def leave(signum: int, frame: FrameType | None) -> None:
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
    while True:
        signal.pause()
