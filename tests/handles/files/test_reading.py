"""`handles.read`: the rows of files, wherever they lie and however they are compressed."""

from __future__ import annotations

import asyncio
import functools
import gzip
import http.server
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from penstock import handles
from penstock.handles import BatchProducer
from penstock.handles.connection import Connection
from penstock.handles.errors import ConfigError, EndpointNotFound, MalformedBody, PayloadTooLarge
from tests.handles.site import Site, echo

pa: Any = import_module("pyarrow")
pq: Any = import_module("pyarrow.parquet")
zstandard: Any = import_module("zstandard")

ROWS = [{"n": n, "name": f"name {n}"} for n in range(3)]


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


CONTENTS: dict[str, bytes] = {
    "jsonl": b"".join(b'{"n": %d, "name": "name %d"}\n' % (n, n) for n in range(3)),
    "csv": b"n,name\n0,name 0\n1,name 1\n2,name 2\n",
    "tsv": b"n\tname\n0\tname 0\n1\tname 1\n2\tname 2\n",
    "parquet": as_parquet(ROWS),
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("format_", CONTENTS)
def test_every_format_is_read_from_every_compression(tmp_path: Path, format_: str, compression: str) -> None:
    file = tmp_path / f"in.{format_}{compression}"
    file.write_bytes(COMPRESSIONS[compression](CONTENTS[format_]))
    assert list(handles.read(file)) == ROWS
    assert list(handles.read(file.as_uri())) == ROWS


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("format_", CONTENTS)
def test_a_compressed_file_that_is_cut_off_is_an_error_that_names_it(
    tmp_path: Path, format_: str, compression: str
) -> None:
    file = tmp_path / f"in.{format_}{compression}"
    whole = COMPRESSIONS[compression](CONTENTS[format_] + os.urandom(100_000).hex().encode() + b"\n")
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=r"cannot be decompressed: .*end") as raised:
        list(handles.read(file))
    assert raised.value.filename == str(file)


def test_frames_of_zstd_that_follow_each_other_are_one_file(tmp_path: Path) -> None:
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "in.jsonl.zst").write_bytes(compress(b"1\n2") + compress(b"3\n") + compress(b"") + compress(b"4\n"))
    assert list(handles.read(tmp_path / "in.jsonl.zst")) == [1, 23, 4]


