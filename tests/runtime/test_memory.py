from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from penstock.runtime.memory import Memory

BLOCKS, BLOCK_BYTES = 1_000, 100_000

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_free_memory_returns_to_the_system_though_used_memory_lies_behind_it() -> None:
    memory = Memory()
    memory.give_back()
    blocks = [bytearray(BLOCK_BYTES) for _ in range(BLOCKS)]
    behind = bytearray(BLOCK_BYTES)
    blocks.clear()
    before = resident_bytes()
    memory.give_back()
    assert len(behind) == BLOCK_BYTES
    assert resident_bytes() < before - BLOCKS * BLOCK_BYTES / 2
