"""The examples of docs/batches.md, run one after another in one folder: each prints what the page says."""

from __future__ import annotations

import gzip
import re
import shlex
import subprocess
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.handles.files.conftest import s3, s3_server
from tests.handles.site import Site, echo
from tests.serve.cli.command_line import command_line
from tests.serve.cli.conftest import environment

pa: Any = import_module("pyarrow")
pq: Any = import_module("pyarrow.parquet")
zstandard: Any = import_module("zstandard")

__all__ = ["s3", "s3_server"]

PAGE = Path(__file__).parents[4] / "docs" / "batches.md"
SHELL = """
set -euo pipefail
penstock() {{ {command} "$@"; }}
"""


def blocks() -> list[tuple[str, str]]:
    """Return the examples of the part about files, each with its language."""
    text = PAGE.read_text(encoding="utf-8").partition("\n# When a batch starts")[0]
    return re.findall(r"^```(sh|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[tuple[str, str]]:
    """Return the commands of a block of shell, each with the output that the comments behind it give."""
    found: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith("# "):
            found[-1][1].append(line.removeprefix("# "))
        elif line:
            found.append((line, []))
    return [(command, "\n".join(output)) for command, output in found]


def is_as_shown(output: str, shown: str) -> bool:
    """Whether an output is what the page shows, in which "…" stands for anything and lines may be broken."""
    pattern = ".*".join(re.escape(" ".join(part.split())) for part in shown.split("…"))
    return re.fullmatch(pattern.replace(r"\ .*", ".*").replace(r".*\ ", ".*"), " ".join(output.split())) is not None


def score(request: Any) -> dict[str, Any]:
    return {"score": (request.data["age"] or 0) / 72, "name": request.data["name"]}


def digit(request: Any) -> dict[str, Any]:
    return {"label": request.data["pixel"] % 10}


PEOPLE = "name,zip,age\nAda,10115,36\nBob,20095,41\nCyd,01067,\nDee,80331,29\n"


@pytest.fixture
def folder(site: Site, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the page names, and the endpoints."""
    for name, function in (("digit", digit), ("score", score), ("echo", echo)):
        site.serve(function, name, tag=name)
    images = "pixel,other\n" + "".join(f"{n},{n}\n" for n in range(100))
    (tmp_path / "images.csv").write_text(images)
    (tmp_path / "tuesday.csv").write_text(images.replace("7,7", "7,8"))
    (tmp_path / "people.csv").write_text(PEOPLE)
    s3.pipe_file("bucket/people.csv.gz", gzip.compress(PEOPLE.encode()))
    lines = b'{"n":1}\n"two"\n[3]\n'
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "rows.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    (tmp_path / "data").mkdir()
    ages: dict[str, dict[str, int | None]] = {"a": {"Ada": 36, "Bob": 41}, "b": {"Cyd": None, "Dee": 29}}
    for name, rows in ages.items():
        table = pa.table({"name": list(rows), "age": pa.array(rows.values(), pa.int32())})
        pq.write_table(table, tmp_path / "data" / f"{name}.parquet")
    monkeypatch.setenv("PENSTOCK_REDIS_URL", site.url)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_shell(command: str, penstock: Sequence[str], environ: dict[str, str]) -> str:
    """Run a command of the page, in which ``penstock`` stands for the command that is given."""
    shell = SHELL.format(command=shlex.join(penstock))
    ran = subprocess.run(
        ["bash", "-c", shell + command.split("   # ")[0]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
        env=environ,
    )
    return ran.stdout


@pytest.mark.timeout(600)
def test_every_example_prints_what_the_page_says(site: Site, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environ = environment(site.url)
    scope: dict[str, Any] = {}
    ran = 0
    for language, block in blocks():
        if language == "python":
            exec(compile(block, str(PAGE), "exec"), scope)
            ran += 1
            continue
        for command, shown in commands(block):
            if command.startswith("export "):
                continue
            output = run_shell(command, command_line(), environ)
            assert not shown or is_as_shown(output, shown), f"{command}\n{output}"
            assert shown.startswith("Error: ") or "Error" not in output, f"{command}\n{output}"
            ran += 1
    assert ran > 20
    printed = capsys.readouterr().out.splitlines()
    assert sorted(printed) == [
        "0 {'score': 0.5, 'name': 'Ada'}",
        f"1 {{'score': {41 / 72}, 'name': 'Bob'}}",
        "2 {'score': 0.0, 'name': 'Cyd'}",
        f"3 {{'score': {29 / 72}, 'name': 'Dee'}}",
    ]
    assert scope["results"] == [{"age": 36}, {"age": 41}, {"age": 0}, {"age": 29}]
    assert scope["scores"] == [0.5, 41 / 72, 0.0, 29 / 72]
    table = pq.read_table(folder / "scores.parquet").sort_by("index").to_pylist()
    assert [(row["file"], row["row"], row["score"]) for row in table] == [
        ("data/a.parquet", 1, 0.5),
        ("data/a.parquet", 2, 41 / 72),
        ("data/b.parquet", 1, 0.0),
        ("data/b.parquet", 2, 29 / 72),
    ]
