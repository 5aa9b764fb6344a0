"""``penstock dead``: list, replay and drop dead letters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from textwrap import wrap
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ...broker.queue.dead_letters import DeadLetter, show_time
from ...handles.codec import decode
from ...handles.dead_letters import DeadLetters
from ...handles.errors import MalformedBody, PenstockError
from ..status.status import table
from .exits import FAILED
from .groups import SuggestingGroup
from .options import as_json, thin_connection, usage_errors, which_instance, write_json, wrong

_SHOWN = 2_000
"""Bytes of a body that are shown if it is not JSON or text."""


@click.group(cls=SuggestingGroup)
def dead() -> None:
    """List, replay and drop dead letters.

    A request is a dead letter of its backend if every replica that ran it died, or if it cannot be read. It stays
    until it is replayed or dropped.
    """


@dead.command("list")
@click.argument("backend")
@which_instance
@as_json
def list_(backend: str, redis_url: str | None, instance: str, json: bool) -> None:
    """List the dead letters of BACKEND, oldest first."""
    with thin_connection(redis_url, instance) as connection:
        found = [_summary(letter) for letter in _letters(connection, backend)]
    if json:
        for summary in found:
            write_json(summary)
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
    """Show one dead letter of BACKEND: its request and its history."""
    with thin_connection(redis_url, instance) as connection, usage_errors():
        letters = _letters(connection, backend)
        letter = letters.get(id)
        summary, request = _summary(letter), _request(letters, letter)
    if json:
        write_json({**summary, "deliveries": list(letter.deliveries), "request": request})
        return
    rows = Table(box=None, show_header=False, pad_edge=False)
    for name in ("id", "died", "error"):
        rows.add_row(name, summary[name])
    for death in letter.deaths():
        rows.add_row("died with", death)
    for name, value in (request or {}).items():
        rows.add_row(name, str(value))
    Console().print(rows)


@dead.command()
@click.argument("backend")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "all_", is_flag=True, help="All dead letters of BACKEND.")
@which_instance
def replay(backend: str, ids: tuple[str, ...], all_: bool, redis_url: str | None, instance: str) -> None:
    """Queue dead letters of BACKEND again, behind its interactive requests."""
    _each(backend, ids, all_, redis_url, instance, lambda letters, id_: letters.replay(id_), "replayed")


@dead.command()
@click.argument("backend")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "all_", is_flag=True, help="All dead letters of BACKEND.")
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
        wrong("give the ids of dead letters (`penstock dead list` shows them), or --all")
    failed = succeeded = 0
    with thin_connection(redis_url, instance) as connection:
        letters = _letters(connection, backend)
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


def _letters(connection: Any, backend: str) -> DeadLetters:
    with usage_errors():
        letters: DeadLetters = connection.dead_letters(backend)
        known = {
            tag
            for endpoint in connection.list_endpoints().values()
            for tag in (*endpoint["traffic"], *endpoint["shadows"])
        }
        if backend not in known and not len(letters):
            wrong(f"no endpoint uses a backend {backend!r}, and there are no dead letters of it")
        return letters


def _listed(found: Sequence[Mapping[str, Any]], console: Console) -> str:
    """Return one line per letter; on a terminal that is too narrow, the error is on lines of its own."""
    head = ("ID", "DIED", "ENDPOINT", "DELIVERIES")
    lines = table(
        head,
        [(summary["id"], summary["died"], summary["endpoint"] or "-", str(summary["deliveries"])) for summary in found],
    ).splitlines()
    errors = ["ERROR", *(" ".join(summary["error"].split()) for summary in found)]
    width = max(map(len, lines))
    if console.is_terminal and max(width + 2 + len(error) for error in errors) > console.width:
        indented = (wrap(error, console.width, initial_indent="    ", subsequent_indent="    ") for error in errors)
        return "\n".join("\n".join([line, *error]) for line, error in zip(lines, indented, strict=True))
    return "\n".join(f"{line:{width}}  {error}".rstrip() for line, error in zip(lines, errors, strict=True))


def _summary(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "died": show_time(letter.died_ms),
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
            # Never unpickled, because that would run code of the sender.
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
