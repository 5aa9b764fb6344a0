"""Recovery after a lost connection or lost data: finds out what became of every call."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable

from ...broker.queue.publisher import Published, Publisher
from ...broker.queue.reply_stream import ReplyStream
from ..errors import NotPermitted, StreamBroken
from .call import Call, CallsInFlight

_SLACK_MS = 60_000
"""The clock that numbers entries may have been another server's."""


class Recovery:
    """Compares the calls of one caller with what lies on the streams of their backends."""

    def __init__(
        self,
        in_flight: CallsInFlight,
        publisher: Publisher,
        replies: ReplyStream,
        on_published: Callable[[Call, Published], None],
        send_again: Callable[[Call, bool], None],
    ) -> None:
        """``on_published`` hears of what is on its stream, ``send_again`` of what is not, and whether it was
        accepted before.
        """
        self._in_flight, self._publisher, self._replies = in_flight, publisher, replies
        self._on_published, self._send_again = on_published, send_again
        self._running = asyncio.Lock()

    async def reconcile(self) -> None:
        """Find out what became of every call that was sent, and publish again what Redis no longer has.

        A user that may not read the request streams cannot find out: what it has there is taken back and published
        again. If that was running it runs twice; what waited loses its place in the queue.
        """
        async with self._running:
            # Calls that were never sent are sent by the connection; those sent since it is back are not our business.
            sent = [call for call in self._in_flight.calls.values() if call.unsure or call.entry is not None]
            sent += [call for call in self._in_flight.doomed.values() if call.unsure]
            by_stream: defaultdict[tuple[str, bool], list[Call]] = defaultdict(list)
            for call in sent:
                by_stream[call.backend, call.batch].append(call)
            missing: list[Call] = []
            for (backend, batch), calls in by_stream.items():
                since_ms = min(call.since_ms for call in calls) - _SLACK_MS
                known = [(call.id, call.entry) for call in calls]
                try:
                    found = await self._publisher.find(backend, known, since_ms, batch=batch)
                except NotPermitted:
                    found = [None] * len(calls)
                    for call in calls:
                        if call.entry is not None:
                            self._publisher.withdraw(backend, call.entry, batch=batch)
                for call, entry in zip(calls, found, strict=True):
                    if entry is None:
                        missing.append(call)
                    else:
                        self._on_published(call, entry)
            if not missing:
                return
            # What is not on its stream was answered just now, or is lost; its answer would be on ours.
            await self._replies.drain()
            for call in missing:
                self._in_flight.doomed.pop(call.id, None)
                if call.incoming is not None:
                    self._in_flight.break_off(call, StreamBroken(call.backend, call.shown_id, "the broker has lost it"))
                elif call.id in self._in_flight.calls and not call.answered:
                    accepted = not call.unsure  # what was accepted is not refused any more
                    call.entry, call.unsure = None, False
                    self._send_again(call, accepted)
