from __future__ import annotations

import os
from pathlib import Path

import pytest

from penstock.broker.embedded.server import default_memory_bytes
from penstock.runtime.machine_memory import memory_bytes

MIB = 1024 * 1024


def machine_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def within(tmp_path: Path, cgroup: str, limits: dict[str, str]) -> int:
    """Return what is found in a ``/proc`` with this ``self/cgroup`` and a ``/sys/fs/cgroup`` with these files."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, text in limits.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return memory_bytes(tmp_path / "proc", tmp_path / "cgroup")


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected"),
    [
        ("0::/\n", {"memory.max": f"{512 * MIB}\n"}, 512 * MIB),
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/pod/app\n", {"pod/app/memory.max": "max\n", "pod/memory.max": f"{64 * MIB}\n"}, 64 * MIB),
        ("0::/of/the/host\n", {"memory.max": f"{64 * MIB}\n"}, 64 * MIB),
        ("5:cpu:/\n4:memory:/app\n", {"memory/app/memory.limit_in_bytes": f"{32 * MIB}\n"}, 32 * MIB),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ("0::/\n", {}, None),
    ],
    ids=["v2", "v2 without a limit", "v2 above", "v2 in a container", "v1", "v1 without a limit", "no file"],
)
def test_the_smallest_limit_around_the_process_counts(
    tmp_path: Path, cgroup: str, limits: dict[str, str], expected: int | None
) -> None:
    assert within(tmp_path, cgroup, limits) == (expected or machine_bytes())


def test_without_control_groups_the_limit_is_the_memory_of_the_machine(tmp_path: Path) -> None:
    assert memory_bytes(tmp_path, tmp_path) == machine_bytes()


def test_an_embedded_server_may_take_a_quarter_of_it_by_default() -> None:
    assert default_memory_bytes() == memory_bytes() // 4
