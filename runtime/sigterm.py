"""SIGTERM handling: drains the Ray actor of this process, then ends the process."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from typing import Any

log = logging.getLogger(__name__)


class DrainsOnSigterm:
    """Base class of asyncio Ray actors that drain on SIGTERM. Their constructor calls `on_sigterm`.

    Ray's own handler ends the process at once. Only the main thread may replace it, and the only code of an asyncio
    actor that Ray runs in the main thread is ``__new__``.
    """

    _on_sigterm: Callable[[], object] | None = None

    def __new__(cls, *_: Any, **__: Any) -> Any:
        self = super().__new__(cls)
        if threading.current_thread() is threading.main_thread():
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
