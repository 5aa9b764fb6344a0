"""Recovery after a lost connection or lost data: finds the outcome of every call, and publishes lost calls again."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict

from ...broker.queue.publisher import Publisher
from ...broker.queue.reply_stream import ReplyStream
from ...broker.transport.connection import RedisConnection
from ..errors import BrokerRefused, BrokerUnavailable, NotPermitted, StreamBroken
from .call import Call, CallsInFlight
from .call_publisher import CallPublisher

log = logging.getLogger(__name__)

_CLOCK_SLACK_MS = 60_000
"""Search for entries from this long before a call: another server, with another clock, may have numbered them."""
_RETRY_S = 1.0


class Recovery:
    """Compares the calls of one client with the entries on the streams of their backends."""

    def __init__(
        self,
        connection: RedisConnection,
        in_flight: CallsInFlight,
        publisher: Publisher,
        call_publisher: CallPublisher,
        replies: ReplyStream,
    ) -> None:
        self._connection, self._in_flight, self._publisher = connection, in_flight, publisher
        self._call_publisher, self._replies = call_publisher, replies
        self._running = asyncio.Lock()

    async def on_reconnect(self) -> None:
        """Renew the reply stream and recover, until that succeeds or the connection breaks again."""
        while self._connection.connected:
            try:
                await self._replies.renew()
                await self.recover()
                return
            except BrokerRefused as e:
                log.error("cannot find the outcomes of the calls in flight: %s", e)
            except BrokerUnavailable as e:
                # The server is back and refuses writes. If the connection broke again, the loop ends.
                log.debug("cannot find the outcomes of the calls in flight: %s", e)
            await asyncio.sleep(_RETRY_S)

    async def recover(self) -> None:
        """Find the outcome of every call that was sent, and publish again the calls that Redis no longer has.

        A Redis user without the permission to read the request streams cannot find out. Its accepted requests are
        withdrawn and published again: a request that was running runs twice, and one that was waiting goes to the end
        of the queue.

        Raises:
            BrokerUnavailable: the connection broke again.
            BrokerRefused: the broker answered with an error.
        """
        async with self._running:
            missing = await self._find_missing()
            if not missing:
                return
            # A request that is not on its stream was answered just now, or is lost. If it was answered, the reply is on
            # the reply stream.
            await self._replies.drain()
            for call in missing:
                self._replace(call)

    async def _find_missing(self) -> list[Call]:
        """Return the calls whose requests are not on their streams, and record the entries of the others."""
        # The connection itself sends requests that it has not sent yet. Those need no recovery.
        sent = [call for call in self._in_flight.by_id.values() if call.fate_unknown or call.entry is not None]
        sent += [call for call in self._in_flight.withdrawn.values() if call.fate_unknown]
        by_stream: defaultdict[tuple[str, bool], list[Call]] = defaultdict(list)
        for call in sent:
            by_stream[call.backend, call.batch].append(call)
        missing: list[Call] = []
        for (backend, batch), calls in by_stream.items():
            for call, entry in zip(calls, await self._find(backend, calls, batch=batch), strict=True):
                if entry is None:
                    missing.append(call)
                else:
                    self._in_flight.record_entry(call, entry)
        return missing

    async def _find(self, backend: str, calls: list[Call], *, batch: bool) -> list[bytes | None]:
        since_ms = min(call.started_ms for call in calls) - _CLOCK_SLACK_MS
        known = [(call.id, call.entry) for call in calls]
        try:
            return await self._publisher.find(backend, known, since_ms, batch=batch)
        except NotPermitted:
            for call in calls:
                if call.entry is not None:
                    self._publisher.withdraw(backend, call.entry, batch=batch)
            return [None] * len(calls)

    def _replace(self, call: Call) -> None:
        """Publish a lost request again. A streamed reply that has begun ends instead: its parts must not come twice."""
        self._in_flight.withdrawn.pop(call.id, None)
        if call.incoming is not None:
            self._in_flight.abort(call, StreamBroken(call.backend, call.shown_id, "the broker has lost it"))
        elif call.id in self._in_flight.by_id and not call.has_reply:
            was_accepted = not call.fate_unknown
            call.entry, call.fate_unknown = None, False
            self._call_publisher.publish_again(call, was_accepted=was_accepted)
