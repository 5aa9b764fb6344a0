"""The command ``penstock`` and its error handling."""

from __future__ import annotations

import logging
import os
import signal
import sys
from importlib import import_module
from types import FrameType

import click

from .exits import FAILED, INTERRUPTED, TERMINATED, UNAVAILABLE, raise_if_interrupted

_AT_ONCE_S = 1.0

EPILOG = """
Exit codes: 0 all went well; 1 something failed, such as a row of a batch; 2 the command line, a file or a name is
wrong, and nothing was done; 3 the broker cannot be reached; 130 interrupted.
"""


_COMMANDS = {
    "start": ("lifetime", "Start an instance that outlives this command."),
    "deploy": ("deploy", "Bring about what a file declares."),
    "status": ("status", "Show how an instance is doing."),
    "call": ("call", "Call an endpoint once, and write what it answers."),
    "batch": ("batch", "Send every row of a file through an endpoint."),
    "dead": ("dead", "See to the requests that nobody could serve."),
    "shutdown": ("lifetime", "End an instance, and delete all that it has in its broker."),
}
"""The module of each, and what it does."""


class _Commands(click.Group):
    """The commands, each of which is loaded when it is asked for: some need Ray, which takes a second."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(f".{module}", __package__), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, does) for name, (_, does) in _COMMANDS.items()])


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EPILOG,
)
@click.version_option(package_name="penstock")
def penstock() -> None:
    """Serve Python functions and models from one durable queue per backend.

    \b
    A first session:
      export PENSTOCK_REDIS_URL=redis://localhost:6379
      penstock start                        # bring an instance up, in the background
      penstock deploy app.yaml              # its backends and endpoints, as the file declares them
      penstock call greet '{"name": "Ada"}' # ask one of them
      penstock batch greet rows.jsonl --output answers.jsonl
      penstock status --watch
      penstock shutdown
    """  # noqa: D301 - click reads \b as: do not wrap what follows
    raise_if_interrupted()


def run() -> None:
    """Run the command, and end the process with its exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    logging.getLogger().addHandler(_Log())
    try:
        sys.exit(penstock.main(standalone_mode=False) or 0)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has enough of it. The interpreter's last flush must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except Exception as e:
        from ...broker.errors import BrokerUnavailable, PenstockError  # whoever raised it has loaded them

        if not isinstance(e, PenstockError | OSError):
            raise
        click.echo(f"Error: {e}", err=True)
        sys.exit(UNAVAILABLE if isinstance(e, BrokerUnavailable) else FAILED)


class _Log(logging.Handler):
    """Says on standard error what the library warns of.

    Each of several connections warns that it has lost the broker: what was just said is not said again.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._last, self._last_s = "", 0.0

    def emit(self, record: logging.LogRecord) -> None:
        said, before_s = self.format(record), self._last_s
        self._last_s = record.created
        if said != self._last or record.created - before_s > _AT_ONCE_S:
            self._last = said
            # Not by click, which writes past who keeps a progress bar below it.
            sys.stderr.write(said + "\n")


def _terminate(number: int, frame: FrameType | None) -> None:
    # As an exception, so that what runs is wound up.
    sys.exit(TERMINATED)
