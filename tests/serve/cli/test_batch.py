"""``penstock batch``: rows in, one line for each out, whatever dies."""

from __future__ import annotations

import csv
import io
import random
import signal
import subprocess
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.handles.site import Site
from tests.serve.cli.conftest import COMMAND, Penstock, environment
from tests.waiting import wait_until


def echo(request: Any) -> Any:
    return request.data


def pick(request: Any) -> Any:
    if request.data == "bad":
        raise ValueError("not this one")
    return request.data


def lines_of(path: Path) -> list[Any]:
    return sorted(map(orjson.loads, path.read_bytes().splitlines()), key=lambda line: line["index"])


def test_json_lines_in_json_lines_out(site: Site, penstock: Penstock, tmp_path: Path) -> None:
    site.serve(echo)
    rows = [{"n": n} for n in range(3_000)]
    (tmp_path / "in.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    ran = penstock("batch", "ask", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert (ran.code, ran.out) == (0, "")
    assert "3000 results, 0 errors" in ran.err
    assert lines_of(tmp_path / "out.jsonl") == [{"index": n, "result": row} for n, row in enumerate(rows)]


def test_bad_rows_become_error_lines_that_name_the_row_and_the_rest_goes_on(
    site: Site, penstock: Penstock, tmp_path: Path
) -> None:
    site.serve(pick)
    (tmp_path / "in.jsonl").write_text('"good"\n{"half":\n"bad"\n"' + "x" * 100 + '"\n\n"last"')
    ran = penstock("batch", "ask", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--max-row-bytes", 20)
    assert ran.code == 1
    assert "2 results, 4 errors" in ran.err
    good, malformed, raised, large, empty, last = lines_of(tmp_path / "out.jsonl")
    assert (good["result"], last["result"]) == ("good", "last")
    assert [line["row"] for line in (malformed, raised, large, empty)] == [2, 3, 4, 5]
    assert malformed["error"]["type"] == "MalformedBody"
    assert raised["error"] == {"type": "ValueError", "message": "not this one"}
    assert large["error"]["type"] == "PayloadTooLarge"
    assert "empty" in empty["error"]["message"]


def test_a_csv_file_is_objects_with_numbers(site: Site, penstock: Penstock, tmp_path: Path) -> None:
    site.serve(echo)
    text = io.StringIO()
    csv.writer(text).writerows([["name", "n", "x", "code"], ["Ada, L.", 1, 2.5, "007"], ["two\nlines", -1, "", "a"]])
    (tmp_path / "in.csv").write_text(text.getvalue() + "too,few\n")
    ran = penstock("batch", "ask", tmp_path / "in.csv", "-o", tmp_path / "out.jsonl")
    assert ran.code == 1
    first, second, third = lines_of(tmp_path / "out.jsonl")
    assert first["result"] == {"name": "Ada, L.", "n": 1, "x": 2.5, "code": "007"}
    assert second["result"] == {"name": "two\nlines", "n": -1, "x": None, "code": "a"}
    assert third["error"]["message"] == "the row has 2 columns, and the header names 4"
    assert third["row"] == 3


def test_a_directory_is_its_files(site: Site, penstock: Penstock, tmp_path: Path) -> None:
    def size(request: Any) -> int:
        return len(request.data)

    site.serve(size)
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "b.bin").write_bytes(b"\x00\xff")
    (tmp_path / "in" / "sub" / "a.bin").write_bytes(bytes(300_000))
    (tmp_path / "in" / ".hidden").write_bytes(b"x")
    ran = penstock("batch", "ask", tmp_path / "in", "-o", tmp_path / "out.jsonl")
    assert ran.code == 0
    assert lines_of(tmp_path / "out.jsonl") == [
        {"index": 0, "file": "b.bin", "result": 2},
        {"index": 1, "file": "sub/a.bin", "result": 300_000},
    ]


def test_standard_streams(site: Site, penstock: Penstock) -> None:
    site.serve(echo)
    ran = penstock("batch", "ask", "-", "-o", "-", "--json", stdin="1\n2\n3\n")
    assert ran.code == 0
    assert sorted(line["result"] for line in ran.lines()) == [1, 2, 3]
    assert orjson.loads(ran.err)["results"] == 3


def test_it_is_quiet_where_nobody_looks(site: Site, penstock: Penstock) -> None:
    site.serve(echo)
    assert penstock("batch", "ask", "-", "-o", "-", "--quiet", stdin="1\n").err == ""


def test_what_cannot_be_is_refused_before_anything_is_sent(site: Site, penstock: Penstock, tmp_path: Path) -> None:
    ran: list[Any] = []
    site.serve(ran.append)
    rows, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows.write_text("1\n")

    refused = penstock("batch", "nowhere", rows, "-o", output)
    assert (refused.code, "there is no endpoint 'nowhere'" in refused.err) == (2, True)
    refused = penstock("batch", "ask", tmp_path / "missing", "-o", output)
    assert (refused.code, "missing" in refused.err) == (2, True)
    refused = penstock("batch", "ask", rows, "-o", tmp_path / "no" / "folder")
    assert refused.code == 2
    assert not output.exists()
    output.write_text("something of somebody's\n")
    for options in ((), ("--job", "mine")):
        refused = penstock("batch", "ask", rows, "-o", output, *options)
        assert refused.code == 2
        assert output.read_text() == "something of somebody's\n"
    (tmp_path / "empty.csv").write_text("")
    assert penstock("batch", "ask", tmp_path / "empty.csv", "-o", "-").code == 2
    assert ran == []


def test_a_broker_that_is_not_there_has_an_exit_code_of_its_own(penstock: Penstock, tmp_path: Path) -> None:
    ran = penstock("batch", "ask", "-", "-o", "-", "--redis-url", f"unix://{tmp_path}/nothing.sock")
    assert ran.code == 3
    assert "is unavailable" in ran.err
    assert "Traceback" not in ran.err


def test_a_finished_job_has_nothing_left_to_do(site: Site, penstock: Penstock, tmp_path: Path) -> None:
    ran: list[Any] = []

    def record(request: Any) -> Any:
        ran.append(request.data)
        return request.data

    site.serve(record)
    (tmp_path / "in.jsonl").write_text("1\n2\n3\n")
    arguments = ("batch", "ask", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--job", "three")
    assert penstock(*arguments).code == 0
    again = penstock(*arguments)
    assert again.code == 0
    assert "(3 were done before)" in again.err
    assert len(lines_of(tmp_path / "out.jsonl")) == len(ran) == 3


def test_an_interrupted_job_says_how_it_goes_on(site: Site, tmp_path: Path) -> None:
    site.declare()
    (tmp_path / "in.jsonl").write_text("1\n2\n3\n")
    with _batch(site.url, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--job", "three") as process:
        wait_until(lambda: site.batch_depth() == 3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "the same command goes on with the job 'three'" in err
    site.serve(echo)
    with _batch(site.url, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--job", "three") as process:
        assert process.wait(30) == 0
    assert [line["result"] for line in lines_of(tmp_path / "out.jsonl")] == [1, 2, 3]


def test_an_interrupted_batch_that_is_no_job_leaves_nothing_queued(site: Site, tmp_path: Path) -> None:
    site.declare()
    (tmp_path / "in.jsonl").write_text("1\n2\n3\n")
    with _batch(site.url, tmp_path / "in.jsonl", tmp_path / "out.jsonl") as process:
        wait_until(lambda: site.batch_depth() == 3)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 143
    wait_until(lambda: site.batch_depth() == 0)


@pytest.mark.timeout(300)
def test_whatever_is_killed_the_output_has_every_row_once(site: Site, tmp_path: Path) -> None:
    rows, kills = 20_000, 0

    async def record(request: Any) -> Any:
        return request.data

    site.serve(record)
    (tmp_path / "in.jsonl").write_text("".join(f"{n}\n" for n in range(rows)))
    output = tmp_path / "out.jsonl"
    while True:
        with _batch(site.url, tmp_path / "in.jsonl", output, "--job", "killed", "--window", "200") as process:
            try:
                wait_until(output.exists)
                process.wait(random.uniform(0.05, 1.0) if kills < 20 else 100)
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
                continue
            break
    assert process.returncode == 0
    assert [(line["index"], line["result"]) for line in lines_of(output)] == [(n, n) for n in range(rows)]
    assert kills > 3, "it was over before anything could be killed"


def _batch(url: str, rows: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "batch", "ask", str(rows), "-o", str(output), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(url),
    )
