"""``penstock batch`` with the files that people have: Parquet, patterns, compression, tables as outputs."""

from __future__ import annotations

import gzip
import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from penstock import handles
from tests.handles.site import Site, echo
from tests.serve.cli.command_line import command_line
from tests.serve.cli.conftest import Penstock, environment, running
from tests.support.waiting import wait_until

pa: Any = import_module("pyarrow")
pq: Any = import_module("pyarrow.parquet")


def double(request: Any) -> Any:
    if request.data["n"] == 13:
        raise ValueError("unlucky")
    return {"twice": 2 * request.data["n"], "name": request.data["name"]}


def write_parts(folder: Path) -> None:
    folder.mkdir()
    for part in range(3):
        rows = [{"n": n, "name": f"é{n}"} for n in range(10 * part, 10 * part + 10)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{part}.parquet")


@pytest.mark.parametrize("name", ["out.parquet", "out.csv", "out.csv.gz", "out.jsonl.zst"])
def test_a_pattern_of_parquet_files_in_a_table_out(site: Site, penstock: Penstock, tmp_path: Path, name: str) -> None:
    site.serve(double)
    write_parts(tmp_path / "in")
    ran = penstock("batch", "ask", tmp_path / "in" / "*.parquet", "-o", tmp_path / name)
    assert ran.code == 1
    assert "29 results, 1 errors" in ran.err
    rows = sorted(handles.read(tmp_path / name), key=lambda row: row["index"])
    assert [row["index"] for row in rows] == list(range(30))
    if "jsonl" in name:
        rows = [{**row, **row.get("result", {})} for row in rows]
        rows[13] |= {"error_type": rows[13]["error"]["type"], "error_message": rows[13]["error"]["message"]}
    assert [row.get("twice") for row in rows] == [None if n == 13 else 2 * n for n in range(30)]
    assert rows[29]["name"] == "é29"
    assert (rows[13]["error_type"], rows[13]["error_message"]) == ("ValueError", "unlucky")
    assert [(row["file"], row["row"]) for row in (rows[9], rows[10])] == [
        (str(tmp_path / "in" / "0.parquet"), 10),
        (str(tmp_path / "in" / "1.parquet"), 1),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in", name])


def test_an_output_or_journal_that_exists_is_refused_without_a_job(
    site: Site, penstock: Penstock, tmp_path: Path
) -> None:
    site.declare()
    (tmp_path / "in.jsonl").write_text("1\n")
    for name in ("out.csv", "out.csv.journal"):
        (tmp_path / name).write_text("x\n")
        ran = penstock("batch", "ask", tmp_path / "in.jsonl", "-o", tmp_path / "out.csv")
        assert (ran.code, f"{tmp_path / name} exists: give another --output" in ran.err) == (2, True)
        (tmp_path / name).unlink()


def test_a_job_with_a_table_is_interrupted_and_goes_on_and_grows(
    site: Site, penstock: Penstock, tmp_path: Path
) -> None:
    site.declare()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.jsonl").write_text("1\n2\n3\n")
    output = tmp_path / "out.parquet"
    arguments = ("batch", "ask", str(tmp_path / "in" / "*.jsonl"), "-o", str(output), "--job", "grows")
    with running(command_line(*arguments), environment(site.url)) as process:
        wait_until(lambda: site.batch_depth() == 3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "out.parquet.journal has what is done; the same command goes on with the job 'grows'" in err
    site.serve(echo)
    assert penstock(*arguments).code == 0
    (tmp_path / "in" / "a.jsonl").write_text("4\n")
    again = penstock(*arguments)
    assert (again.code, "(3 were done before)" in again.err) == (0, True)
    rows = sorted(pq.read_table(output).to_pylist(), key=lambda row: row["index"])
    assert [(Path(row["file"]).name, row["row"], row["result"]) for row in rows] == [
        ("b.jsonl", 1, 1),
        ("b.jsonl", 2, 2),
        ("b.jsonl", 3, 3),
        ("a.jsonl", 1, 4),
    ]


def test_columns_of_parquet_are_chosen(site: Site, penstock: Penstock, tmp_path: Path) -> None:
    site.serve(echo)
    write_parts(tmp_path / "in")
    ran = penstock("batch", "ask", tmp_path / "in" / "0.parquet", "-o", "-", "--columns", "n")
    assert sorted(line["result"]["n"] for line in ran.lines()) == list(range(10))
    assert {tuple(line["result"]) for line in ran.lines()} == {("n",)}
    refused = penstock("batch", "ask", tmp_path / "in" / "0.parquet", "-o", "-", "--columns", "m")
    assert (refused.code, "there is no column 'm'; its columns are 'n', 'name'" in refused.err) == (2, True)


def test_a_later_file_that_cannot_be_read_is_named(site: Site, penstock: Penstock, tmp_path: Path) -> None:
    site.serve(echo)
    (tmp_path / "a.csv").write_text("n\n1\n")
    (tmp_path / "b.csv").write_text("n,n\n1,2\n")
    ran = penstock("batch", "ask", tmp_path / "*.csv", "-o", tmp_path / "out.jsonl")
    assert ran.code in (1, 2)
    assert f"{tmp_path / 'b.csv'}: the header names more than one column 'n'" in ran.err
    assert "Traceback" not in ran.err


def test_a_compressed_parquet_file_comes_over_standard_input(site: Site, tmp_path: Path) -> None:
    site.serve(echo)
    write_parts(tmp_path / "in")
    (tmp_path / "in.gz").write_bytes(gzip.compress((tmp_path / "in" / "1.parquet").read_bytes()))
    with (
        open(tmp_path / "in.gz", "rb") as stdin,
        running(
            command_line("batch", "ask", "-", "-o", str(tmp_path / "out.csv")), environment(site.url), stdin
        ) as process,
    ):
        assert process.wait(60) == 0
    assert sorted(row["n"] for row in handles.read(tmp_path / "out.csv")) == list(range(10, 20))


@pytest.mark.timeout(300)
def test_producers_that_are_killed_at_random_leave_one_line_for_each_row_of_parquet() -> None:
    """The benchmark of files does it with any number of rows and deaths."""
    program = Path(__file__).parents[4] / "benchmarks" / "systems" / "costs" / "penstock_files.py"
    command = [sys.executable, str(program), "--rows", "20000", "--kills", "3"]
    with running(command, dict(os.environ)) as process:
        out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    assert "20,000 rows of parquet, 3 producers killed" in out
    assert "every row once" in out
