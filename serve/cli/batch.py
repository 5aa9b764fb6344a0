"""``penstock batch``: every row of a file through an endpoint."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack, suppress
from typing import Any

import click
import orjson

from ...handles import BatchItem
from ...handles.batch.batch import Batch
from ...handles.errors import ConfigError, MalformedBody
from ...handles.files.csv_rows import parse_types
from ...handles.files.json_lines import MAX_ROW_BYTES
from ...handles.files.outputs import JOURNAL, Output, exists, is_resumable, open_output
from ...handles.files.rows import FORMATS, Format, Rows
from ...handles.files.sources import shown_path, without_file_scheme
from ...handles.files.tables import is_plain
from .batch_progress import report_progress
from .batch_tally import Tally
from .exits import FAILED
from .options import check_text, thin_connection, usage_errors, which_instance, wrong

_CLOCK_EVERY = 64
"""Rows between looks at the clock, where they come fast."""
_LEAST_URGENT = 19
"""Replicas and proxies have 15, from Ray: only more than that stands back for them."""


@click.command()
@click.argument("endpoint")
@click.argument("input_", metavar="INPUT")
@which_instance
@click.option(
    "--output",
    "-o",
    required=True,
    metavar="OUTPUT",
    help="JSON lines, CSV or Parquet by its name; - is JSON lines on standard output.",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(FORMATS),
    help="Of INPUT. By default its name decides: a directory is files, and what is neither *.csv, *.tsv nor *.parquet "
    "is jsonl.",
)
@click.option("--columns", metavar="COLUMN,...", help="Of a Parquet file, those that are read. By default, all.")
@click.option("--delimiter", metavar="CHARACTER", help="Between the columns of a CSV file. By default, by its header.")
@click.option(
    "--types",
    metavar="COLUMN=TYPE,...",
    help="Of columns of a CSV file: str, int, float or number. By default, by its rows.",
)
@click.option("--strings", is_flag=True, help="Read every column of a CSV file without a type of its own as text.")
@click.option(
    "--job",
    metavar="NAME",
    help="A job by this name can be interrupted, and goes on when run again with the same INPUT.",
)
@click.option("--retry-errors", is_flag=True, help="Run again the rows of the --job that are error lines in OUTPUT.")
@click.option("--restart-job", is_flag=True, help="Forget what the --job has done, empty OUTPUT, and begin anew.")
@click.option(
    "--ok-status",
    metavar="STATUS,...",
    default="",
    help="HTTP statuses from 400 on that are results. Other responses with such a status are error lines.",
)
@click.option("--window", type=click.IntRange(1), metavar="N", help="Rows in flight. By default, by the replicas.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), metavar="SECONDS", help="For each row.")
@click.option("--method", default="__call__", metavar="NAME", help="The method of the backend's class.")
@click.option("--shard-key", metavar="FIELD", help="Rows with the same value of FIELD go to the same backend.")
@click.option(
    "--max-row-bytes",
    type=click.IntRange(1),
    default=MAX_ROW_BYTES,
    metavar="BYTES",
    help="A longer row is an error. Default: 64 MiB.",
)
@click.option(
    "--nice",
    type=click.IntRange(0, _LEAST_URGENT),
    default=_LEAST_URGENT,
    show_default=True,
    help="The priority of this process, as nice(1) has it. At that of the replicas and proxies of its machine, mostly "
    "0, it takes time from them.",
)
@click.option("--quiet", is_flag=True, help="No progress bar, no summary.")
@click.option(
    "--json",
    "json",
    is_flag=True,
    help="Write progress and summary as lines of JSON, to standard error, once a second.",
)
def batch(
    endpoint: str,
    input_: str,
    redis_url: str | None,
    instance: str,
    output: str,
    format_: Format | None,
    columns: str | None,
    delimiter: str | None,
    types: str | None,
    strings: bool,
    job: str | None,
    retry_errors: bool,
    restart_job: bool,
    ok_status: str,
    window: int | None,
    timeout: float | None,
    method: str,
    shard_key: str | None,
    max_row_bytes: int,
    nice: int,
    quiet: bool,
    json: bool,
) -> None:
    """Send every row of INPUT through ENDPOINT, behind its interactive requests.

    INPUT is a file of JSON lines, each of which the backend reads as request.data; a CSV or Parquet file, each record
    of which it reads as an object; a directory, each file of which it reads as bytes; a quoted glob pattern; a URL,
    such as s3://bucket/rows.parquet; or "-", standard input. Files may be compressed by gzip or zstd. In CSV, a column
    holds numbers if all its values are numbers, else text; an empty value is null. Parquet keeps its columns' types.

    OUTPUT gets a line for each row, as they come: {"index": 0, "result": ...} or {"index": 0, "row": 1, "error":
    {"type", "message"}}, and "file" where there may be several. Bytes that are not text have "encoding": "base64". A
    row that is bad is such a line, and the rest goes on; the exit code is then 1, also of a job that goes on after it.
    As CSV or Parquet, by its name, OUTPUT has these as columns. It may be compressed (.gz, .zst), and a URL.

    An OUTPUT that exists is refused, unless it is that of a --job, which then goes on where it was: whatever was
    killed, OUTPUT has one line for every row in the end. A job belongs to its INPUT: with another one it is refused.

    \b
    Examples:
      penstock batch digit images.csv -o digits.jsonl
      penstock batch digit images.csv -o digits.jsonl --job nightly
      penstock batch digit images.csv -o digits.jsonl --job nightly --retry-errors
      penstock batch score 'people/*.parquet' -o scores.parquet --columns age,income
      penstock batch score people.csv -o scores.jsonl --types zip=str,age=int
      penstock batch score s3://bucket/people.csv.gz -o s3://bucket/scores.csv
      zcat rows.gz | penstock batch score - -o - | jq .result
    """  # noqa: D301
    check_text(endpoint=endpoint, job=job, method=method, shard_key=shard_key)
    for option, is_given in (("--retry-errors", retry_errors), ("--restart-job", restart_job)):
        if is_given and job is None:
            wrong(f"{option} is for a job: give its --job")
    if retry_errors and restart_job:
        wrong("--restart-job runs everything again: it cannot be given with --retry-errors")
    if delimiter is not None:
        delimiter = delimiter.replace("\\t", "\t")
        if len(delimiter) != 1 or delimiter in '"\r\n':
            wrong(f"--delimiter is one character, not {delimiter!r}")
    output = without_file_scheme(output)
    _stand_back(nice)
    with ExitStack() as stack:
        try:
            ok = _statuses(ok_status)
            rows = Rows(
                input_,
                format_,
                delimiter=delimiter,
                types=parse_types(types) if types else {},
                strings=strings,
                columns=None if columns is None else columns.split(","),
                max_row_bytes=max_row_bytes,
            )
        except (OSError, ValueError) as e:
            wrong(e)
        stack.callback(rows.close)
        can_go_on = is_resumable(output)
        if can_go_on and job is None:
            _refuse_existing(output)
        connection = stack.enter_context(thin_connection(redis_url, instance))
        with usage_errors():
            producer = connection.batch(
                endpoint,
                window=window,
                timeout_s=timeout,
                method_name=method,
                job=job,
                restart_job=restart_job,
                retry_errors=retry_errors,
            )
        try:
            target = open_output(output, retry_errors=retry_errors, restart=restart_job)
        except (OSError, ValueError) as e:
            wrong(e)
        stack.callback(target.close)
        producer.describe_source(rows.source, rows.names, target.clear)
        done = target.done
        failed = 0 if retry_errors else len(target.failed)
        tally = Tally(rows, resumed=len(done), failed=failed, ok_statuses=ok)
        items = rows if shard_key is None else (_keyed(row, shard_key) for row in rows)
        results = producer.as_completed(items, skip=done)
        progress = None if quiet else report_progress(tally, results, json=json)
        if progress is not None:
            stack.enter_context(progress)
        try:
            with usage_errors():
                _write(results, target, tally)
                target.finish(keep_journal=job is not None)
        except (KeyboardInterrupt, SystemExit):
            if progress is not None:
                progress.stop()
            with suppress(OSError):
                target.sync()
            if job is not None or not quiet:
                click.echo(f"{tally}; {_way_on(output, job)}", err=True)
            raise
        if progress is not None:
            progress.stop()
    if json:
        click.echo(orjson.dumps({"event": "summary", **tally.summary()}), err=True)
    elif not quiet:
        click.echo(str(tally), err=True)
    if tally.errors or failed:
        sys.exit(FAILED)


def _refuse_existing(output: str) -> None:
    try:
        for path in (output, output + JOURNAL):
            if exists(path):
                wrong(f"{shown_path(path)} exists: give another --output, or a --job to go on with")
    except (OSError, ConfigError) as e:
        wrong(e)


def _statuses(text: str) -> frozenset[int]:
    """Read ``404,410``."""
    statuses = frozenset(int(one) for one in text.split(",") if one.isdecimal() and len(one) == 3)
    if text and len(statuses) != len(set(text.split(","))):
        raise ConfigError(f"--ok-status is a list of HTTP statuses such as 404,410; not {text!r}")
    return statuses


def _way_on(output: str, job: str | None) -> str:
    """Return what an interrupted batch keeps, and how it goes on."""
    if not is_resumable(output):
        kept = "what is done was written"
    else:
        kept = f"{shown_path(output) if is_plain(output) else shown_path(output) + JOURNAL} has what is done"
    if job is None:
        return f"{kept}, and the rest is given up: with a --job, the same command would go on"
    return f"{kept}; the same command goes on with the job {job!r}"


def _stand_back(nice: int) -> None:
    """Let the machine run others first, so that web traffic goes first there as it does in the queue."""
    # Of this thread, and of those that it begins: there is none yet.
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, max(nice, os.getpriority(os.PRIO_PROCESS, 0)))


def _write(results: Batch, target: Output, tally: Tally) -> None:
    """Write a line for each result; the job is told what is durable, and keeps it no longer."""
    synced_at = time.monotonic()
    for count, result in enumerate(results, start=1):
        target.write(tally.line(result))
        if count % _CLOCK_EVERY and tally.rate > _CLOCK_EVERY:
            continue  # the clock costs more than a line
        now = time.monotonic()
        if now - synced_at > target.sync_every_s:
            target.sync()
            if target.is_durable:
                results.checkpoint()
            synced_at = now
    target.sync()


def _keyed(row: Any, field: str) -> Any:
    if isinstance(row, dict) and field in row:
        return BatchItem(row, shard_key=str(row[field]))  # pyright: ignore[reportUnknownArgumentType]
    return row if isinstance(row, Exception) else MalformedBody(f"the row has no field {field!r} for --shard-key")
