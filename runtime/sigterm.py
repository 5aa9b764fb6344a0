"""SIGTERM: drains the actor of this process and ends it."""

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
    """An asyncio actor of Ray's whose constructor says, by `on_sigterm`, what there is to finish.

    Ray's own handler ends the process at once. Only the main thread may set another one, and of an asyncio actor Ray
    runs everything in a thread of its own except this: the making of its object.
    """

    _terminate: Callable[[], object] | None = None

    def __new__(cls, *_: Any, **__: Any) -> Any:
        self = super().__new__(cls)
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGTERM)

            def handle(number: int, frame: Any) -> None:
                if self._terminate is not None:
                    self._terminate()
                elif callable(before):
                    before(number, frame)

            signal.signal(signal.SIGTERM, handle)
        return self

    def on_sigterm(self, drain: Callable[[], Awaitable[object]]) -> None:
        """On SIGTERM await ``drain()`` in the running loop, and end the process, which the controller replaces."""
        loop, ending = asyncio.get_running_loop(), list[asyncio.Task[None]]()

        async def end() -> None:
            log.info("draining after SIGTERM")
            try:
                await drain()
            except Exception:
                log.exception("could not drain")
            # Not by way of Ray, whose head may be gone. Everything is closed; Ray notices.
            os._exit(0)

        def begin() -> None:
            if not ending:
                ending.append(loop.create_task(end(), name="after SIGTERM"))

        self._terminate = lambda: loop.call_soon_threadsafe(begin)
