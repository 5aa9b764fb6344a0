"""Sender side of streamed replies: writes parts to the caller's reply stream, within the window that the caller grants.

The reader of a stream reports what it has read in signals, which also prove that it is alive. A stream whose reader
sends none for `LAPSE_S` seconds is stopped.
"""

from __future__ import annotations

import asyncio
import logging

from ...broker.queue.consumer_group import ConsumerGroup
from ...broker.queue.flow_control import LAPSE_S, read_credit
from ...broker.transport.connection import RedisConnection
from ...broker.wire.replies import Part
from ..claim import Claim
from ..executing.stream_writer import StreamWriter
from .kept_claims import KeptClaims

log = logging.getLogger(__name__)

_CHECK_S = 1.0


class StreamSender:
    """Sends the parts of all replies that stream from one replica. Only for the loop in which they run."""

    def __init__(self, commands: RedisConnection, group: ConsumerGroup, kept: KeptClaims) -> None:
        """``kept`` gathers the parts of replies that are kept."""
        self._commands, self._group, self._kept = commands, group, kept
        # By entry ref and not by call id: callers choose the ids, so that two requests may have the same.
        self._open: dict[bytes, _OpenStream] = {}
        self._refs: dict[str, list[bytes]] = {}
        """Entry refs by call id: signals name the call."""
        self._check: asyncio.TimerHandle | None = None

    @property
    def writers(self) -> list[StreamWriter]:
        """The writers of all streams that have begun and not ended."""
        return [stream.writer for stream in self._open.values()]

    def begin(self, writer: StreamWriter) -> None:
        """Note that the first part of a reply is about to be sent. The writer is stopped if its claim was released."""
        claim = writer.claim
        if claim.is_released:
            writer.stop()
            return
        if claim.entry.keep_bytes is not None:
            self._kept.begin(writer)
            return
        if claim.entry.caller:
            # Ahead of the first part on the same connection: a replica that redelivers the entry must not run it again.
            self._group.replies.mark_streamed(claim.ref)
        loop = asyncio.get_running_loop()
        claim.is_streaming = True
        self._open[claim.ref] = _OpenStream(writer, loop.time())
        self._refs.setdefault(claim.entry.id, []).append(claim.ref)
        if self._check is None:
            self._check = loop.call_later(_CHECK_S, self._stop_abandoned)

    def send(self, writer: StreamWriter, part: Part) -> None:
        """Append a part to the caller's reply stream. Shadow traffic has no caller, and its parts are dropped."""
        entry = writer.claim.entry
        if entry.keep_bytes is not None:
            self._kept.gather(writer, part)
            return
        caller = entry.caller
        if caller and not writer.is_stopped:
            self._group.replies.send_part(caller, part.fields(), writer.stop)

    def end(self, claim: Claim) -> None:
        """Forget the stream of a settled claim."""
        del self._open[claim.ref]
        refs = self._refs[claim.entry.id]
        refs.remove(claim.ref)
        if not refs:
            del self._refs[claim.entry.id]
        if claim.entry.caller:
            self._group.replies.forget_streamed(claim.ref)

    def on_signal(self, signal: bytes) -> None:
        """Apply a reader's report of how many bytes it has read. The stream may be one of another replica."""
        try:
            call_id, read_bytes = read_credit(signal)
        except ValueError:
            log.error("dropped a signal of %d bytes that cannot be read", len(signal))
            return
        for ref in self._refs.get(call_id, ()):
            stream = self._open[ref]
            stream.last_signal_s = asyncio.get_running_loop().time()
            stream.writer.grant(read_bytes)

    def close(self) -> None:
        """Cancel the timer."""
        if self._check is not None:
            self._check.cancel()

    def _stop_abandoned(self) -> None:
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        for stream in list(self._open.values()):
            if not self._commands.connected:
                stream.last_signal_s = now_s  # no signal can arrive
            elif now_s - stream.last_signal_s > LAPSE_S:
                # Shadow traffic has no reader, and its streams are stopped after the same time.
                has_caller = stream.writer.claim.entry.caller
                stream.writer.stop(f"its caller has sent no signal for {LAPSE_S:g} s" if has_caller else "")
        self._check = loop.call_later(_CHECK_S, self._stop_abandoned) if self._open else None


class _OpenStream:
    __slots__ = ("last_signal_s", "writer")

    def __init__(self, writer: StreamWriter, last_signal_s: float) -> None:
        self.writer, self.last_signal_s = writer, last_signal_s
        """The time of the reader's last signal, by the loop's clock."""
