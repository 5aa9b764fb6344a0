"""Waiting for what must become true: the tests' stand-in for sleeping."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable

PATIENCE_S = 60.0
"""What has not come about by then never does, also on a machine that is slow and busy."""

_FIRST_PAUSE_S = 0.001
_LONGEST_PAUSE_S = 0.05


def wait_until(condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    """Return once ``condition()`` is true. It is asked often at first, then every 50 ms.

    Raises:
        AssertionError: it was still not true after ``timeout_s`` seconds.
    """
    started_at, pause_s = time.monotonic(), _FIRST_PAUSE_S
    while not (answer := condition()):
        if time.monotonic() - started_at > timeout_s:
            raise AssertionError(_complaint(condition, answer, timeout_s))
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


async def wait_until_async(condition: Callable[[], object | Awaitable[object]], timeout_s: float = PATIENCE_S) -> None:
    """Return once ``condition()``, or what it returns when awaited, is true. The loop runs on meanwhile.

    Raises:
        AssertionError: it was still not true after ``timeout_s`` seconds. A single answer is never cut short.
    """
    started_at, pause_s = time.monotonic(), _FIRST_PAUSE_S
    while True:
        answer = condition()
        if inspect.isawaitable(answer):
            answer = await answer
        if answer:
            return
        if time.monotonic() - started_at > timeout_s:
            raise AssertionError(_complaint(condition, answer, timeout_s))
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _complaint(condition: Callable[[], object], answer: object, timeout_s: float) -> str:
    try:
        text = inspect.getsource(condition).strip()
    except (OSError, TypeError):  # it has no source, or it is a `functools.partial`
        text = repr(condition)
    return f"still {answer!r} after {timeout_s:g} s: {text}"
