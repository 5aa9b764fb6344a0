"""``penstock dead``: list, replay and drop dead letters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from textwrap import wrap
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ...broker.queue.dead_letters import DeadLetter
from ...handles.codec import decode
from ...handles.dead_letters import DeadLetters
from ...handles.errors import MalformedBody, PenstockError
from ..status import table
from .exits import FAILED
from .options import as_json, door_to, telling_what_is_wrong, which_instance, write_json, wrong

_SHOWN = 2_000
"""Characters of a body."""


@click.group()
def dead() -> None:
    """See to the requests that nobody could serve.

    A request whose every replica died, or that none could read, is a dead letter of its backend. It stays until it is
    replayed or dropped.
    """


@dead.command("list")
@click.argument("backend")
@which_instance
@as_json
def list_(backend: str, redis_url: str | None, instance: str, json: bool) -> None:
    """List the dead letters of BACKEND, oldest first."""
    with door_to(redis_url, instance) as door:
        found = [_summary(letter) for letter in _letters(door, backend)]
    if json:
        for said in found:
            write_json(said)
    elif found:
        click.echo(_listed(found, Console()))
    else:
        click.echo(f"backend {backend!r} has no dead letters")


@dead.command()
@click.argument("backend")
@click.argument("id")
@which_instance
@as_json
def show(backend: str, id: str, redis_url: str | None, instance: str, json: bool) -> None:  # noqa: A002
    """Show one dead letter of BACKEND: its request, and how it died."""
    with door_to(redis_url, instance) as door, telling_what_is_wrong():
        letters = _letters(door, backend)
        letter = letters.get(id)
        said, request = _summary(letter), _request(letters, letter)
    if json:
        write_json({**said, "deliveries": list(letter.deliveries), "request": request})
        return
    rows = Table(box=None, show_header=False, pad_edge=False)
    for name in ("id", "died", "error"):
        rows.add_row(name, said[name])
    for delivery in letter.deliveries:
        rows.add_row("died with", f"{delivery.get('replica')} at {_when(int(delivery.get('died_ms') or 0))}")
    for name, value in (request or {}).items():
        rows.add_row(name, str(value))
    Console().print(rows)


@dead.command()
@click.argument("backend")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "all_", is_flag=True, help="All there are.")
@which_instance
def replay(backend: str, ids: tuple[str, ...], all_: bool, redis_url: str | None, instance: str) -> None:
    """Queue dead letters of BACKEND again, behind its interactive requests."""
    _each(backend, ids, all_, redis_url, instance, lambda letters, id_: letters.replay(id_), "replayed")


@dead.command()
@click.argument("backend")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "all_", is_flag=True, help="All there are.")
@which_instance
def drop(backend: str, ids: tuple[str, ...], all_: bool, redis_url: str | None, instance: str) -> None:
    """Delete dead letters of BACKEND."""
    _each(backend, ids, all_, redis_url, instance, lambda letters, id_: letters.drop(id_), "dropped")


def _each(
    backend: str,
    ids: tuple[str, ...],
    all_: bool,
    redis_url: str | None,
    instance: str,
    act: Callable[[DeadLetters, str], None],
    done: str,
) -> None:
    if bool(ids) == all_:
        wrong("which ones? Give their ids (`penstock dead list` has them), or --all")
    failed = succeeded = 0
    with door_to(redis_url, instance) as door:
        letters = _letters(door, backend)
        for id_ in [letter.id for letter in letters] if all_ else ids:
            try:
                act(letters, id_)
                succeeded += 1
            except PenstockError as e:
                failed += 1
                click.echo(f"Error: {e}", err=True)
    click.echo(f"{done} {succeeded}" + (f", {failed} failed" if failed else ""))
    if failed:
        sys.exit(FAILED)


def _letters(door: Any, backend: str) -> DeadLetters:
    with telling_what_is_wrong():
        letters: DeadLetters = door.dead_letters(backend)
        known = {
            tag for endpoint in door.list_endpoints().values() for tag in (*endpoint["traffic"], *endpoint["shadows"])
        }
        if backend not in known and not len(letters):
            wrong(f"no endpoint sends to a backend {backend!r}, and it has no dead letters")
        return letters


def _listed(found: Sequence[Mapping[str, Any]], console: Console) -> str:
    """Return each letter as a line; on a terminal too narrow for that, with its error on lines of their own."""
    head = ("ID", "DIED", "ENDPOINT", "DELIVERIES")
    lines = table(
        head, [(said["id"], said["died"], said["endpoint"] or "-", str(said["deliveries"])) for said in found]
    ).splitlines()
    errors = ["ERROR", *(" ".join(said["error"].split()) for said in found)]
    width = max(map(len, lines))
    if console.is_terminal and max(width + 2 + len(error) for error in errors) > console.width:
        indented = (wrap(error, console.width, initial_indent="    ", subsequent_indent="    ") for error in errors)
        return "\n".join("\n".join([line, *error]) for line, error in zip(lines, indented, strict=True))
    return "\n".join(f"{line:{width}}  {error}".rstrip() for line, error in zip(lines, errors, strict=True))


def _summary(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "died": _when(letter.died_ms),
        "endpoint": None if letter.entry is None else letter.entry.header.endpoint,
        "deliveries": len(letter.deliveries),
        "error": letter.error,
    }


def _request(letters: DeadLetters, letter: DeadLetter) -> dict[str, Any] | None:
    if letter.entry is None:
        return None
    header = letter.entry.header
    body = letters.body(letter)
    data: Any = "(expired)"
    if body is not None:
        try:
            # Never unpickled: that would run the code of whoever sent it.
            data = decode(header.codec, body) if header.codec in ("json", "text", "none") else repr(body[:_SHOWN])
        except MalformedBody:
            data = repr(body[:_SHOWN])
    return {
        "endpoint": header.endpoint,
        "method": header.method,
        "path": header.path,
        "query": header.query,
        "call": header.call,
        "data": data,
    }


def _when(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")
