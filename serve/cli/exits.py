"""Exit codes, the handling of an interruption (SIGINT), and the message for a package that is not installed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from ...runtime.extras import explain

FAILED, USAGE, UNAVAILABLE, INTERRUPTED, TERMINATED = 1, 2, 3, 130, 143


def end_if_extra_is_missing(error: ModuleNotFoundError) -> None:
    """End the process with a message if the missing package is one of an extra, such as ``penstock[cli]``."""
    if (message := explain(error, "this command")) is not None:
        sys.stderr.write(f"Error: {message}\n")
        sys.exit(USAGE)


def end_if_interrupted() -> None:
    """Make an interruption end the process at once. For the time in which modules are imported.

    An exception raised during an import would show a traceback, or a module would swallow it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Otherwise the parent process has it ignored.
        signal.signal(signal.SIGINT, _end)


def raise_if_interrupted() -> None:
    """Make an interruption raise KeyboardInterrupt, so that the running command can clean up."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def slow_imports() -> Generator[None]:
    """For the imports of a command that take long, such as of Ray: an interruption during them ends the process."""
    end_if_interrupted()
    yield
    raise_if_interrupted()


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
