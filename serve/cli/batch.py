"""``penstock batch``: every row of a file through an endpoint."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack, suppress
from typing import Any

import click
import orjson
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from ...broker.wire import exact_json
from ...handles import BatchItem, BatchResult
from ...handles.batch.batch import Batch
from ...handles.errors import BackendError, ConfigError, MalformedBody
from ...handles.files.csv_rows import parse_types
from ...handles.files.json_lines import MAX_ROW_BYTES
from ...handles.files.outputs import JOURNAL, Output, exists, is_resumable, open_output
from ...handles.files.rows import FORMATS, Format, Rows
from ...handles.files.sources import shown_path, without_file_scheme
from ...handles.files.tables import is_plain
from ...handles.response import Response
from .exits import FAILED
from .options import check_text, door_to, error_of, result_line, telling_what_is_wrong, which_instance, wrong

_SHOW_EVERY = 64
_SHOWN = 200
"""Bytes of a response that are shown of it."""
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
    show_default="64 MiB",
    help="A longer row is an error.",
)
@click.option(
    "--nice",
    type=click.IntRange(0, _LEAST_URGENT),
    default=_LEAST_URGENT,
    show_default=True,
    help="The priority of this process, as nice(1) has it. Replicas and proxies run at 15, from Ray: with less, this "
    "takes their time where it shares their machine.",
)
@click.option("--quiet", is_flag=True, help="No progress bar, no summary.")
@click.option("--json", "json", is_flag=True, help="Write the summary as JSON, to standard error.")
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
        door = stack.enter_context(door_to(redis_url, instance))
        with telling_what_is_wrong():
            producer = door.batch(
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
        tally = _Tally(rows, resumed=len(done), failed=failed, ok_statuses=ok)
        items = rows if shard_key is None else (_keyed(row, shard_key) for row in rows)
        results = producer.as_completed(items, skip=done)
        progress = None if quiet else _progress(tally, stack)
        try:
            with telling_what_is_wrong():
                _write(results, target, tally, progress)
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
        click.echo(orjson.dumps(tally.summary()), err=True)
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


class _Tally:
    """What was done so far."""

    def __init__(self, rows: Rows, *, resumed: int, failed: int, ok_statuses: frozenset[int]) -> None:
        """``resumed`` rows are in the output already, ``failed`` of them as errors."""
        self._rows, self._resumed, self._failed, self._ok_statuses = rows, resumed, failed, ok_statuses
        self._began_s = time.monotonic()
        self.results = self.errors = 0

    def line(self, result: BatchResult) -> bytes:
        """Count a result, and return its line."""
        line: dict[str, Any] = {"index": result.index}
        file, row = self._rows.place_of(result.index)
        if file is not None:
            line["file"] = os.fsencode(file).decode(errors="backslashreplace")
            if self._rows.format != "files":
                line["row"] = row
        error = result.error
        if error is None and isinstance(result.value, Response):
            error = self._bad_status(result.value)
        if error is None:
            try:
                written = exact_json.dumps({**line, **result_line(result.value)}) + b"\n"
            except TypeError as e:
                error = e
            else:
                self.results += 1
                return written
        self.errors += 1
        return exact_json.dumps({**line, "row": row, "error": error_of(error)}) + b"\n"

    def _bad_status(self, response: Response) -> Exception | None:
        """Return the error that a response is, unless its status is one of results."""
        status = response.status_code
        if status < 400 or status in self._ok_statuses:
            return None
        said = response.body[:_SHOWN].decode(errors="replace")
        return BackendError("Response", f"the response has the status {status}: {said}", status=status)

    @property
    def rate(self) -> float:
        return (self.results + self.errors) / max(1e-6, time.monotonic() - self._began_s)

    @property
    def progress(self) -> tuple[float, int | None]:
        """How much of the input is done, of how much, as far as can be told from what of it was read."""
        done = self._resumed + self.results + self.errors
        return self._rows.read * min(1.0, done / max(1, self._rows.count)), self._rows.total

    def summary(self) -> dict[str, Any]:
        return {
            "rows": self._resumed + self.results + self.errors,
            "results": self.results,
            "errors": self.errors,
            "resumed": self._resumed,
            "resumed_errors": self._failed,
            "seconds": round(time.monotonic() - self._began_s, 3),
            "rows_per_s": round(self.rate, 1),
        }

    def __str__(self) -> str:
        failed = f", {self._failed} of them errors: --retry-errors runs these again" if self._failed else ""
        resumed = f" ({self._resumed} were done before{failed})" if self._resumed else ""
        took_s = time.monotonic() - self._began_s
        return f"{self.results} results, {self.errors} errors{resumed} in {took_s:.1f} s, {self.rate:.0f} rows/s"


def _write(results: Batch, target: Output, tally: _Tally, progress: Progress | None) -> None:
    """Write a line for each result; the job is told what is durable, and keeps it no longer."""
    synced_at = shown_at = time.monotonic()
    for count, result in enumerate(results, start=1):
        target.write(tally.line(result))
        if count % _SHOW_EVERY and tally.rate > _SHOW_EVERY:
            continue  # the clock and the terminal cost more than a line
        now = time.monotonic()
        if now - synced_at > target.sync_every_s:
            target.sync()
            if target.is_durable:
                results.checkpoint()
            synced_at = now
        if progress is not None and now - shown_at > 0.1:
            _show(progress, tally)
            shown_at = now
    if progress is not None:
        _show(progress, tally)
    target.sync()


def _keyed(row: Any, field: str) -> Any:
    if isinstance(row, dict) and field in row:
        return BatchItem(row, shard_key=str(row[field]))  # pyright: ignore[reportUnknownArgumentType]
    return row if isinstance(row, Exception) else MalformedBody(f"the row has no field {field!r} for --shard-key")


# -- progress


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.fields['rate']:,.0f} rows/s", style="cyan")


class _Errors(ProgressColumn):
    def render(self, task: Task) -> Text:
        errors: int = task.fields["errors"]
        return Text(f"{errors:,} errors", style="red" if errors else "dim")


def _progress(tally: _Tally, stack: ExitStack) -> Progress | None:
    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    _, total = tally.progress
    bar = BarColumn() if total is not None else SpinnerColumn()
    columns = (bar, TextColumn("{task.fields[rows]:,} rows"), _Rate(), _Errors(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, auto_refresh=False, transient=True)
    progress.add_task("", total=total, rows=0, rate=0.0, errors=0)
    stack.enter_context(progress)
    return progress


def _show(progress: Progress, tally: _Tally) -> None:
    completed, _ = tally.progress
    rows = tally.results + tally.errors
    progress.update(
        progress.task_ids[0], completed=completed, rows=rows, rate=tally.rate, errors=tally.errors, refresh=True
    )
