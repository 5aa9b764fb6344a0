"""URLs of S3, as moto's server has it: the same rows as from files, and the same jobs."""

from __future__ import annotations

from typing import Any

import pytest

from penstock import handles
from penstock.handles.errors import ConfigError
from penstock.handles.files.outputs import FileOutput, open_output
from tests.handles.files.test_reading import COMPRESSIONS, CONTENTS, ROWS


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("format_", CONTENTS)
def test_every_format_is_read(s3: Any, format_: str, compression: str) -> None:
    s3.pipe_file(f"bucket/in.{format_}{compression}", COMPRESSIONS[compression](CONTENTS[format_]))
    rows = handles.read(f"s3://bucket/in.{format_}{compression}")
    assert list(rows) == ROWS
    assert rows.total == s3.size(f"bucket/in.{format_}{compression}")


def test_patterns_and_directories_are_their_files(s3: Any) -> None:
    s3.pipe_file("bucket/data/b.csv", CONTENTS["csv"])
    s3.pipe_file("bucket/data/a.jsonl", b"1\n")
    s3.pipe_file("bucket/data/.hidden", b"2\n")
    s3.pipe_file("bucket/data/sub/c.jsonl", b"3\n")
    assert list(handles.read("s3://bucket/data/*.*")) == [1, *ROWS]
    assert list(handles.read("s3://bucket/data/[a].*")) == [1]
    folder = handles.read("s3://bucket/data")
    assert folder.names == ["a.jsonl", "b.csv", "sub/c.jsonl"]
    assert list(folder) == [b"1\n", CONTENTS["csv"], b"3\n"]
    assert list(handles.read("s3://bucket/data/sub/", format="jsonl")) == [3]
    with pytest.raises(FileNotFoundError, match="no file matches this pattern"):
        handles.read("s3://bucket/data/*.parquet")
    with pytest.raises(FileNotFoundError) as raised:
        handles.read("s3://bucket/nothing.csv")
    assert raised.value.filename == "s3://bucket/nothing.csv"


def test_a_large_file_is_read_in_blocks(s3: Any) -> None:
    lines = b"".join(b'{"n": %d}\n' % n for n in range(300_000))
    s3.pipe_file("bucket/in.jsonl", lines)
    assert sum(row["n"] for row in handles.read("s3://bucket/in.jsonl")) == sum(range(300_000))


def line(index: int) -> bytes:
    return b'{"index":%d,"result":%d}\n' % (index, 2 * index)


def output(name: str, **options: Any) -> FileOutput:
    target = open_output(name, **{"retry_errors": False, "restart": False, **options})
    assert isinstance(target, FileOutput)
    return target


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.parquet", "out.jsonl.zst"])
def test_an_output_goes_on_with_its_journal_there(s3: Any, name: str) -> None:
    url = f"s3://bucket/{name}"
    first = output(url)
    first.write(line(0))
    first.write(line(1))
    first.sync()
    first.write(line(2))  # lost, as its producer dies here
    second = output(url)
    assert sorted(second.done) == [0, 1]
    second.write(line(2))
    second.finish(keep_journal=False)
    assert s3.find("bucket") == [f"bucket/{name}"]
    with pytest.raises(ConfigError, match="exists, and has no journal to go on with"):
        output(url)
    rows = list(handles.read(url))
    assert [(row["index"], row["result"]) for row in rows] == [(0, 0), (1, 2), (2, 4)]


def test_a_job_that_begins_anew_deletes_its_journal(s3: Any) -> None:
    url = "s3://bucket/out.jsonl"
    first = output(url)
    first.write(line(0))
    first.finish(keep_journal=True)
    again = output(url, restart=True)
    assert not len(again.done)
    again.clear()
    again.write(line(7))
    again.finish(keep_journal=True)
    assert s3.cat_file("bucket/out.jsonl") == line(7)
    assert sorted(output(url).done) == [7]
