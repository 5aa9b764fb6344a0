"""One connected socket: the commands that were sent over it, and the replies to them in the same order."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from .commands import Command, Packed, pieces_of
from .error_replies import ErrorReply
from .resp_reader import RespReader

log = logging.getLogger(__name__)

BLOCK_MS = 2_000
"""How long a blocking read waits at the server. Shorter than `STALL_S`, so that silence means a dead server."""
STALL_S = 6.0
"""A server that owes a reply and sends nothing for this long counts as dead."""
_BEAT_S = 1.0
"""Seconds between checks for a silent server."""
assert STALL_S > BLOCK_MS / 1000 + 2 * _BEAT_S, "a quiet blocking read must not look like a dead server"

IDLE_BLOCK_MS = 6_000
"""As `BLOCK_MS`, for what replicas read: each reading that ends and begins again costs the server 20 µs."""
IDLE_STALL_S = 10.0
"""As `STALL_S`, for the connections of such readings. Another one of their owner notices a dead server sooner."""
assert IDLE_STALL_S - IDLE_BLOCK_MS / 1000 >= STALL_S - BLOCK_MS / 1000, "the server may be as slow as for a short read"


class Session:
    """Sends commands over one socket and completes them with their replies, from the handshake to the lost connection.

    Replies belong to commands by their order. A cancelled command therefore stays until its reply is read, so that the
    reply cannot reach another command.

    Args:
        transport: connected, with the handshake done. Its protocol is replaced.
        on_error_reply: called with a command and the server's error reply, in place of completing the command.
        on_beat: called once a second while the server is not silent.
        stall_s: a server that owes a reply and sends nothing for this long counts as dead.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        on_error_reply: Callable[[Command, ErrorReply], None],
        on_beat: Callable[[], None],
        stall_s: float = STALL_S,
    ) -> None:
        self._stall_s = stall_s
        self._transport, self._on_error_reply, self._on_beat = transport, on_error_reply, on_beat
        self._loop = asyncio.get_running_loop()
        self._reader = RespReader(transport, self._on_reply, self._is_bulky_next, ErrorReply)
        self.unanswered: deque[Command] = deque()
        """Commands without a reply, written or not, in order. `RedisConnection` appends to it and to ``outgoing``."""
        self.outgoing: list[Packed] = []
        """The last of these, which are not written yet, encoded."""
        self._has_pieces = False
        """Whether any of ``outgoing`` is packed in pieces."""
        self.loaded_scripts: set[str] = set()
        """Digests of the scripts that were sent whole, for ``EVALSHA``."""
        self.abort_reason = ""
        """Why this side closed the socket; empty if the server closed it."""
        self._last_read_s = self._loop.time()
        self._beat_due_s = self._last_read_s + _BEAT_S
        self._beat_timer = self._loop.call_at(self._beat_due_s, self._beat)

    @property
    def ended(self) -> asyncio.Future[None]:
        """Resolved when the socket is closed, with an exception if it failed."""
        return self._reader.ended

    @property
    def is_idle(self) -> bool:
        """Whether the server owes no reply: all commands without one are still to be written."""
        return len(self.unanswered) == len(self.outgoing)

    def expect_bulky(self, command: Command) -> None:
        """Note that a command, which was just appended, is packed in pieces or may have a large reply."""
        if type(command.packed) is not bytes:
            self._has_pieces = True
        if command.bulky_reply:
            self._reader.bulky += 1

    def write(self) -> None:
        """Write all commands that were sent since the last write."""
        if not self.outgoing or self._transport.is_closing():
            return  # uvloop raises for a closed transport; unwritten commands are sent over the next connection
        if self._has_pieces:
            self._has_pieces = False
            # uvloop passes the pieces to the kernel without joining them.
            self._transport.writelines([piece for packed in self.outgoing for piece in pieces_of(packed)])
        else:
            self._transport.write(b"".join(cast("list[bytes]", self.outgoing)))
        self.outgoing.clear()

    def abort(self, reason: str) -> None:
        """Close the socket, which ends the session."""
        if not self.abort_reason:
            self.abort_reason = reason
            self._transport.abort()  # ends the read, and with it `ended`

    def end(self) -> tuple[list[Command], list[Command]]:
        """Stop reading, and return the commands without a reply.

        Returns those that may be sent again, and those that the server may have carried out and that must not be
        repeated.
        """
        self._reader.close()
        self._beat_timer.cancel()
        written = len(self.unanswered) - len(self.outgoing)
        again: list[Command] = []
        unknown: list[Command] = []
        for at, command in enumerate(self.unanswered):
            (again if command.repeat or at >= written else unknown).append(command)
        self.unanswered.clear()
        self.outgoing.clear()
        return again, unknown

    # -- reading

    def _is_bulky_next(self) -> bool:
        return self.unanswered[0].bulky_reply

    def _on_reply(self, reply: Any) -> None:
        command = self.unanswered.popleft()
        if command.bulky_reply:
            self._reader.bulky -= 1
        if type(reply) is ErrorReply:
            self._on_error_reply(command, reply)
            return
        try:  # `Command.complete` without its call
            command.then(reply)
        except Exception:
            log.exception("a reply's continuation failed")

    # -- detection of silent servers

    def _beat(self) -> None:
        now = self._loop.time()
        if self._reader.has_read or now - self._beat_due_s > _BEAT_S:  # the loop was blocked: this process did not read
            self._last_read_s = now
            self._reader.has_read = False
        if self.unanswered and now - self._last_read_s > self._stall_s:
            self.abort(f"no answer for {self._stall_s:g} s")
            return
        self._on_beat()
        self._beat_due_s = self._loop.time() + _BEAT_S
        self._beat_timer = self._loop.call_at(self._beat_due_s, self._beat)
