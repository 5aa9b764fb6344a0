"""``penstock deploy``."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ...broker.errors import PenstockError
from ...broker.registry.records import Change, Snapshot
from ...handles import background_loop
from ..client import Client
from ..deploy.manifest import Manifest, ManifestChange, plan, read
from ..instance import Instance
from .connecting import client_of
from .exits import FAILED, USAGE
from .options import as_json, error_of, which_instance, write_json, wrong

_SIGNS = {"create": "+", "update": "~", "configure": "~", "delete": "-"}


@click.command()
@click.argument("file")
@which_instance
@click.option("--check", is_flag=True, help="Show what would change, and change nothing.")
@click.option("--prune", is_flag=True, help="Delete the backends and endpoints that FILE does not declare.")
@as_json
def deploy(file: str, redis_url: str | None, instance: str, check: bool, prune: bool, json: bool) -> None:
    """Bring about what FILE declares: backends, endpoints and their traffic.

    It shows what will change, and returns when it serves. Deployed twice, it changes nothing. A file with mistakes is
    refused with all of them, by line, and nothing is changed. Backends come first, one after the other: what one of
    them makes impossible leaves those before it changed, and the endpoints as they were.

    \b
      backends:
        digits:
          import: models.digits:Digits     # where the replicas find the code
          config: {num_replicas: 2, max_batch_size: 32}
      endpoints:
        digit:
          route: /digit
          methods: [POST]
          backend: digits                  # or traffic: {digits: 0.9, digits-next: 0.1}
    """  # noqa: D301
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except OSError as e:
        wrong(e)
    except UnicodeError as e:
        wrong(f"{file} is not text: {e}")
    with ExitStack() as stack:
        client = stack.enter_context(client_of(redis_url, instance))
        core = background_loop.run(Instance(client.redis_url, instance).open())
        stack.callback(lambda: background_loop.run(core.close()))
        seen, codes = background_loop.run(_seen(core))
        application, mistakes = read(text, seen)
        if mistakes:
            if json:
                write_json({"mistakes": [{"line": m.line, "message": m.message} for m in mistakes]})
            else:
                name = "standard input" if file == "-" else file
                for mistake in mistakes:
                    click.echo(f"{name}, {mistake}", err=True)
                click.echo("nothing was changed", err=True)
            sys.exit(USAGE)
        steps = plan(application, seen, codes, prune=prune)
        told = _Told(json)
        told.plan(steps)
        failed = None if check or not steps else _apply(application, steps, client, core, told)
    told.end(steps, check, failed)
    if failed is not None:
        sys.exit(FAILED)


async def _seen(core: Instance) -> tuple[Snapshot, dict[str, bytes]]:
    seen = await core.snapshot()
    codes: dict[str, bytes] = {}
    for tag, record in seen.backends.items():
        try:
            codes[tag] = await core.registry.get_code(record.code)
        except PenstockError:
            continue  # then it is written anew
    return seen, codes


class _Told:
    """What the user hears of it."""

    def __init__(self, json: bool) -> None:
        self._json = json
        self._console = Console(stderr=True)
        self.done: list[ManifestChange] = []

    def plan(self, steps: list[ManifestChange]) -> None:
        if not self._json:
            for step in steps:
                click.echo(f"{_SIGNS[step.verb]} {step}")

    def end(self, steps: list[ManifestChange], check: bool, failed: PenstockError | TypeError | None) -> None:
        if self._json:
            said: dict[str, Any] = {"changes": [_as_json(step) for step in steps]}
            if not check:
                said["applied"] = len(self.done)
                said["error"] = None if failed is None else error_of(failed)
            write_json(said)
        elif failed is not None:
            click.echo(f"Error: {failed}", err=True)
            click.echo(f"{len(self.done)} of {len(steps)} changes were made", err=True)
        elif not steps:
            click.echo("nothing to change")
        elif check:
            click.echo("nothing was changed, as asked")
        else:
            click.echo(f"{len(steps)} changes serve")

    def doing(self, what: str) -> Any:
        return self._console.status(what) if self._console.is_terminal and not self._json else ExitStack()


def _apply(
    application: Manifest, steps: list[ManifestChange], client: Client, core: Instance, told: _Told
) -> PenstockError | TypeError | None:
    """Make the changes; return what stopped them."""
    backends = [step for step in steps if step.kind == "backend" and step.verb != "delete"]
    endpoints = [step for step in steps if step.kind == "endpoint"]
    try:
        for step in backends:
            with told.doing(f"{step}"):
                _change_backend(application, step, client)
            told.done.append(step)
        if endpoints:
            changed = {step.name: application.endpoints.get(step.name) for step in endpoints}
            with told.doing("waiting for every proxy"):
                background_loop.run(core.change(lambda seen: Change(endpoints=changed)))
            told.done += endpoints
        for step in steps:
            if step.kind == "backend" and step.verb == "delete":
                with told.doing(f"{step}"):
                    client.delete_backend(step.name)
                told.done.append(step)
    except (PenstockError, TypeError) as e:
        return e
    return None


def _change_backend(application: Manifest, step: ManifestChange, client: Client) -> None:
    backend = application.backends[step.name]
    if step.verb == "configure":
        client.update_backend_config(step.name, backend.config.model_dump())
        return
    change = client.create_backend if step.verb == "create" else client.update_backend
    change(
        step.name,
        backend.target,
        *backend.args,
        config=backend.config.model_dump(),
        ray_actor_options=backend.actor_options,
        runtime_env=backend.runtime_env or {},
        **backend.kwargs,
    )


def _as_json(step: ManifestChange) -> dict[str, Any]:
    return {"verb": step.verb, "kind": step.kind, "name": step.name, "details": list(step.details)}
