"""Files as people have them through ``penstock batch``: nothing is lost or changed without a word."""

from __future__ import annotations

import gzip
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import Response

from penstock.broker.wire import exact_json
from tests.handles.site import Site, echo
from tests.serve.cli.command_line import command_line
from tests.serve.cli.conftest import Penstock, environment


def lines_of(path: Path) -> list[Any]:
    return sorted(map(exact_json.loads, path.read_bytes().splitlines()), key=lambda line: line["index"])


def test_json_values_arrive_and_return_exactly(site: Site, penstock: Penstock, tmp_path: Path) -> None:
    site.serve(echo)
    (tmp_path / "in.jsonl").write_bytes(
        b'\xef\xbb\xbf{"id":123456789012345678901}\n"\\ud800"\nNaN\n[1e400]\n{"a":18446744073709551616}\n'
    )
    ran = penstock("batch", "ask", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl")
    assert ran.code == 0
    assert [line["result"] for line in lines_of(tmp_path / "out.jsonl")] == [
        {"id": 123456789012345678901},
        "\ud800",
        None,
        [None],
        {"a": 18446744073709551616},
    ]


def test_a_byte_order_mark_on_standard_input_is_skipped(site: Site, penstock: Penstock) -> None:
    site.serve(echo)
    assert [line["result"] for line in penstock("batch", "ask", "-", "-o", "-", stdin="\ufeff1\n").lines()] == [1]


def test_a_compressed_file_is_read(site: Site, penstock: Penstock, tmp_path: Path) -> None:
    site.serve(echo)
    (tmp_path / "in.csv.gz").write_bytes(gzip.compress(b"zip;n\n01067;1\n10115;2\n"))
    assert penstock("batch", "ask", tmp_path / "in.csv.gz", "-o", tmp_path / "out.jsonl").code == 0
    assert [line["result"] for line in lines_of(tmp_path / "out.jsonl")] == [
        {"zip": "01067", "n": 1},
        {"zip": "10115", "n": 2},
    ]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"PAR1....", (), "it is not a Parquet file: "),
        (b"\x28\xb5\x2f\xfd...", (), "it cannot be decompressed"),
        (b"PAR1....", ("--format", "csv"), "its format was said to be csv"),
        ("é\n".encode("utf-16"), (), "is UTF-16"),
        (b"\x1f\x8bno", (), "it cannot be decompressed"),
        (b"a,a\n1,2\n", ("--format", "csv"), "names more than one column 'a'"),
        (b"a\n1\n", ("--format", "csv", "--types", "b=int"), "there is no column 'b'"),
        (b"a\n1\n", ("--format", "csv", "--delimiter", "ab"), "--delimiter is one character"),
        (b"1\n", ("--ok-status", "4xx"), "--ok-status is a list"),
        (b"1\n", ("--retry-errors",), "--retry-errors is for a job"),
        (b"1\n", ("--restart-job",), "--restart-job is for a job"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    site: Site, penstock: Penstock, tmp_path: Path, content: bytes, options: tuple[str, ...], message: str
) -> None:
    site.declare()
    (tmp_path / "in").write_bytes(content)
    ran = penstock("batch", "ask", tmp_path / "in", "-o", tmp_path / "out.jsonl", *options)
    assert ran.code in (1, 2)
    assert message in ran.err
    assert options or str(tmp_path / "in") in ran.err
    assert "Traceback" not in ran.err


def test_an_error_while_an_input_is_read_names_the_file(site: Site, penstock: Penstock, tmp_path: Path) -> None:
    site.serve(echo)
    ran = penstock("batch", "ask", "/proc/self/mem", "-o", tmp_path / "out.jsonl")
    assert ran.code in (1, 2)
    assert "/proc/self/mem" in ran.err
    broken = tmp_path / "in.jsonl.gz"
    broken.write_bytes(gzip.compress(b"1\n" * 100_000)[:-50])
    ran = penstock("batch", "ask", broken, "-o", tmp_path / "out2.jsonl")
    assert ran.code == 1
    assert str(broken) in ran.err


def test_a_job_is_refused_with_another_input(site: Site, penstock: Penstock, tmp_path: Path) -> None:
    site.serve(echo)
    rows = ["a,b", *(f"{n},x" for n in range(100))]
    file = tmp_path / "in.csv"
    arguments = ("batch", "ask", file, "-o", tmp_path / "out.jsonl", "--job", "nightly")
    file.write_text("\n".join(rows) + "\n")
    assert penstock(*arguments).code == 0
    file.write_text("\n".join([rows[0], "7,inserted", *rows[1:]]) + "\n")
    ran = penstock(*arguments)
    assert ran.code == 2
    assert "the job 'nightly' belongs to another input" in ran.err
    assert "--job nightly-20" in ran.err
    assert [line["result"]["a"] for line in lines_of(tmp_path / "out.jsonl")] == list(range(100))
    assert penstock(*arguments, "--restart-job").code == 0
    assert [line["result"]["a"] for line in lines_of(tmp_path / "out.jsonl")] == [7, *range(100)]


