"""``penstock run``."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from ..cli.exits import slow_imports
from ..cli.options import usage_errors, which_instance, wrong


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@which_instance
@click.option("--http-host", metavar="ADDRESS", help="The address that HTTP is served on.  [default: 127.0.0.1]")
@click.option("--http-port", type=click.IntRange(0, 65535), help="The port; 0 picks a free one.  [default: 8000]")
@click.option("--access-log", is_flag=True, help="Let the proxies log a line for each request.")
@click.option("--reload", is_flag=True, help="Run PROGRAM again when a file in its folder or below changes.")
@click.argument("program")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(
    redis_url: str | None,
    instance: str,
    http_host: str | None,
    http_port: int | None,
    access_log: bool,
    reload: bool,
    program: str,
    arguments: tuple[str, ...],
) -> None:
    """Serve PROGRAM until Ctrl-C: a script, an object of a module, or a manifest.

    A script (app.py) calls serve.start() and makes backends; it need not wait. Of a module (app:greet) a function or a
    class is served at the route /, an ASGI application at every path, and a dict of functions at its routes. A manifest
    (app.yaml) is the file of `penstock deploy`.

    With --reload the previous version serves until the new one is ready, and goes on serving if the new one fails.

    \b
    Examples:
      penstock run app.py
      penstock run --reload app:greet
      penstock run --http-port 9000 app.yaml
    """  # noqa: D301
    http: dict[str, Any] = {"host": http_host, "port": http_port, "access_log": access_log or None}
    http = {name: value for name, value in http.items() if value is not None}
    if program.endswith(".py"):
        if http:
            wrong(f"{program} chooses its own HTTP options: serve.start(http_options={http!r})")
    elif arguments:
        wrong(f"only a script takes arguments: {' '.join(arguments)}")
    if program.endswith((".py", ".yaml", ".yml")) and not os.path.isfile(program):
        wrong(f"there is no file {program!r}")
    with slow_imports():  # Ray takes a second: not for --help.
        from .program import check_program
        from .server import run_program

    with usage_errors():
        if not program.endswith((".yaml", ".yml")):
            check_program(program)
        sys.exit(run_program(program, arguments, redis_url, instance, http, reload=reload))
