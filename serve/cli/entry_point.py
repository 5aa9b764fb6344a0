"""The command ``penstock`` and its error handling."""

from __future__ import annotations

import logging
import os
import signal
import sys
from importlib import import_module
from types import FrameType

import click

from .exits import FAILED, INTERRUPTED, TERMINATED, UNAVAILABLE, end_if_extra_is_missing, raise_if_interrupted
from .groups import SuggestingGroup

_REPEAT_S = 1.0
"""A log line that repeats the previous one within this time is not shown."""

EPILOG = """
Exit codes: 0 success; 1 something failed, such as a row of a batch; 2 the command line, a file or a name is wrong, and
nothing was done; 3 the broker cannot be reached; 130 interrupted.
"""


_COMMANDS = {
    "start": ("lifetime", "Start an instance that outlives this command."),
    "run": (".running.command", "Serve a script, a module or a manifest until Ctrl-C."),
    "deploy": ("deploy", "Deploy the backends and endpoints that a file declares."),
    "status": ("status", "Show the backends, endpoints and proxies of an instance."),
    "call": ("call", "Call an endpoint once, and write the result."),
    "result": ("requests", "Write the result of a submitted call."),
    "cancel": ("requests", "Cancel a submitted call."),
    "requests": ("requests", "List the submitted calls of an endpoint."),
    "batch": ("batch", "Send every row of a file through an endpoint."),
    "dead": ("dead", "List, replay and drop dead letters."),
    "node": (".node.command", "Run a node of a Ray cluster that drains before it ends."),
    "shutdown": ("lifetime", "End an instance, and delete all its data in the broker."),
}
"""The module of each command, from here, and its summary."""


class _Commands(SuggestingGroup):
    """The commands. The module of a command is imported when it is used."""

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
      penstock start                        # start an instance in the background
      penstock deploy app.yaml              # deploy the backends and endpoints of a file
      penstock call greet '{"name": "Ada"}' # call an endpoint
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
        # The reader of the output has closed it. Flushing it at the end of the process must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except ModuleNotFoundError as e:
        end_if_extra_is_missing(e)
        raise
    except Exception as e:
        from ...broker.errors import BrokerUnavailable, PenstockError  # Imported already, if one was raised.

        if not isinstance(e, PenstockError | OSError):
            raise
        click.echo(f"Error: {e}", err=True)
        sys.exit(UNAVAILABLE if isinstance(e, BrokerUnavailable) else FAILED)


class _Log(logging.Handler):
    """Writes the library's warnings to standard error, without immediate repetitions.

    Several connections may warn at the same time that they have lost the broker.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._last_line, self._last_s = "", 0.0

    def emit(self, record: logging.LogRecord) -> None:
        line, before_s = self.format(record), self._last_s
        self._last_s = record.created
        if line != self._last_line or record.created - before_s > _REPEAT_S:
            self._last_line = line
            # sys.stderr, which a progress bar may have replaced. click would write into the bar.
            sys.stderr.write(line + "\n")


def _terminate(number: int, frame: FrameType | None) -> None:
    # Raises SystemExit, so that the running command can clean up.
    sys.exit(TERMINATED)
