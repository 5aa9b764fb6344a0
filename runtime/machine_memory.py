"""Memory of the machine: its size, or that of the container which this process runs in, whichever is smaller."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def memory_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many bytes of memory this process and its neighbours can have together.

    The smallest of the machine's memory and the limits of the control groups around this process (cgroups(7)), versions
    1 and 2. ``proc`` and ``cgroups`` are where these file systems are mounted.
    """
    return min([_machine_bytes(), *_cgroup_limits(proc, cgroups)])


def _machine_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_limits(proc: Path, cgroups: Path) -> Iterator[int]:
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        # A limit holds for all groups below it. In a container the path may be the host's, of which only the root is
        # mounted; then the root is the container's own group.
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if (limit := _read_limit(folder / name)) is not None:
                yield limit
            if folder == root:
                break


def _read_limit(file: Path) -> int | None:
    """Return the limit in ``file``; None if there is none, which is the word ``max`` in version 2."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) > 0 else None