def test_a_directory_that_grew_has_its_new_files_run(site: Site, penstock: Penstock, tmp_path: Path) -> None:
    ran: list[bytes] = []

    def record(request: Any) -> Any:
        ran.append(request.data)
        return request.data.decode()

    site.serve(record)
    folder = tmp_path / "in"
    folder.mkdir()
    arguments = ("batch", "ask", folder, "-o", tmp_path / "out.jsonl", "--job", "files")
    for name in "bd":
        (folder / name).write_text(name)
    assert penstock(*arguments).code == 0
    for name in "ace":
        (folder / name).write_text(name)
    assert penstock(*arguments).code == 0
    assert {line["file"]: line["result"] for line in lines_of(tmp_path / "out.jsonl")} == {
        name: name for name in "abcde"
    }
    assert sorted(ran) == [b"a", b"b", b"c", b"d", b"e"]
    (folder / "c").write_text("changed")
    assert "belongs to another input" in penstock(*arguments).err
    (folder / "c").unlink()
    assert "its file 'c' is gone" in penstock(*arguments).err


def test_a_file_name_that_is_not_utf_8_is_an_error_line(site: Site, penstock: Penstock, tmp_path: Path) -> None:
    site.serve(echo)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_text("x")
    with open(os.fsencode(tmp_path / "in") + b"/caf\xe9", "wb") as file:
        file.write(b"y")
    ran = penstock("batch", "ask", tmp_path / "in", "-o", tmp_path / "out.jsonl", "--job", "names")
    assert ran.code == 1
    good, bad = lines_of(tmp_path / "out.jsonl")
    assert good == {"index": 0, "file": "a", "result": "x"}
    assert bad["file"] == "caf\\xe9"
    assert "not UTF-8" in bad["error"]["message"]


def test_responses_with_an_error_status_are_error_lines(site: Site, penstock: Penstock, tmp_path: Path) -> None:
    def respond(request: Any) -> Response:
        return Response(b"body", status_code=request.data)

    site.serve(respond)
    (tmp_path / "in.jsonl").write_text("200\n404\n503\n")
    ran = penstock("batch", "ask", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--ok-status", "404")
    assert ran.code == 1
    first, second, third = lines_of(tmp_path / "out.jsonl")
    assert (first["result"], second["result"]) == ("body", "body")
    assert third["error"] == {"type": "Response", "message": "the response has the status 503: body"}


def test_bytes_that_are_not_text_are_base64_with_a_mark(site: Site, penstock: Penstock, tmp_path: Path) -> None:
    def bytes_of(request: Any) -> bytes:
        return b"\xff\x00" if request.data else b"text"

    site.serve(bytes_of)
    (tmp_path / "in.jsonl").write_text("0\n1\n")
    assert penstock("batch", "ask", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl").code == 0
    assert lines_of(tmp_path / "out.jsonl") == [
        {"index": 0, "result": "text"},
        {"index": 1, "result": "/wA=", "encoding": "base64"},
    ]
    assert penstock("call", "ask", "1", "--json").lines() == [{"result": "/wA=", "encoding": "base64"}]


def test_failed_rows_are_run_again_and_their_error_lines_are_gone(
    site: Site, penstock: Penstock, tmp_path: Path
) -> None:
    broken = {1, 3}
    ran: list[int] = []

    def pick(request: Any) -> Any:
        ran.append(request.data)
        if request.data in broken:
            raise ValueError("not now")
        return request.data

    site.serve(pick)
    (tmp_path / "in.jsonl").write_text("0\n1\n2\n3\n")
    output = tmp_path / "out.jsonl"
    arguments = ("batch", "ask", tmp_path / "in.jsonl", "-o", output, "--job", "again")
    assert penstock(*arguments).code == 1
    second = penstock(*arguments)
    assert (second.code, sorted(ran)) == (1, [0, 1, 2, 3])
    assert "(4 were done before, 2 of them errors: --retry-errors runs these again)" in second.err
    broken.discard(1)
    ran.clear()
    mode = output.stat().st_mode
    third = penstock(*arguments, "--retry-errors")
    assert (third.code, sorted(ran)) == (1, [1, 3])
    assert "1 results, 1 errors" in third.err
    assert ["error" in line for line in lines_of(output)] == [False, False, False, True]
    broken.clear()
    assert penstock(*arguments, "--retry-errors").code == 0
    assert [line["result"] for line in lines_of(output)] == [0, 1, 2, 3]
    assert output.stat().st_mode == mode
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_outputs_that_are_no_regular_files_take_lines(site: Site, penstock: Penstock, tmp_path: Path) -> None:
    site.serve(echo)
    (tmp_path / "in.jsonl").write_text("1\n2\n")
    assert penstock("batch", "ask", tmp_path / "in.jsonl", "-o", "/dev/null").code == 0
    for output in ("/dev/stdout", "/dev/fd/1"):
        ran = penstock("batch", "ask", tmp_path / "in.jsonl", "-o", output)
        assert sorted(line["result"] for line in ran.lines()) == [1, 2]
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    read: list[bytes] = []
    thread = threading.Thread(target=lambda: read.append(fifo.read_bytes()), daemon=True)
    thread.start()
    assert penstock("batch", "ask", tmp_path / "in.jsonl", "-o", fifo, "--job", "fifo").code == 0
    thread.join(30)
    assert len(read[0].splitlines()) == 2


def test_standard_output_may_be_a_regular_file(site: Site, tmp_path: Path) -> None:
    site.serve(echo)
    (tmp_path / "in.jsonl").write_text("1\n")
    with open(tmp_path / "out.jsonl", "wb") as file:
        command = command_line("batch", "ask", str(tmp_path / "in.jsonl"), "-o", "/dev/stdout")
        assert subprocess.run(command, stdout=file, env=environment(site.url), timeout=60, check=False).returncode == 0
    assert [line["result"] for line in lines_of(tmp_path / "out.jsonl")] == [1]
