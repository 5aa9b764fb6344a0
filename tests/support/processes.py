"""Finding the processes that a test run has started, however far they have strayed from it (on Linux)."""

import os
from collections.abc import Iterator
from pathlib import Path

_MARK = "PENSTOCK_TEST_RUN"

# These serve the interpreter itself and end with it.
_OF_PYTHON = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


def mark_descendants() -> None:
    """Let every process that this one executes from now on carry a mark, which daemons keep as well."""
    os.environ[_MARK] = str(os.getpid())


def descendants() -> list[str]:
    """Return the processes that are our children or carry our mark, as ``pid: command``.

    None are found where there is no ``/proc``.
    """
    return [f"{pid}: {command}" for pid, command in _descendants() if not any(word in command for word in _OF_PYTHON)]


def _descendants() -> Iterator[tuple[int, str]]:
    mark = f"{_MARK}={os.getpid()}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        try:
            status, environment = (folder / "status").read_bytes(), (folder / "environ").read_bytes()
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it ended, or belongs to somebody else
        # A child that was forked and never executed anything has the environment from before the mark.
        is_child = f"\nPPid:\t{os.getpid()}\n".encode() in status
        is_zombie = b"\nState:\tZ" in status
        if not is_zombie and (is_child or mark in environment.split(b"\0")):
            yield int(folder.name), command.replace(b"\0", b" ").decode(errors="replace").strip()
