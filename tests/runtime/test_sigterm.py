"""SIGTERM of a process that starts Ray: its own handler stays, and without one the process exits as by ``sys.exit``."""

from __future__ import annotations

import signal
import subprocess
import sys
from textwrap import dedent

import pytest

from penstock.runtime.sigterm import keeping_sigterm

PROGRAM = """
import atexit, os, signal, sys
from penstock.runtime.sigterm import keeping_sigterm

if sys.argv[1] == "handled":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("handled"))
atexit.register(print, "ended")
with keeping_sigterm():
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(15))  # as the start of Ray does
os.kill(os.getpid(), signal.SIGTERM)
signal.pause()
"""


def run(kind: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, kind], capture_output=True, text=True, timeout=60, check=False
    )


def test_without_a_handler_a_process_ends_as_by_sys_exit_with_status_143() -> None:
    ran = run("unhandled")
    assert (ran.returncode, ran.stdout, ran.stderr) == (143, "ended\n", "")


def test_a_handler_of_the_process_stays() -> None:
    ran = run("handled")
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "ended\n", "handled\n")


def test_a_start_that_fails_leaves_the_handler_as_it_was() -> None:
    def fail() -> None:
        with keeping_sigterm():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise RuntimeError

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError):
        fail()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_a_process_that_imports_the_actors_ends_on_sigterm() -> None:
    """Ray makes instances of actor classes there; only in an actor is the signal handled."""
    program = """
        import os, signal
        from penstock.serve.ray_actors import controller, proxy, replica
        os.kill(os.getpid(), signal.SIGTERM)
        print("ignored")
    """
    ran = subprocess.run(
        [sys.executable, "-c", dedent(program)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.returncode, ran.stdout) == (-signal.SIGTERM, ""), ran.stderr
