"""Word to all replicas of a backend, over Pub/Sub: an entry was given up by its caller, or work was given back.

Nothing rests on a signal's arrival. It saves work or time; what must hold is written on the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from redis.asyncio import Redis
from redis.exceptions import RedisError

log = logging.getLogger(__name__)

_PING_S = 5.0


class Signals:
    """Hears a channel, for as long as it is open, on a connection of its own (a subscriber can do nothing else)."""

    def __init__(self, url: str, channel: str, on_signal: Callable[[bytes], None]) -> None:
        self._url, self._channel, self._on_signal = url, channel, on_signal
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._hear(), name=f"signals of {self._channel}")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _hear(self) -> None:
        redis = Redis.from_url(self._url, protocol=2, socket_timeout=2 * _PING_S, client_name="penstock-signals")
        try:
            while True:
                try:
                    async with redis.pubsub() as channel:
                        await channel.subscribe(self._channel)
                        while True:
                            message = await channel.get_message(ignore_subscribe_messages=True, timeout=_PING_S)
                            if message is None:
                                await channel.ping()
                            elif message["type"] == "message":
                                self._on_signal(message["data"])
                except (RedisError, OSError) as e:
                    log.debug("cannot hear %s: %s", self._channel, e)
                    await asyncio.sleep(0.5)
        finally:
            with contextlib.suppress(RedisError, OSError):
                await redis.aclose()