def test_a_file_that_begins_as_parquet_is_parquet_by_any_name(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(CONTENTS["parquet"])
    assert list(handles.read(tmp_path / "rows")) == ROWS


def test_a_glob_pattern_is_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_bytes(CONTENTS["csv"])
    (tmp_path / "a.jsonl").write_bytes(b"1\n2\n")
    (tmp_path / "b.parquet").write_bytes(CONTENTS["parquet"])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.jsonl").write_bytes(b"3\n")
    rows = handles.read(tmp_path / "*.*")
    assert list(rows) == [1, 2, *ROWS, *ROWS]
    assert [rows.place_of(index) for index in (0, 1, 2, 4, 5)] == [
        (str(tmp_path / "a.jsonl"), 1),
        (str(tmp_path / "a.jsonl"), 2),
        (str(tmp_path / "b.parquet"), 1),
        (str(tmp_path / "b.parquet"), 3),
        (str(tmp_path / "c.csv"), 1),
    ]
    assert list(handles.read(tmp_path / "**" / "*.jsonl")) == [1, 2, 3]
    with pytest.raises(FileNotFoundError, match="no file matches this pattern"):
        handles.read(tmp_path / "*.txt")


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_bytes(b"1\n")
    (tmp_path / "a1.jsonl").write_bytes(b"2\n")
    assert list(handles.read(tmp_path / "a[1].jsonl")) == [1]


def test_a_directory_is_files_unless_a_format_is_given(tmp_path: Path) -> None:
    folder = tmp_path / "written by spark"
    (folder / "part").mkdir(parents=True)
    (folder / "_SUCCESS").write_bytes(b"")
    (folder / ".part.crc").write_bytes(b"x")
    (folder / "part" / "0.parquet").write_bytes(CONTENTS["parquet"])
    assert list(handles.read(folder)) == [b"", CONTENTS["parquet"]]
    assert list(handles.read(folder, format="parquet")) == ROWS


def test_a_column_of_csv_has_one_type_in_all_files(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("zip\n10115\n")
    (tmp_path / "2.csv").write_text("zip\n01067\n20095\n")
    first, second, third = handles.read(tmp_path / "*.csv")
    assert (first, third) == ({"zip": 10115}, {"zip": 20095})
    assert isinstance(second, MalformedBody)
    assert "column 'zip' is of the type number" in str(second)


@pytest.mark.parametrize("format_", CONTENTS)
def test_a_row_that_is_too_long_is_an_error_in_its_place(tmp_path: Path, format_: str) -> None:
    long = [{"n": 0, "name": "x"}, {"n": 1, "name": "x" * 100}, {"n": 2, "name": "x"}]
    contents = {
        "jsonl": b'{"n":0,"name":"x"}\n{"n":1,"name":"%b"}\n{"n":2,"name":"x"}\n' % (b"x" * 100),
        "csv": b"n,name\n0,x\n1,%b\n2,x\n" % b",".join([b"x" * 100]),
        "tsv": b"n\tname\n0\tx\n1\t%b\n2\tx\n" % (b"x" * 100),
        "parquet": as_parquet(long),
    }
    file = tmp_path / f"in.{format_}"
    file.write_bytes(contents[format_])
    first, second, third = handles.read(file, max_row_bytes=100)
    assert [first, third] == [long[0], long[2]]
    assert isinstance(second, PayloadTooLarge)
    assert "--max-row-bytes is 100" in str(second)


def test_arrow_record_batches_are_read_from_parquet(tmp_path: Path) -> None:
    table = pa.table({"n": list(range(2_500)), "x": [None] * 2_500})
    pq.write_table(table, tmp_path / "in.parquet")
    batches = list(handles.read(tmp_path / "in.parquet", as_="arrow", batch_rows=1_000))
    assert [batch.num_rows for batch in batches] == [1_000, 1_000, 500]
    assert pa.Table.from_batches(batches) == table
    (tmp_path / "in.csv").write_bytes(CONTENTS["csv"])
    with pytest.raises(ConfigError, match=r"Arrow record batches are read from Parquet files, and .*in\.csv is csv"):
        handles.read(tmp_path / "in.csv", as_="arrow")


def test_columns_of_parquet_can_be_chosen(tmp_path: Path) -> None:
    table = pa.table({"a.b": [1], "a": [{"b": 2}], "c": [3]})
    pq.write_table(table, tmp_path / "in.parquet")
    assert list(handles.read(tmp_path / "in.parquet", columns=["c", "a.b"])) == [{"c": 3, "a.b": 1}]
    assert list(handles.read(tmp_path / "in.parquet", columns=["a"])) == [{"a": {"b": 2}}]
    with pytest.raises(ConfigError, match=r"there is no column 'd'; its columns are 'a\.b', 'a', 'c'"):
        handles.read(tmp_path / "in.parquet", columns=["d"])


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Write nothing."""


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The URL of a web server that has the files of ``tmp_path``. It knows no ranges."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=tmp_path)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["in.jsonl", "in.csv.gz", "in.parquet"])
def test_a_url_of_the_web_is_read_and_its_query_is_not_shown(tmp_path: Path, web: str, name: str) -> None:
    format_, compression = name.removeprefix("in.").split(".", 1)[0], name[len("in.csv") :] if "gz" in name else ""
    (tmp_path / name).write_bytes(COMPRESSIONS[compression](CONTENTS[format_]))
    rows = handles.read(f"{web}/{name}?signature=secret")
    assert list(rows) == ROWS
    assert "secret" not in repr(rows)
    with pytest.raises(OSError, match="No such file") as raised:
        handles.read(f"{web}/missing.jsonl?signature=secret")
    assert "secret" not in str(raised.value)


def test_a_url_of_an_unknown_protocol_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"nosuch://there/in\.csv: Protocol not known: nosuch"):
        handles.read("nosuch://user:secret@there/in.csv")


WITHOUT = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("pyarrow", "fsspec", "zstandard"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from penstock import handles
from penstock.handles.files.outputs import open_output
for path in sys.argv[1:]:
    try:
        print(list(handles.read(path)))
    except ValueError as e:
        print(e)
for path in ("out.parquet", "out.csv.zst", "s3://bucket/out.jsonl"):
    try:
        open_output(path, retry_errors=False, restart=False)
    except ValueError as e:
        print(e)
"""


def test_without_the_extra_plain_files_are_read_and_others_name_it(tmp_path: Path) -> None:
    for name in ("in.jsonl", "in.csv.gz", "in.jsonl.zst", "in.parquet"):
        format_, compression = name.split(".")[1], "." + name.split(".")[2] if name.count(".") > 1 else ""
        (tmp_path / name).write_bytes(COMPRESSIONS[compression](CONTENTS[format_]))
    names = ["in.jsonl", "in.csv.gz", "in.jsonl.zst", "in.parquet", "s3://bucket/in.csv"]
    ran = subprocess.check_output([sys.executable, "-c", WITHOUT, *names], text=True, cwd=tmp_path)
    assert ran.splitlines() == [
        str(ROWS),
        str(ROWS),
        "in.jsonl.zst is compressed by zstd, and reading it needs the package zstandard: pip install 'penstock[files]'",
        "in.parquet is a Parquet file, and reading it needs the package pyarrow: pip install 'penstock[files]'",
        "s3://bucket/in.csv: a URL needs the package fsspec: pip install 'penstock[files]'",
        "out.parquet: writing a Parquet file needs the package pyarrow: pip install 'penstock[files]'",
        "out.csv.zst: writing a file that is compressed by zstd needs the package zstandard: pip install "
        "'penstock[files]'",
        "s3://bucket/out.jsonl.journal: a URL needs the package fsspec: pip install 'penstock[files]'",
    ]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"format": "xml"}, ConfigError, "format must be jsonl, csv, parquet, files or None, not 'xml'"),
        ({"as_": "pandas"}, ConfigError, "as_ must be 'rows' or 'arrow'"),
        ({"max_row_bytes": 0}, ConfigError, "max_row_bytes must be at least 1"),
        ({"batch_rows": 1.5}, TypeError, "batch_rows must be an int"),
        ({"columns": "a"}, TypeError, "columns must be a list of names"),
        ({"delimiter": ";;"}, ConfigError, "delimiter must be one character"),
        ({"types": {"a": "date"}}, ConfigError, "column 'a' must be of the type str, int, float, number"),
        ({"columns": ["a"]}, ConfigError, "columns are chosen of Parquet files, and .* is jsonl"),
        ({"strings": True}, ConfigError, "--strings are for CSV files, and .* is jsonl"),
    ],
)
def test_a_wrong_argument_is_refused_at_the_call(
    tmp_path: Path, options: Any, error: type[Exception], message: str
) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"1\n")
    with pytest.raises(error, match=message):
        handles.read(tmp_path / "in.jsonl", **options)
    with pytest.raises(TypeError, match="path must be a str or a path, not int"):
        handles.read(7)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_rows_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"1\n")
    with handles.read(tmp_path / "in.jsonl") as rows:
        assert list(rows) == [1]
        with pytest.raises(RuntimeError, match="can be iterated over once"):
            list(rows)


