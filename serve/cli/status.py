"""``penstock status``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.segment import Segment, Segments
from rich.text import Text

from ...broker.errors import BrokerUnavailable
from ..status.reader import reading_status
from ..status.status import Status, plural
from .options import as_json, error_of, known_url, usage_errors, which_instance, write_json


@click.command()
@which_instance
@click.option("--watch", is_flag=True, help="Repeat until interrupted.")
@click.option(
    "--every", default=1.0, show_default=True, type=click.FloatRange(0.1), help="Seconds between repetitions."
)
@as_json
def status(redis_url: str | None, instance: str, watch: bool, every: float, json: bool) -> None:
    """Show the status of an instance: its backends, endpoints and proxies.

    With --watch a terminal shows a live table; a pipe receives one table after another, with --json one line each. An
    outage of the broker is shown, and the command waits for its end.
    """
    console = Console()
    with ExitStack() as connected:
        with usage_errors():
            read = connected.enter_context(reading_status(known_url(redis_url), instance))
        if not watch:
            look = read()
            if json:
                write_json(look)
            else:
                console.print(_colored(look), soft_wrap=True)
        elif json:
            for seen in _looks(read, every):
                write_json(seen if isinstance(seen, Status) else {"error": error_of(seen)})
        elif console.is_terminal:
            with Live(console=console, auto_refresh=False, screen=True) as live:
                for shown in _shown(read, every):
                    live.update(_fitted(shown, console), refresh=True)
        else:
            for shown in _shown(read, every):
                console.print(shown, soft_wrap=True)


def _looks(read: Callable[[], Status], every_s: float) -> Iterator[Status | BrokerUnavailable]:
    while True:
        try:
            yield read()
        except BrokerUnavailable as e:
            yield e
        time.sleep(every_s)


def _shown(read: Callable[[], Status], every_s: float) -> Iterator[RenderableType]:
    """Yield the last status and its time; while the broker does not answer, with a line about that."""
    last: RenderableType = ""
    for look in _looks(read, every_s):
        now = time.strftime("%H:%M:%S")
        if isinstance(look, BrokerUnavailable):
            yield Group(Text(f"{now} {look}", style="red"), last)
        else:
            last = Group(Text(now, style="dim"), _colored(look))
            yield last


def _fitted(shown: RenderableType, console: Console) -> RenderableType:
    """Return the lines that fit onto the terminal; the last one gives the number of the others."""
    lines = console.render_lines(shown, pad=False)
    if len(lines) <= (height := console.size.height):
        return shown
    hidden = len(lines) - height + 1
    fitting = [Segments([*line, Segment.line()]) for line in lines[: height - 1]]
    hint = f"{plural(hidden, 'more line')}: enlarge the terminal, or use `penstock status`"
    return Group(*fitting, Text(hint, style="dim", no_wrap=True, overflow="ellipsis", end=""))


def _colored(look: Status) -> Text:
    text = Text(str(look), no_wrap=True, overflow="ellipsis")
    text.highlight_regex(
        r"(?m)^(\S+ (is failing|lacks resources|waits for nodes|refused version|controller is)|warning:) .*$", "yellow"
    )
    return text
