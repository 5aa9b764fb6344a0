"""Progress of a running batch: two lines on a terminal, or lines of JSON, from a thread of its own.

The thread reports while no result comes, too: that is when its reader wants to know what the batch waits for.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Protocol

import click
import orjson
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from ...handles.batch.batch import Batch
from ...handles.batch.progress import BatchProgress, WaitsFor
from ...handles.errors import PenstockError
from .batch_tally import Pace, Tally

_TERMINAL_EVERY_S = 0.25
_JSON_EVERY_S = 1.0
_MAX_BAR_WIDTH = 40

_WAITS: dict[WaitsFor, str] = {
    "queue": "waits for room in the queue (max_queued_requests)",
    "replicas": "waits for a replica to start",
    "broker": "waits for the broker, which cannot be reached",
}


class _View(Protocol):
    every_s: float

    def show(self, tally: Tally, pace: Pace, progress: BatchProgress | None) -> None: ...

    def stop(self) -> None: ...


class ProgressReport:
    """Shows how a batch is doing, while a block lasts."""

    def __init__(self, view: _View, tally: Tally, batch: Batch) -> None:
        self._view, self._tally, self._batch = view, tally, batch
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> ProgressReport:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Show how things stand, once more, and end."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        self._view.stop()

    def _run(self) -> None:
        while not self._ended.wait(self._view.every_s):
            self._show()
        self._show()

    def _show(self) -> None:
        try:
            progress = None if self._ended.is_set() else self._batch.progress()
        except PenstockError:
            progress = None  # such as that the batch is just over
        self._view.show(self._tally, self._tally.pace(), progress)


def report_progress(tally: Tally, batch: Batch, *, json: bool) -> ProgressReport | None:
    """Return what reports to standard error; None where that is no terminal and JSON was not asked for."""
    if json:
        return ProgressReport(_JsonLines(), tally, batch)
    console = Console(stderr=True)
    return ProgressReport(_Terminal(console), tally, batch) if console.is_terminal else None


class _JsonLines:
    every_s = _JSON_EVERY_S

    def __init__(self) -> None:
        self._is_first = True

    def show(self, tally: Tally, pace: Pace, progress: BatchProgress | None) -> None:
        if progress is None:
            return
        line = {
            "event": "progress",
            "rows": tally.resumed + tally.rows,
            "results": tally.results,
            "errors": tally.errors,
            "retried": progress.retried,
            "in_flight": progress.in_flight,
            "rows_per_s": round(pace.rows_per_s, 1),
            "share": None if pace.share is None else round(pace.share, 4),
            "seconds_left": None if pace.left_s is None else round(pace.left_s, 1),
            "waits_for": progress.waits_for,
        }
        click.echo(orjson.dumps(line), err=True)

    def stop(self) -> None:
        """The summary follows."""


class _Terminal:
    every_s = _TERMINAL_EVERY_S

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._spinner = Spinner("dots")
        self._live.start()

    def show(self, tally: Tally, pace: Pace, progress: BatchProgress | None) -> None:
        lines: list[RenderableType] = [self._counts(tally, pace)]
        if progress is not None and (waits := _waits(progress)):
            lines.append(Text(waits, style="yellow", overflow="ellipsis", no_wrap=True))
        self._live.update(Group(*lines), refresh=True)

    def stop(self) -> None:
        self._live.stop()

    def _counts(self, tally: Tally, pace: Pace) -> RenderableType:
        counts = Text.assemble(
            ("" if pace.share is None else f"{pace.share:4.0%} ", "default"),
            (f" {tally.resumed + tally.rows:,} rows", "default"),
            (f"  {pace.rows_per_s:,.0f} rows/s", "cyan"),
            (f"  {tally.errors:,} errors", "red" if tally.errors else "dim"),
            ("" if pace.left_s is None else f"  {_clock(pace.left_s)} left", "default"),
            no_wrap=True,
        )
        table = Table.grid(padding=(0, 1, 0, 0))
        room = self._live.console.width - counts.cell_len - 2
        if pace.share is None:
            table.add_row(self._spinner, counts)
        elif room < 5:
            table.add_row(counts)
        else:
            bar: Any = ProgressBar(total=1.0, completed=pace.share, width=min(_MAX_BAR_WIDTH, room))
            table.add_row(bar, counts)
        return table


def _waits(progress: BatchProgress) -> str:
    parts = [f"{progress.retried:,} sent again"] if progress.retried else []
    if progress.waits_for is not None:
        parts.append(_WAITS[progress.waits_for])
    return ", ".join(parts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
