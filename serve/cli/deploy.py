"""``penstock deploy``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .exits import slow_imports
from .options import as_json, client_of, which_instance, wrong


@click.command()
@click.argument("file")
@which_instance
@click.option("--check", is_flag=True, help="Show what would change, and change nothing.")
@click.option("--prune", is_flag=True, help="Delete the backends and endpoints that FILE does not declare.")
@click.option(
    "--restart", multiple=True, metavar="BACKEND", help="Replace the replicas of BACKEND, also if nothing has changed."
)
@as_json
def deploy(
    file: str,
    redis_url: str | None,
    instance: str,
    check: bool,
    prune: bool,
    restart: tuple[str, ...],
    json: bool,
) -> None:
    """Deploy the backends and endpoints that FILE declares; "-" reads standard input.

    The changes are shown, and the command returns when they are live. Deploying a file twice changes nothing, unless
    the source of an import path or a local directory of a runtime_env has changed since. A file
    with mistakes is refused with all of them, by line, and nothing is changed. Backends are changed first, one after
    the other. If one cannot be changed, those before it stay changed, and the endpoints stay as they were.

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
    with client_of(redis_url, instance) as client:
        with slow_imports():
            from .deployment import deploy_text

        sys.exit(deploy_text(text, "standard input" if file == "-" else file, client, check, prune, restart, json))