def test_a_batch_takes_what_is_read_and_bad_rows_are_its_errors(
    site: Site, connected: Connection, tmp_path: Path
) -> None:
    site.serve(echo)
    (tmp_path / "in.jsonl").write_bytes(b'{"n":1}\n{"n":\n"three"\n')
    first, second, third = connected.batch("ask").map(handles.read(tmp_path / "in.jsonl"))
    assert (first.get(), third.get()) == ({"n": 1}, "three")
    assert isinstance(second.error, MalformedBody)


def test_a_job_of_a_pattern_runs_new_files_and_is_refused_when_one_has_changed(
    site: Site, connected: Connection, tmp_path: Path
) -> None:
    ran: list[Any] = []

    def record(request: Any) -> Any:
        ran.append(request.data)
        return request.data

    site.serve(record)

    def run() -> list[Any]:
        rows = handles.read(tmp_path / "*.jsonl")
        return [result.get() for result in connected.batch("ask", job="files").map(rows)]

    (tmp_path / "b.jsonl").write_bytes(b"1\n2\n")
    assert run() == [1, 2]
    (tmp_path / "a.jsonl").write_bytes(b"3\n")
    assert run() == [1, 2, 3]
    assert sorted(ran) == [1, 2, 3]
    (tmp_path / "b.jsonl").write_bytes(b"1\n4\n")
    with pytest.raises(ConfigError, match="the job 'files' belongs to another input"):
        run()
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"its file '.*b\.jsonl' is gone"):
        run()


async def test_a_batch_that_cannot_begin_closes_its_files(site: Site, tmp_path: Path) -> None:
    site.declare()
    (tmp_path / "in.jsonl").write_bytes(b"1\n")
    producer = BatchProducer(site.url, "nowhere")
    rows = handles.read(tmp_path / "in.jsonl")
    with pytest.raises(EndpointNotFound):
        await asyncio.to_thread(list, producer.map(rows))
    assert rows.is_closed
    rows = handles.read(tmp_path / "in.jsonl")
    assert not rows.is_closed
    with pytest.raises(EndpointNotFound):
        _ = [result async for result in producer.map(rows)]
    assert rows.is_closed
