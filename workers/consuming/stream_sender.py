"""Sender side of streamed replies: writes parts to the caller's reply stream, within its window."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ...broker.queue.consumer_group import ConsumerGroup
from ...broker.queue.flow_control import LAPSE_S, read_taken
from ...broker.transport.connection import RedisConnection
from ...broker.wire.replies import Part
from ...broker.wire.requests import Entry
from ..executing.stream_writer import StreamWriter

log = logging.getLogger(__name__)

_CHECK_S = 1.0


class StreamSender:
    """Sends the parts of all answers that stream here. Only for the loop.

    ``ref_of`` names the place of an entry that is held, and is None for one that is not.
    """

    def __init__(
        self, commands: RedisConnection, claims: ConsumerGroup, ref_of: Callable[[Entry], bytes | None]
    ) -> None:
        self._commands, self._group, self._ref_of = commands, claims, ref_of
        # By place and not by the request's id: callers choose ids, so that two requests may have the same.
        self._flows: dict[bytes, StreamWriter] = {}
        self._heard_at: dict[bytes, float] = {}
        self._places: dict[str, list[bytes]] = {}
        """By request id, which is what signals name."""
        self._check: asyncio.TimerHandle | None = None

    @property
    def flows(self) -> list[StreamWriter]:
        """All that have begun and not ended."""
        return list(self._flows.values())

    def begin(self, flow: StreamWriter) -> None:
        entry, ref = flow.entry, self._ref_of(flow.entry)
        if ref is None:
            flow.stop()
            return
        if entry.caller:
            # Ahead of its first part on the same connection: nobody who takes the entry over may run it again.
            self._group.replies.mark_streamed(ref)
        self._flows[ref] = flow
        self._places.setdefault(entry.id, []).append(ref)
        loop = asyncio.get_running_loop()
        self._heard_at[ref] = loop.time()
        if self._check is None:
            self._check = loop.call_later(_CHECK_S, self._stop_lapsed)

    def send(self, flow: StreamWriter, part: Part) -> None:
        if flow.entry.caller and not flow.stopped:
            self._group.replies.send_part(flow.entry.caller, part.fields(), flow.stop)

    def carries(self, ref: bytes) -> bool:
        """Return whether the answer to the entry at ``ref`` streams, and has not been forgotten by `end`."""
        return ref in self._flows

    def end(self, entry: Entry, ref: bytes) -> None:
        """Forget an answer that streams, once its entry is settled."""
        del self._flows[ref], self._heard_at[ref]
        refs = self._places[entry.id]
        refs.remove(ref)
        if not refs:
            del self._places[entry.id]
        if entry.caller:
            self._group.replies.forget_streamed(ref)

    def hear(self, word: bytes) -> None:
        """Take a signal that says how much of an answer was taken; it may be of another replica's."""
        try:
            request, taken = read_taken(word)
        except ValueError:
            log.error("dropped a signal of %d bytes that cannot be read", len(word))
            return
        for ref in self._places.get(request, ()):
            self._heard_at[ref] = asyncio.get_running_loop().time()
            self._flows[ref].taken(taken)

    def close(self) -> None:
        if self._check is not None:
            self._check.cancel()

    def _stop_lapsed(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for ref, flow in list(self._flows.items()):
            if not self._commands.connected:
                self._heard_at[ref] = now  # what they say cannot reach us
            elif now - self._heard_at[ref] > LAPSE_S:
                # A copy for a shadow has no caller, who could leave it: it has as long as one that is silent.
                flow.stop(f"its caller has said nothing for {LAPSE_S:g} s" if flow.entry.caller else "")
        self._check = loop.call_later(_CHECK_S, self._stop_lapsed) if self._flows else None
