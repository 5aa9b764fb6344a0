"""``penstock status``."""

from __future__ import annotations

import time
from collections.abc import Iterator

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..client import Client
from ..status import Status
from .common import as_json, client_of, which_instance, write_json


@click.command(short_help="Show how an instance is doing.")
@which_instance
@click.option("--watch", is_flag=True, help="Go on showing it, until interrupted.")
@click.option("--every", default=1.0, show_default=True, type=click.FloatRange(0.1), help="Seconds between looks.")
@as_json
def status(redis_url: str | None, instance: str, watch: bool, every: float, json: bool) -> None:
    """Show how an instance is doing: its backends, endpoints and proxies.

    With --watch a terminal shows a live table; a pipe gets one after another, with --json one line for each look.
    """
    console = Console()
    with client_of(redis_url, instance) as client:
        if watch and console.is_terminal and not json:
            with Live(console=console, auto_refresh=False, screen=True) as live:
                for look in _looks(client, every):
                    live.update(_colored(look), refresh=True)
        for look in _looks(client, every) if watch else [client.status()]:
            if json:
                write_json(look)
            else:
                console.print(_colored(look), soft_wrap=True)


def _looks(client: Client, every_s: float) -> Iterator[Status]:
    while True:
        yield client.status()
        time.sleep(every_s)


def _colored(look: Status) -> Text:
    text = Text(str(look), no_wrap=True, overflow="ellipsis")
    text.highlight_regex(r"(?m)^\S+ (is failing|is lacking|refused version|controller is) .*$", "yellow")
    return text
