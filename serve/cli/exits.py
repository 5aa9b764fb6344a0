"""Exit codes, and what an interruption does."""

from __future__ import annotations

import os
import signal
from types import FrameType

FAILED, USAGE, UNAVAILABLE, INTERRUPTED, TERMINATED = 1, 2, 3, 130, 143


def end_if_interrupted() -> None:
    """Have an interruption (SIGINT) end the process at once, as long as there is nothing to wind up.

    Raised while modules are being loaded, an exception would show where, or be swallowed by one of them.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else whoever started us has it ignored
        signal.signal(signal.SIGINT, _end)


def raise_if_interrupted() -> None:
    """Have an interruption raise KeyboardInterrupt, so that what runs is wound up."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
