"""``penstock status``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..client import Client
from ..status import troubles
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
        if not watch:
            look = _look(client)
            if json:
                write_json(look)
            else:
                console.print(_table(look))
        elif json:
            for look in _looks(client, every):
                write_json(look)
        elif console.is_terminal:
            with Live(console=console, auto_refresh=False, screen=True) as live:
                for look in _looks(client, every):
                    live.update(_table(look), refresh=True)
        else:
            for look in _looks(client, every):
                console.print(_table(look))


def _looks(client: Client, every_s: float) -> Iterator[dict[str, Any]]:
    while True:
        yield _look(client)
        time.sleep(every_s)


def _look(client: Client) -> dict[str, Any]:
    return {**client.status(), "endpoints": client.list_endpoints()}


def _table(look: dict[str, Any]) -> RenderableType:
    backends = Table("BACKEND", "VERSION", "REPLICAS", "QUEUED", "RUNNING", "DEAD", "STATE", box=None, pad_edge=False)
    for tag, backend in sorted(look["backends"].items()):
        ready, wanted = backend["ready"], backend["wanted"]
        dead = backend["dead_letters"]
        backends.add_row(
            tag,
            backend["version"],
            Text(f"{ready}/{wanted}", style="" if ready >= wanted else "yellow"),
            str(backend["queued"]),
            str(backend["in_progress"]),
            Text(str(dead), style="red" if dead else ""),
            _state(backend),
        )
    endpoints = Table("ENDPOINT", "ROUTE", "METHODS", "TRAFFIC", box=None, pad_edge=False)
    for name, endpoint in sorted(look["endpoints"].items()):
        traffic = ", ".join(f"{tag} {weight:.4g}" for tag, weight in endpoint["traffic"].items())
        shadows = "".join(f", {tag} shadowed {share:.4g}" for tag, share in endpoint["shadows"].items())
        endpoints.add_row(name, endpoint["route"] or "-", " ".join(endpoint["methods"]), traffic + shadows)
    proxies = Table("PROXY", "URL", "NODE", box=None, pad_edge=False)
    for name, proxy in sorted(look["proxies"].items()):
        proxies.add_row(name, proxy.get("url", "-"), str(proxy.get("node", ""))[:8])
    parts: list[RenderableType] = []
    for table in (backends, endpoints, proxies):
        if table.row_count:
            parts += [table, ""]
    for tag, backend in sorted(look["backends"].items()):
        for trouble in troubles(backend):
            parts += [Text(f"{tag} {trouble}".replace("\n", "\n    ")), ""]
    if look["controller"] != "alive":
        parts += [Text(f"the controller is {look['controller']}: no change comes about", style="yellow"), ""]
    return Group(*parts[:-1]) if parts else Text("nothing is deployed")


def _state(backend: dict[str, Any]) -> Text:
    if backend["failing"]:
        return Text("failing", style="red")
    if backend["lacking"]:
        return Text("lacking", style="yellow")
    if backend["ready"] == backend["wanted"] and backend["came_about"]:
        return Text("ready", style="green")
    return Text("changing", style="yellow")
