"""Coroutines that run beside a test, in a loop and a thread of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from typing import Any


@contextmanager
def running_beside(
    main: Callable[[], Coroutine[Any, Any, None]], name: str, end: Callable[[], None]
) -> Generator[None]:
    """Run ``main()`` while the block runs, then call ``end()`` and wait until it returns.

    Args:
        main: the coroutine function.
        name: of the thread.
        end: lets it return; called in the thread of the block.

    Raises:
        BaseException: the exception of ``main()``, unless the block raised one.
    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as e:
            failures.append(e)

    thread = threading.Thread(target=run, name=name)
    thread.start()
    try:
        yield
    finally:
        end()
        thread.join()
    if failures:
        raise failures[0]
