"""SIGTERM handling: of Ray actors, which drain before they end, and of processes that start Ray."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)


@contextmanager
def keeping_sigterm() -> Generator[None]:
    """Keep the handler of SIGTERM over a block that starts Ray.

    Ray's own handler kills the processes of Ray before the rest of the program can end what runs in them. If there was
    no handler, SIGTERM now exits with status 143, so that ``with`` blocks and functions of ``atexit`` run.
    """
    if threading.current_thread() is not threading.main_thread():  # Only that one may set handlers.
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, before)
        raise
    signal.signal(signal.SIGTERM, _exit if before is signal.SIG_DFL else before)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


class DrainsOnSigterm:
    """Base class of asyncio Ray actors that drain on SIGTERM. Their constructor calls `on_sigterm`.

    Ray's own handler ends the process at once. Only the main thread may replace it, and the only code of an asyncio
    actor that Ray runs in the main thread is ``__new__``.
    """

    _on_sigterm: Callable[[], object] | None = None

    def __new__(cls, *_: Any, **__: Any) -> Any:
        self = super().__new__(cls)
        # `ray.remote` makes an instance of a class that it derives, in every process that imports the actor.
        is_actor = all(base.__name__ != "ActorClass" for base in cls.__mro__)
        if is_actor and threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGTERM)

            def handle(number: int, frame: Any) -> None:
                if self._on_sigterm is not None:
                    self._on_sigterm()
                elif callable(before):
                    before(number, frame)

            signal.signal(signal.SIGTERM, handle)
        return self

    def on_sigterm(self, drain: Callable[[], Awaitable[object]]) -> None:
        """On SIGTERM await ``drain()`` in the running loop, then end the process. The controller replaces the actor."""
        loop, ending = asyncio.get_running_loop(), list[asyncio.Task[None]]()

        async def end() -> None:
            log.info("draining after SIGTERM")
            try:
                await drain()
            except Exception:
                log.exception("cannot drain after SIGTERM")
            # Not through Ray, whose head may be gone. Everything is closed, and Ray detects the exit.
            os._exit(0)

        def begin() -> None:
            if not ending:
                ending.append(loop.create_task(end(), name="after SIGTERM"))

        self._on_sigterm = lambda: loop.call_soon_threadsafe(begin)
