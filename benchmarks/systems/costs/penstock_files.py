"""Files of many rows through a no-op backend that takes batches, and producers of a job that are killed at random.

    python benchmarks/systems/costs/penstock_files.py --rows 1000000                # rows/s and memory, by format
    python benchmarks/systems/costs/penstock_files.py --rows 1000000 --kills 10     # every row once, whatever is killed

It runs a Valkey, one replica and ``penstock batch``, without Ray, and needs the extra ``penstock[files]``. The process
whose peak memory is given is ``penstock batch``, beside the same one with a file of a hundred rows.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.registry.records import BackendRecord, BackendSpec, Change, EndpointRecord
from penstock.broker.registry.store import Registry
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys
from penstock.handles.batch.items import Indices
from penstock.workers.executing import user_code
from penstock.workers.executing.accept_batch import accept_batch
from penstock.workers.executing.runner import Runner
from penstock.workers.replica import Replica

INSTANCE, ENDPOINT, BACKEND = "default", "ids", "ids"
BATCH_SIZE = 64
CONFIG: dict[str, Any] = {"max_batch_size": BATCH_SIZE, "max_queued_requests": 10_000}
FORMATS = ("parquet", "jsonl", "csv")
PROGRAM = r"""
import atexit, os, re
from penstock.serve.cli import main

def write_peak():
    with open("/proc/self/status") as status, open(os.environ["PEAK"], "w") as file:
        file.write(re.search(r"VmHWM:\s+(\d+) kB", status.read())[1])

