"""Deployment of a manifest: reads it, shows the changes, makes them and reports the outcome."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from typing import Any

import click
from rich.console import Console

from ...broker.errors import PenstockError
from ...broker.registry.records import Change, Snapshot
from ...handles import background_loop
from ..client import Client
from ..deploy.diff import ManifestChange, diff
from ..deploy.manifest import Manifest, Mistake, read
from ..deploy.sources import LocalCode, local_code
from ..instance import Instance
from ..status.status import plural
from .exits import FAILED, USAGE
from .options import error_of, usage_errors, write_json, wrong

_SIGNS = {"create": "+", "update": "~", "configure": "~", "delete": "-"}


def deploy_text(
    text: str, name: str, client: Client, check: bool, prune: bool, restart: Collection[str], json: bool
) -> int:
    """Deploy the manifest in ``text``; return the exit code.

    Args:
        text: the content of the file.
        name: the name of the file, for error messages.
        client: of the instance.
        check: only show the changes.
        prune: also delete what the manifest does not declare.
        restart: the tags of backends whose replicas are replaced in any case.
        json: write JSON instead of text.
    """
    core = background_loop.run(Instance(client.redis_url, client.instance).open())
    try:
        deployed, codes = background_loop.run(_deployed(core))
        manifest, mistakes = read(text, deployed)
        if mistakes:
            _show_mistakes(mistakes, name, json)
            return USAGE
        for tag in restart:
            if tag not in manifest.backends:
                wrong(f"--restart {tag}: {name} declares {', '.join(manifest.backends) or 'no backends'}")
        local = _local_codes(manifest, deployed)
        compared = {tag: code.compared(deployed.backends[tag]) for tag, code in local.items()}
        changes = diff(manifest, deployed, codes, local=local, restart=restart, prune=prune)
        progress = _Progress(json, compared)
        progress.show(changes)
        error = None if check or not changes else _apply(manifest, changes, client, core, progress)
    finally:
        background_loop.run(core.close())
    progress.end(changes, check, error)
    return 0 if error is None else FAILED


def _show_mistakes(mistakes: list[Mistake], name: str, json: bool) -> None:
    if json:
        write_json({"mistakes": [{"line": mistake.line, "message": mistake.message} for mistake in mistakes]})
        return
    for mistake in mistakes:
        click.echo(f"{name}, {mistake}", err=True)
    click.echo("nothing was changed", err=True)


async def _deployed(core: Instance) -> tuple[Snapshot, dict[str, bytes]]:
    """Return the deployed records, and the code of each backend."""
    snapshot = await core.snapshot()
    codes: dict[str, bytes] = {}
    for tag, record in snapshot.backends.items():
        try:
            codes[tag] = await core.registry.get_code(record.code)
        except PenstockError:
            continue  # The code is missing in the registry and will be stored again.
    return snapshot, codes


def _local_codes(manifest: Manifest, deployed: Snapshot) -> dict[str, LocalCode]:
    """Return the code that this machine has of the backends that are declared and deployed."""
    with usage_errors():
        return {
            tag: local_code(backend.target, backend.runtime_env, deployed.backends[tag])
            for tag, backend in manifest.backends.items()
            if tag in deployed.backends
        }


class _Progress:
    """Shows the changes and their outcome, as text or as JSON."""

    def __init__(self, json: bool, compared: dict[str, str]) -> None:
        """``compared`` describes for each deployed backend what was compared with the file."""
        self._json, self._compared = json, compared
        self._console = Console(stderr=True)
        self.done: list[ManifestChange] = []

    def show(self, changes: list[ManifestChange]) -> None:
        if not self._json:
            for tag, what in self._compared.items():
                click.echo(f"compared backend {tag}: {what}", err=True)
            for change in changes:
                click.echo(f"{_SIGNS[change.verb]} {change}")

    def end(self, changes: list[ManifestChange], check: bool, error: PenstockError | TypeError | None) -> None:
        if self._json:
            report: dict[str, Any] = {
                "changes": [_as_json(change) for change in changes],
                "compared": self._compared,
            }
            if not check:
                report["applied"] = len(self.done)
                report["error"] = None if error is None else error_of(error)
            write_json(report)
        elif error is not None:
            click.echo(f"Error: {error}", err=True)
            click.echo(f"{len(self.done)} of {plural(len(changes), 'change')} made", err=True)
        elif not changes:
            click.echo("nothing to change")
        elif check:
            click.echo("nothing was changed (--check)")
        else:
            click.echo(f"{plural(len(changes), 'change')} made")

    def during(self, activity: str) -> Any:
        """Return a context that shows ``activity`` on a terminal."""
        return self._console.status(activity) if self._console.is_terminal and not self._json else ExitStack()


def _apply(
    manifest: Manifest, changes: list[ManifestChange], client: Client, core: Instance, progress: _Progress
) -> PenstockError | TypeError | None:
    """Make the changes; return the error that stopped them, or None."""
    backends = [change for change in changes if change.kind == "backend" and change.verb != "delete"]
    endpoints = [change for change in changes if change.kind == "endpoint"]
    try:
        for change in backends:
            with progress.during(str(change)):
                _change_backend(manifest, change, client)
            progress.done.append(change)
        if endpoints:
            changed = {change.name: manifest.endpoints.get(change.name) for change in endpoints}
            with progress.during("waiting for every proxy"):
                background_loop.run(core.change(lambda _: Change(endpoints=changed)))
            progress.done += endpoints
        for change in changes:
            if change.kind == "backend" and change.verb == "delete":
                with progress.during(str(change)):
                    client.delete_backend(change.name)
                progress.done.append(change)
    except (PenstockError, TypeError) as e:
        return e
    return None


def _change_backend(manifest: Manifest, change: ManifestChange, client: Client) -> None:
    backend = manifest.backends[change.name]
    if change.verb == "configure":
        client.update_backend_config(change.name, backend.config.model_dump())
        return
    method = client.create_backend if change.verb == "create" else client.update_backend
    method(
        change.name,
        backend.deployable,
        *backend.args,
        config=backend.config.model_dump(),
        ray_actor_options=backend.actor_options,
        runtime_env=backend.runtime_env or {},
        **backend.kwargs,
    )


def _as_json(change: ManifestChange) -> dict[str, Any]:
    return {"verb": change.verb, "kind": change.kind, "name": change.name, "details": list(change.details)}
