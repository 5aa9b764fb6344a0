"""Reply stream of a caller: one stream and one reader for each process and event loop.

The caller creates the stream and renews its expiry. Replicas append only to a stream that exists (``NOMKSTREAM``), so a
caller that died leaks nothing: its stream expires, and later replies to it are dropped.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from ..errors import BrokerRefused, BrokerUnavailable
from ..transport.commands import Script
from ..transport.connection import RedisConnection
from ..transport.session import BLOCK_MS
from ..wire.entry_ref import order_of
from ..wire.keys import Keys

log = logging.getLogger(__name__)

TTL_S = 60.0
RENEW_S = 5.0
_COUNT = 200

# Renews the expiry of the stream, or creates it empty. KEYS: the stream. ARGV: milliseconds until it expires. Returns 1
# if the stream was there, 0 if it was created.
_KEEP = Script("""#!lua flags=allow-oom
if redis.call('PEXPIRE', KEYS[1], ARGV[1]) == 1 then return 1 end
local id = redis.call('XADD', KEYS[1], '*', '', '')
redis.call('XDEL', KEYS[1], id)
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 0
""")


class ReplyStream:
    """Reads the reply stream of one caller, trims it, and renews its expiry.

    Args:
        commands: connection for everything but blocking reads, which have a connection of their own.
        keys: the keys of the instance.
        caller: id of the caller.
        on_reply: called with the fields of each entry, in the order of the stream, in the reader.
        on_loss: awaited when the stream, and the replies on it, were lost: the caller was disconnected for longer than
            ``ttl_s``, or Redis lost its data.
        ttl_s: seconds after which the stream expires when it is not renewed.
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
        """Id of the stream entry that ``on_reply`` is being called with."""
        self._reads = RedisConnection(commands.url, name="penstock-replies")
        self._on_reply, self._on_loss = on_reply, on_loss
        self._last: bytes = b"0"
        self._trimmed: bytes = b"0"
        self._lost = False
        self._draining: list[tuple[tuple[int, int], asyncio.Future[None]]] = []
        self._keeper: asyncio.Task[None] | None = None
        self._closed = False

    async def open(self) -> None:
        """Create the stream and start reading.

        Raises:
            BrokerUnavailable: the broker cannot be reached, or refuses writes.
            BrokerRefused: the broker answered with an error, such as a missing permission.
        """
        await self._reads.open()
        await self._commands.run_script(_KEEP, [self._key], [self._ttl_ms], repeat=True)
        # A user without the permission to read must fail here, before the caller publishes anything.
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
            pass  # the stream expires

    async def _end(self) -> None:
        self._closed = True
        for _, drained in self._draining:
            drained.cancel()
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        await self._reads.close()

    def _read(self) -> None:
        # The callback of a read sends the next read, so that no task has to wake up before the reply's future is set.
        self._reads.post(
            self._on_read, "XREAD", "COUNT", _COUNT, "BLOCK", BLOCK_MS, "STREAMS", self._key, self._last, repeat=True
        )

    def _on_read(self, reply: Any) -> None:
        if self._closed:
            return
        if isinstance(reply, Exception):
            # The connection reconnects by itself; the next read waits for that.
            log.debug("cannot read replies: %s", reply)
            asyncio.get_running_loop().call_later(0.1, self._read)
            return
        entries: list[tuple[bytes, list[bytes]]] = reply[0][1] if reply else []
        if entries:
            self._last = entries[-1][0]
        if len(entries) == 1:
            # The latency of a single reply matters most: what its receiver writes in this tick goes out first.
            asyncio.get_running_loop().call_soon(self._read)
        else:
            self._read()
        for ref, fields in entries:
            self.ref = ref
            try:
                self._on_reply(fields)
            except Exception:
                log.exception("cannot process a reply")
        if self._draining:
            self._resolve_drained()

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
            except Exception:  # the task must go on, or the stream would expire
                log.exception("cannot renew the reply stream")
            renewed = asyncio.get_running_loop().time()

    async def renew(self) -> None:
        """Renew the expiry of the stream. If the stream is gone, create it again and await ``on_loss``.

        Raises:
            BrokerUnavailable: the broker cannot be reached, or refuses writes.
            BrokerRefused: the broker answered with another error.
        """
        was_there = await self._commands.run_script(_KEEP, [self._key], [self._ttl_ms], repeat=True)
        if not was_there:
            # Read from the start: the ids of a server that lost its data may begin before the last one that was read.
            self._last = self._trimmed = b"0"
            self._lost = True
        if self._lost:
            await self._on_loss()
            self._lost = False

    async def drain(self) -> None:
        """Return once ``on_reply`` has been called with every entry that is on the stream now."""
        last = await self._commands.send("XREVRANGE", self._key, "+", "-", "COUNT", 1, repeat=True)
        if last and order_of(self._last) < (newest := order_of(last[0][0])):
            drained: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._draining.append((newest, drained))
            await drained

    def _resolve_drained(self) -> None:
        read = order_of(self._last)
        for newest, drained in self._draining:
            if newest <= read and not drained.done():
                drained.set_result(None)
        self._draining = [waiting for waiting in self._draining if not waiting[1].done()]

    def trim(self) -> None:
        """Delete the entries that have been read."""
        # Called five times a second, not for each reply: an exact trim costs the broker time. Memory stays bounded.
        if self._last != self._trimmed:
            self._trimmed = self._last
            self._delete_up_to(self._last)

    def _delete_up_to(self, ref: bytes) -> None:
        time_ms, sequence = order_of(ref)
        after = f"{time_ms}-{sequence + 1}"
        self._commands.post(_ignore_result, "XTRIM", self._key, "MINID", after, repeat=True)


def _ignore_result(reply: Any) -> None:
    """Ignore a failed trim: the next one deletes the same entries."""
