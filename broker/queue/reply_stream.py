"""The reply stream of a caller: one stream and one reader for each process and loop.

Its caller creates it and keeps it alive with an expiry. Replicas append only to a stream that exists (``NOMKSTREAM``),
so a caller that died leaks nothing: its stream lapses, and what was still to come goes nowhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from ..errors import BrokerRefused, BrokerUnavailable
from ..transport.commands import Script
from ..transport.connection import BLOCK_MS, RedisConnection
from ..wire.entry_ref import order_of
from ..wire.keys import Keys

log = logging.getLogger(__name__)

TTL_S = 60.0
RENEW_S = 5.0
_COUNT = 200

# Renews the stream, or creates it empty. KEYS: the stream. ARGV: milliseconds. Answers 0 if it was not there.
_KEEP = Script("""#!lua flags=allow-oom
if redis.call('PEXPIRE', KEYS[1], ARGV[1]) == 1 then return 1 end
local id = redis.call('XADD', KEYS[1], '*', '', '')
redis.call('XDEL', KEYS[1], id)
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 0
""")


class ReplyStream:
    """The reply stream of one caller: reads it, trims it, keeps it.

    ``on_reply`` gets the fields of each entry, in order, in the reader. ``on_loss`` is awaited when the stream turned
    out to be gone, and replies with it: the caller was away for longer than ``ttl_s``, or Redis lost its data.
    """

    def __init__(
        self,
        commands: RedisConnection,
        keys: Keys,
        caller: str,
        on_reply: Callable[[list[bytes]], None],
        on_loss: Callable[[], Awaitable[None]],
        *,
        ttl_s: float = TTL_S,
    ) -> None:
        self._commands, self._key = commands, keys.replies(caller)
        self._ttl_ms = int(ttl_s * 1000)
        self.ref = b"0"
        """Of the reply that is being handed over."""
        self._reads = RedisConnection(commands.url, name="penstock-replies")
        self._on_reply, self._on_loss = on_reply, on_loss
        self._last: bytes = b"0"
        self._trimmed: bytes = b"0"
        self._lost = False
        self._draining: list[tuple[tuple[int, int], asyncio.Future[None]]] = []
        self._keeper: asyncio.Task[None] | None = None
        self._closed = False

    async def open(self) -> None:
        """Create the stream and start reading. Raises `BrokerUnavailable`, or `BrokerRefused`."""
        await self._reads.open()
        await self._commands.run_script(_KEEP, [self._key], [self._ttl_ms], repeat=True)
        # Whoever may not read is to know it before anything is asked.
        await self._reads.send("XREAD", "COUNT", 1, "STREAMS", self._key, "$", repeat=True)
        self._read()
        self._keeper = asyncio.get_running_loop().create_task(self._keep(), name="reply stream")

    async def close(self) -> None:
        """Stop reading and delete the stream."""
        await self._end()
        try:
            if self._commands.connected:
                await self._commands.send("UNLINK", self._key)
        except (BrokerUnavailable, BrokerRefused):
            pass  # it lapses by itself

    async def _end(self) -> None:
        self._closed = True
        for _, drained in self._draining:
            drained.cancel()
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        await self._reads.close()

    def _read(self) -> None:
        # A read's continuation asks for the next: no task is woken between a reply's arrival and its caller's future.
        self._reads.post(
            self._on_read, "XREAD", "COUNT", _COUNT, "BLOCK", BLOCK_MS, "STREAMS", self._key, self._last, repeat=True
        )

    def _on_read(self, reply: Any) -> None:
        if self._closed:
            return
        if isinstance(reply, Exception):
            # The connection comes back by itself; the next read waits for it.
            log.debug("reading replies: %s", reply)
            asyncio.get_running_loop().call_later(0.1, self._read)
            return
        entries: list[tuple[bytes, list[bytes]]] = reply[0][1] if reply else []
        if entries:
            self._last = entries[-1][0]
        if len(entries) == 1:
            # A lone reply is somebody's whole latency: what its caller writes goes out first.
            asyncio.get_running_loop().call_soon(self._read)
        else:
            self._read()
        for ref, fields in entries:
            self.ref = ref
            try:
                self._on_reply(fields)
            except Exception:
                log.exception("cannot take a reply")
        if self._draining:
            self._tell_drained()

    async def _keep(self) -> None:
        renewed = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(0.2)
            self.trim()
            if asyncio.get_running_loop().time() - renewed < RENEW_S:
                continue
            try:
                await self.renew()
            except BrokerUnavailable as e:
                log.debug("cannot renew the reply stream: %s", e)
            except Exception:  # or nobody would renew it any more
                log.exception("cannot renew the reply stream")
            renewed = asyncio.get_running_loop().time()

    async def renew(self) -> None:
        """Put off the stream's expiry; if it has lapsed, make it anew and say so through ``on_loss``."""
        was_there = await self._commands.run_script(_KEEP, [self._key], [self._ttl_ms], repeat=True)
        if not was_there:
            # A server that lost its data may count from a clock that is behind the one it had.
            self._last = self._trimmed = b"0"
            self._lost = True
        if self._lost:
            await self._on_loss()
            self._lost = False

    async def drain(self) -> None:
        """Return when all that was on the stream when asked has been handed over."""
        last = await self._commands.send("XREVRANGE", self._key, "+", "-", "COUNT", 1, repeat=True)
        if last and order_of(self._last) < (newest := order_of(last[0][0])):
            drained: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._draining.append((newest, drained))
            await drained

    def _tell_drained(self) -> None:
        read = order_of(self._last)
        for newest, drained in self._draining:
            if newest <= read and not drained.done():
                drained.set_result(None)
        self._draining = [waiting for waiting in self._draining if not waiting[1].done()]

    def trim(self) -> None:
        """Delete what has been handed over."""
        # Five times a second, not at each reply: an exact trim costs the broker, and memory is bounded all the same.
        if self._last != self._trimmed:
            self._trimmed = self._last
            self._delete_up_to(self._last)

    def _delete_up_to(self, ref: bytes) -> None:
        time_ms, sequence = order_of(ref)
        after = f"{time_ms}-{sequence + 1}"
        self._commands.post(_ignore, "XTRIM", self._key, "MINID", after, repeat=True)


def _ignore(reply: Any) -> None:
    """Trimming is house-keeping: the next one makes up for it."""