atexit.register(write_peak)
main()
"""
"""The command, which leaves its peak memory in a file: ``ru_maxrss`` would begin with that of its parent."""
PRODUCER = (sys.executable, "-c", PROGRAM, "batch", ENDPOINT)
FEW_ROWS = 100


@accept_batch
def ids(requests: list[Any]) -> list[int]:
    return [request.data["id"] for request in requests]


async def serve(url: str) -> None:
    """Declare the endpoint, and be its replica until this process ends."""
    connection = await RedisConnection(url, name="benchmark").open()
    registry = Registry(connection, Keys(INSTANCE))
    backend = BackendRecord(tag=BACKEND, version="1", code="", config=BackendSpec(**CONFIG))
    endpoint = EndpointRecord(name=ENDPOINT, traffic={BACKEND: 1.0})
    await registry.change(lambda seen: Change({BACKEND: backend}, {ENDPOINT: endpoint}))
    runner = await Runner.start(BACKEND, f"{BACKEND}#1", user_code.dump(ids), BackendSpec(**CONFIG))
    await Replica(url, INSTANCE, BACKEND, f"{BACKEND}#1", runner).start()
    print("ready", flush=True)
    await asyncio.Event().wait()


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """Give the URL of a Redis for whose endpoint there is a replica."""
    with EmbeddedServer.start() as server:
        command = [sys.executable, __file__, "--replica", server.url]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as replica:
            assert replica.stdout is not None
            try:
                if replica.stdout.readline() != b"ready\n":
                    raise RuntimeError("the replica did not start")
                yield server.url
            finally:
                replica.kill()


def write_rows(file: Path, rows: int) -> None:
    """Write a file of three columns: a number, a text and a float."""
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema([("id", pa.int64()), ("name", pa.string()), ("score", pa.float64())])
        with pq.ParquetWriter(file, schema) as writer:
            for start in range(0, rows, 100_000):
                numbers = range(start, min(start + 100_000, rows))
                columns = [list(numbers), [f"name {n}" for n in numbers], [n / 7 for n in numbers]]
                writer.write_table(pa.Table.from_arrays(list(map(pa.array, columns)), schema=schema))
        return
    with file.open("w") as out:
        if file.suffix == ".csv":
            out.write("id,name,score\n")
        for n in range(rows):
            if file.suffix == ".csv":
                out.write(f"{n},name {n},{n / 7}\n")
            else:
                out.write(json.dumps({"id": n, "name": f"name {n}", "score": n / 7}) + "\n")


@dataclass(frozen=True)
class Ended:
    """The end of a producer."""

    code: int
    seconds: float
    cpu_s: float
    peak_mib: float


def start(url: str, peak: Path, *arguments: object) -> int:
    """Start a producer, and return its process id."""
    environ = {**os.environ, "PENSTOCK_REDIS_URL": url, "PEAK": str(peak)}
    return os.spawnve(os.P_NOWAIT, PRODUCER[0], [*PRODUCER, *map(str, arguments), "--quiet", "--nice", "0"], environ)


def wait(pid: int, started_at: float, peak: Path) -> Ended:
    _, status, usage = os.wait4(pid, 0)
    code, seconds = os.waitstatus_to_exitcode(status), time.monotonic() - started_at
    peak_mib = int(peak.read_text()) / 1024 if peak.exists() else 0.0
    return Ended(code, seconds, usage.ru_utime + usage.ru_stime, peak_mib)


def run(url: str, file: Path) -> Ended:
    """Run a batch that is no job, and check its output."""
    output = file.with_suffix(".out.jsonl")
    started_at = time.monotonic()
    peak = file.with_suffix(".peak")
    ended = wait(start(url, peak, file, "-o", output), started_at, peak)
    if ended.code:
        raise RuntimeError(f"penstock batch ended with {ended.code}")
    return ended


def check(output: Path, rows: int) -> None:
    """Raise ``RuntimeError`` unless the output has the result of each row once."""
    seen = Indices()
    with output.open("rb") as file:
        for line in file:
            record = json.loads(line)
            if record.get("result") != record["index"] or record["index"] in seen:
                raise RuntimeError(f"a line that is wrong, or there twice: {line!r}")
            seen.add(record["index"])
    if len(seen) != rows:
        raise RuntimeError(f"{rows} rows, and {len(seen)} of them have a line")


def compare(url: str, folder: Path, rows: int, formats: Sequence[str]) -> None:
    print(f"{rows:,} rows of three columns, no-op, batches of up to {BATCH_SIZE}, one replica\n")
    print("| input | MB | s | rows/s | producer's CPU s | peak MiB | with 100 rows |")
    print("|---|---|---|---|---|---|---|")
    for name in formats:
        few, many = folder / f"few.{name}", folder / f"many.{name}"
        write_rows(few, FEW_ROWS)
        write_rows(many, rows)
        base, ended = run(url, few), run(url, many)
        check(many.with_suffix(".out.jsonl"), rows)
        print(
            f"| {name} | {many.stat().st_size / 1e6:.0f} | {ended.seconds:.1f} | {rows / ended.seconds:,.0f} | "
            f"{ended.cpu_s:.1f} | {ended.peak_mib:.0f} | {base.peak_mib:.0f} |",
            flush=True,
        )
        for file in (few, many):
            file.with_suffix(".out.jsonl").unlink()
            file.unlink()


def kill(url: str, folder: Path, rows: int, kills: int, kind: str) -> None:
    """Run a job whose producers are killed at random moments, and check that its output has every row once."""
    file, output = folder / f"in.{kind}", folder / "out.jsonl"
    write_rows(file, rows)
    peak = folder / "peak"
    arguments = (peak, file, "-o", output, "--job", "killed")
    done: list[int] = []
    for _ in range(kills):
        size = output.stat().st_size if output.exists() else 0
        started_at = time.monotonic()
        producer = start(url, *arguments)
        line_bytes, share = 34, rows / (kills + 1)
        goal = size + random.uniform(0.0, 1.0) * share * line_bytes
        while not output.exists() or output.stat().st_size <= goal:
            if os.waitpid(producer, os.WNOHANG) != (0, 0):
                raise RuntimeError("a producer ended before it could be killed: give more --rows")
            time.sleep(0.005)
        os.kill(producer, signal.SIGKILL)
        wait(producer, started_at, peak)
        done.append(output.read_bytes().count(b"\n"))
    started_at = time.monotonic()
    ended = wait(start(url, *arguments), started_at, peak)
    if ended.code:
        raise RuntimeError(f"penstock batch ended with {ended.code}")
    check(output, rows)
    print(f"{rows:,} rows of {kind}, {kills} producers killed, when these rows were done: {done}: every row once")


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--formats", default="parquet,jsonl", help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--kills", type=int, default=0, help="producers of a job to kill, instead of comparing formats")
    parser.add_argument("--replica", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.replica:
        asyncio.run(serve(options.replica))
        return
    formats = options.formats.split(",")
    with serving() as url, tempfile.TemporaryDirectory() as folder:
        if options.kills:
            kill(url, Path(folder), options.rows, options.kills, formats[0])
        else:
            compare(url, Path(folder), options.rows, formats)


if __name__ == "__main__":
    main()
