"""The frames of a traceback below a user's line."""

from __future__ import annotations

import traceback


def frames_below(file: str, error: BaseException) -> int:
    """Return how many frames of an exception come after the last one in ``file``."""
    names = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return names[::-1].index(file)
