"""The way of answers in parts from one replica to their callers, and of what these say to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ..broker.claims import Claims
from ..broker.connection import Connection
from ..broker.flow import LAPSE_S, read_taken
from ..broker.wire import Entry, Part
from .streams import Outflow

log = logging.getLogger(__name__)

_CHECK_S = 1.0


class PartsOutlet:
    """Sends the parts of all answers that stream here. Only for the loop.

    ``place_of`` names the place of an entry that is held, and is None for one that is not.
    """

    def __init__(self, commands: Connection, claims: Claims, place_of: Callable[[Entry], bytes | None]) -> None:
        self._commands, self._claims, self._place_of = commands, claims, place_of
        self._flows: dict[str, Outflow] = {}
        self._heard_at: dict[str, float] = {}
        self._check: asyncio.TimerHandle | None = None

    @property
    def flows(self) -> list[Outflow]:
        """All that have begun and not ended."""
        return list(self._flows.values())

    def begin(self, flow: Outflow) -> None:
        entry, place = flow.entry, self._place_of(flow.entry)
        if place is None:
            flow.stop()
            return
        if entry.caller:
            # Ahead of its first part on the same connection: nobody who takes the entry over may run it again.
            self._claims.mark_streamed(place)
        self._flows[entry.id] = flow
        loop = asyncio.get_running_loop()
        self._heard_at[entry.id] = loop.time()
        if self._check is None:
            self._check = loop.call_later(_CHECK_S, self._stop_lapsed)

    def send(self, flow: Outflow, part: Part) -> None:
        if flow.entry.caller and not flow.stopped:
            self._claims.part(flow.entry.caller, part.fields(), flow.stop)

    def carries(self, entry: Entry) -> bool:
        """Say whether the answer to ``entry`` streams, and has not been forgotten by `end`."""
        return entry.id in self._flows

    def end(self, entry: Entry, place: bytes) -> None:
        """Forget an answer that streams, once its entry is settled."""
        del self._flows[entry.id], self._heard_at[entry.id]
        if entry.caller:
            self._claims.forget_streamed(place)

    def hear(self, word: bytes) -> None:
        """Take a signal that says how much of an answer was taken; it may be of another replica's."""
        try:
            request, taken = read_taken(word)
        except ValueError:
            log.error("dropped a signal that cannot be read: %r", word[:100])
            return
        if (flow := self._flows.get(request)) is not None:
            self._heard_at[request] = asyncio.get_running_loop().time()
            flow.taken(taken)

    def close(self) -> None:
        if self._check is not None:
            self._check.cancel()

    def _stop_lapsed(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for request, flow in list(self._flows.items()):
            if not self._commands.connected:
                self._heard_at[request] = now  # what they say cannot reach us
            elif now - self._heard_at[request] > LAPSE_S:
                # A copy for a shadow has no caller, who could leave it: it has as long as one that is silent.
                flow.stop(f"its caller has said nothing for {LAPSE_S:g} s" if flow.entry.caller else "")
        self._check = loop.call_later(_CHECK_S, self._stop_lapsed) if self._flows else None
