"""``penstock batch``: rows in, one line for each out, whatever dies."""

from __future__ import annotations

import asyncio
import csv
import io
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest
from redis import Redis

from penstock.broker.queue.leases import TTL_S
from penstock.broker.wire.keys import Keys
from tests.handles.site import INSTANCE, Site
from tests.serve.cli.command_line import CODE, command_line
from tests.serve.cli.conftest import Penstock, environment, on_terminal, running
from tests.support.forks import shared_forks
from tests.support.waiting import wait_until


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
    assert "(--max-row-bytes is 20)" in large["error"]["message"]
    assert "empty" in empty["error"]["message"]


def test_a_row_without_the_field_of_the_shard_key_is_an_error_line(
    site: Site, penstock: Penstock, tmp_path: Path
) -> None:
    site.serve(echo)
    (tmp_path / "in.jsonl").write_text('{"user": "a"}\n{"who": "b"}\n{"half":\n')
    ran = penstock("batch", "ask", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--shard-key", "user")
    assert ran.code == 1
    keyed, without, malformed = lines_of(tmp_path / "out.jsonl")
    assert keyed["result"] == {"user": "a"}
    assert without["error"]["message"] == "the row has no field 'user' for --shard-key"
    assert malformed["error"]["message"].startswith("the row is not JSON")


def test_a_method_and_a_deadline_for_every_row(site: Site, penstock: Penstock, tmp_path: Path) -> None:
    class Model:
        def __call__(self, request: Any) -> str:
            return "called"

        async def wait(self, request: Any) -> Any:
            await asyncio.sleep(60 * request.data)
            return "waited"

    site.serve(Model)
    ran = penstock("batch", "ask", "-", "-o", "-", "--method", "wait", "--timeout", "1", stdin="0\n1\n")
    assert ran.code == 1
    soon, late = sorted(ran.lines(), key=lambda line: line["index"])
    assert soon["result"] == "waited"
    assert (late["row"], late["error"]["type"]) == (2, "RequestTimeout")


def test_a_csv_file_is_objects_with_numbers(site: Site, penstock: Penstock, tmp_path: Path) -> None:
    site.serve(echo)
    text = io.StringIO()
    csv.writer(text).writerows([["name", "n", "x", "code"], ["Ada, L.", 1, 2.5, "007"], ["two\nlines", -1, "", "12"]])
    (tmp_path / "in.csv").write_text(text.getvalue() + "too,few\n")
    ran = penstock("batch", "ask", tmp_path / "in.csv", "-o", tmp_path / "out.jsonl")
    assert ran.code == 1
    first, second, third = lines_of(tmp_path / "out.jsonl")
    assert first["result"] == {"name": "Ada, L.", "n": 1, "x": 2.5, "code": "007"}
    assert second["result"] == {"name": "two\nlines", "n": -1, "x": None, "code": "12"}
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
    *_, summary = map(orjson.loads, ran.err.splitlines())
    assert (summary["event"], summary["results"]) == ("summary", 3)


def test_it_is_quiet_where_nobody_looks(site: Site, penstock: Penstock) -> None:
    site.serve(echo)
    assert penstock("batch", "ask", "-", "-o", "-", "--quiet", stdin="1\n").err == ""


def test_a_terminal_shows_rate_errors_and_time_left(site: Site, tmp_path: Path) -> None:
    site.serve(pick)
    (tmp_path / "in.jsonl").write_text('"good"\n"bad"\n')
    arguments = ["batch", "ask", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    with on_terminal(arguments, environment(site.url), "stderr") as (process, read):
        shown = b"".join(iter(read, b""))
    assert process.returncode == 1
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"━ 100%  2 rows  [\d,]+ rows/s  1 errors  0:00 left", text)


def test_a_terminal_and_json_lines_say_what_a_batch_waits_for(site: Site, tmp_path: Path) -> None:
    site.declare()
    (tmp_path / "in.jsonl").write_text("1\n2\n")
    arguments = ["batch", "ask", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "shown.jsonl")]
    with on_terminal(arguments, environment(site.url), "stderr") as (process, read):
        shown = b""
        while b"waits for a replica to start" not in shown and (more := read()):
            shown += more
        process.terminate()
        while read():
            pass
    assert b"waits for a replica to start" in shown
    with _batch(site.url, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--json") as process:
        assert process.stderr is not None
        lines = map(orjson.loads, process.stderr)
        waiting = next(line for line in lines if line["waits_for"] == "replicas")
        site.serve(echo)
        *_, summary = lines
        assert process.wait(30) == 0
    assert waiting == {
        "event": "progress",
        "rows": 0,
        "results": 0,
        "errors": 0,
        "retried": 0,
        "in_flight": 2,
        "rows_per_s": 0.0,
        "share": 0.0,
        "seconds_left": None,
        "waits_for": "replicas",
    }
    assert (summary["event"], summary["results"]) == ("summary", 2)


def test_what_cannot_be_is_refused_before_anything_is_sent(site: Site, penstock: Penstock, tmp_path: Path) -> None:
    ran: list[Any] = []
    site.serve(ran.append)
    rows, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows.write_text("1\n")

    refused = penstock("batch", "nowhere", rows, "-o", output)
    assert (refused.code, "no endpoint 'nowhere'" in refused.err) == (2, True)
    refused = penstock("batch", "ask", tmp_path / "missing", "-o", output)
    assert (refused.code, refused.err) == (2, f"Error: {tmp_path / 'missing'}: No such file or directory\n")
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


def test_a_job_that_goes_on_still_says_that_there_were_errors(site: Site, penstock: Penstock, tmp_path: Path) -> None:
    site.serve(pick)
    (tmp_path / "in.jsonl").write_text('"good"\n"bad"\n')
    for told in ("1 results, 1 errors in", "0 results, 0 errors (2 were done before, 1 of them errors: --retry"):
        ran = penstock("batch", "ask", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--job", "some")
        assert ran.code == 1
        assert told in ran.err
    assert len(lines_of(tmp_path / "out.jsonl")) == 2


@pytest.mark.parametrize(("options", "nice"), [((), 19), (("--nice", "5"), 5)])
def test_it_stands_back_for_what_serves_on_its_machine(
    site: Site, tmp_path: Path, options: tuple[str, ...], nice: int
) -> None:
    site.declare()
    (tmp_path / "in.jsonl").write_text("1\n")
    arguments = ("batch", "ask", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), *options)
    with running([sys.executable, "-c", CODE, *arguments], environment(site.url)) as process:  # a fork has another id
        wait_until(lambda: site.batch_depth() == 1)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == max(nice, os.getpriority(os.PRIO_PROCESS, 0))


def test_an_interrupted_job_says_how_it_goes_on(site: Site, tmp_path: Path) -> None:
    site.declare()
    (tmp_path / "in.jsonl").write_text("1\n2\n3\n")
    with _batch(site.url, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--job", "three") as process:
        wait_until(lambda: site.batch_depth() == 3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "out.jsonl has what is done; the same command goes on with the job 'three'" in err
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
        _, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "0 results, 0 errors in" in err
    assert "out.jsonl has what is done, and the rest is given up: with a --job, the same command would go on" in err
    wait_until(lambda: site.batch_depth() == 0)


REPLICA = """
import asyncio, os, sys
from penstock.broker.registry.records import BackendSpec
from penstock.workers.executing import user_code
from penstock.workers.executing.runner import Runner
from penstock.workers.replica import Replica

async def slowly(request):
    await asyncio.sleep(0.008)
    return request.data

async def main(url):
    replica = f"model#{os.getpid()}"
    config = BackendSpec(max_deliveries=100, max_concurrent_queries=8)
    runner = await Runner.start("model", replica, user_code.dump(slowly), config)
    await Replica(url, "default", "model", replica, runner).start()
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main(sys.argv[1]))
"""


@contextmanager
def _dying_replicas(url: str) -> Generator[list[int]]:
    """Two replicas, one of which is killed and replaced at random moments; gives the ids of those that were killed."""
    killed, ended = list[int](), threading.Event()

    def start() -> subprocess.Popen[bytes]:
        python = shared_forks("penstock.workers.replica").python
        replica = subprocess.Popen([python, "-c", REPLICA, url], stdout=subprocess.PIPE)
        assert replica.stdout is not None
        assert replica.stdout.readline() == b"ready\n", "the replica ended before it served"
        return replica

    def kill_some(replicas: list[subprocess.Popen[bytes]]) -> None:
        # Most live longer than a lease: one that has held its own for less redelivers nothing.
        while not ended.wait(random.uniform(0.0, 1.5 * TTL_S)):
            dying = replicas.pop(0)
            _kill(dying)
            killed.append(dying.pid)
            replicas.append(start())
        for replica in replicas:
            _kill(replica)

    killing = threading.Thread(target=kill_some, args=([start(), start()],))
    killing.start()
    try:
        yield killed
    finally:
        ended.set()
        killing.join()


NURSERY = """
import os, sys
from penstock.serve.cli import batch, main

for _ in sys.stdin:
    if (pid := os.fork()) == 0:
        main()
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class _Producers:
    """Producers of one job, one after another: each a process that has done its imports, which take longest of all."""

    def __init__(self, url: str, *options: str) -> None:
        self._nursery = subprocess.Popen(
            [sys.executable, "-c", NURSERY, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(url),
            start_new_session=True,
        )

    def begin(self) -> int:
        """Begin one, and return the id of its process."""
        assert self._nursery.stdin is not None
        self._nursery.stdin.write("\n")
        self._nursery.stdin.flush()
        return self._read()

    def end(self) -> int:
        """Return what the one that was begun ends with."""
        return self._read()

    def _read(self) -> int:
        assert self._nursery.stdout is not None
        return int(self._nursery.stdout.readline())

    def close(self) -> None:
        with self._nursery:
            os.killpg(self._nursery.pid, signal.SIGKILL)


def _is_longer(file: Path, size: int) -> bool:
    return file.exists() and file.stat().st_size > size


def _kill(process: subprocess.Popen[Any]) -> None:
    with process:
        process.kill()


@pytest.mark.timeout(300)
def test_whatever_is_killed_the_output_has_every_row_once(site: Site, tmp_path: Path) -> None:
    """Twenty producers die over one job, at any moment: while they start, find out what there is, or write."""
    rows, output = 20_000, tmp_path / "out.jsonl"
    site.declare()
    (tmp_path / "in.jsonl").write_text("".join(f"{n}\n" for n in range(rows)))
    options = ("batch", "ask", str(tmp_path / "in.jsonl"), "-o", str(output), "--job", "killed", "--window", "300")
    with (
        _dying_replicas(site.url) as killed,
        Redis.from_url(site.url) as redis,
        closing(_Producers(site.url, *options)) as producers,
    ):
        for number in range(20):
            size = output.stat().st_size if output.exists() else 0
            producer = producers.begin()
            if number % 4:
                wait_until(partial(_is_longer, output, size), timeout_s=30)
                time.sleep(random.uniform(0.0, 0.1))  # the moment is the point
            else:
                time.sleep(random.uniform(0.0, 0.5))
            os.kill(producer, signal.SIGKILL)
            assert producers.end() == -signal.SIGKILL, "it was over before it could be killed"
            # Else the next one waits until this lapses: 3 s, twenty times.
            redis.delete(Keys(INSTANCE).job_owner(Keys.job_name("killed")))
        producers.begin()
        assert producers.end() == 0
    assert killed
    assert [(line["index"], line["result"]) for line in lines_of(output)] == [(n, n) for n in range(rows)]


def _batch(url: str, rows: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command_line("batch", "ask", str(rows), "-o", str(output), *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(url),
    )
