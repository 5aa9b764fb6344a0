"""Memory stays flat, however large a file and its row groups are."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.handles.files.test_reading import COMPRESSIONS

pa: Any = import_module("pyarrow")
pq: Any = import_module("pyarrow.parquet")

ROWS, ROW_BYTES = 60_000, 1_000
MOST_GROWTH_BYTES = 24_000_000
"""Less than half of what the rows take."""

READ = r"""
import re, sys
from penstock import handles

def peak():  # not `ru_maxrss`, which begins with that of the process that started this one
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read())[1])

rows = iter(handles.read(sys.argv[1]))
next(rows)
first = peak()
count = 1 + sum(1 for row in rows)
print(count, peak() - first)
"""


@pytest.mark.parametrize("name", ["in.jsonl", "in.csv.gz", "in.jsonl.zst", "in.parquet", "in.parquet.gz"])
def test_a_file_is_read_in_memory_that_does_not_depend_on_its_size(tmp_path: Path, name: str) -> None:
    texts = [os.urandom(ROW_BYTES // 2).hex() for _ in range(ROWS)]
    file = tmp_path / name
    _, format_, *compression = name.split(".")
    if format_ == "parquet":
        # One row group, of which a reader of whole groups would take all.
        pq.write_table(pa.table({"text": texts}), tmp_path / "plain", row_group_size=ROWS, use_dictionary=False)
    elif format_ == "csv":
        (tmp_path / "plain").write_text("text\n" + "\n".join(texts) + "\n")
    else:
        (tmp_path / "plain").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    suffix = "".join(f".{one}" for one in compression)
    file.write_bytes(COMPRESSIONS[suffix]((tmp_path / "plain").read_bytes()))
    ran = subprocess.check_output([sys.executable, "-c", READ, str(file)], text=True)
    count, growth = map(int, ran.split())
    assert count == ROWS
    assert growth < MOST_GROWTH_BYTES < ROWS * ROW_BYTES / 2
