"""Memory of the machine: its size, or the limit of the container that this process runs in, if that is smaller."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def memory_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes of memory that this process shares with the others of its machine or container.

    That is the smallest of the machine's memory and the limits of the control groups of this process (cgroups(7)),
    versions 1 and 2. ``proc`` and ``cgroups`` are the mount points of these file systems.
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
        # A limit applies to all groups below it. In a container the path may be that of the host, of which only the
        # root is mounted; then the root is the container's own group.
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if (limit := _read_limit(folder / name)) is not None:
                yield limit
            if folder == root:
                break


def _read_limit(file: Path) -> int | None:
    """Return the limit in ``file``; None if there is none, which version 2 writes as ``max``."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) > 0 else None
