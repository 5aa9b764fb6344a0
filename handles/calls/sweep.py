"""Periodic sweep over the calls in flight: deadlines, credit of streamed replies, and long outages.

One timer serves all calls, so that a deadline costs a call no timer of its own. It runs while calls are in flight.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ...broker.queue.flow_control import REPEAT_S
from ...broker.transport.connection import RedisConnection
from ...broker.transport.url import shown_url
from ..errors import BrokerUnavailable
from .call import CallsInFlight

_PERIOD_S = 0.05
"""Seconds between two sweeps; the most by which a deadline is missed."""
_MAX_OUTAGE_S = 60.0
"""After an outage of this length accepted calls fail too. Their requests are durable, but a caller needs an answer."""


class Sweep:
    """Ends the calls of one client that have waited for too long."""

    def __init__(self, connection: RedisConnection, in_flight: CallsInFlight, on_idle: Callable[[], None]) -> None:
        """``on_idle`` is called when the last call in flight has ended."""
        self._connection, self._in_flight, self._on_idle = connection, in_flight, on_idle
        self._timer: asyncio.TimerHandle | None = None
        self._away_since_s: float | None = None

    def ensure_running(self) -> None:
        """Start the timer unless it runs."""
        if self._timer is None:
            self._timer = self._in_flight.loop.call_later(_PERIOD_S, self._run)

    def stop(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _run(self) -> None:
        self._timer = None
        now_s = self._in_flight.loop.time()
        for call in [call for call in self._in_flight.timed.values() if call.deadline_s <= now_s]:
            self._in_flight.expire(call)
        for incoming in self._in_flight.streaming.values():
            if now_s - incoming.granted_at_s > REPEAT_S:
                incoming.grant()
        self._check_outage(now_s)
        if self._in_flight.by_id:
            self.ensure_running()
        else:
            self._away_since_s = None
            self._on_idle()

    def _check_outage(self, now_s: float) -> None:
        if self._connection.connected:
            self._away_since_s = None
        elif self._away_since_s is None:
            self._away_since_s = now_s
        elif now_s - self._away_since_s > _MAX_OUTAGE_S:
            error = f"it has been away for {_MAX_OUTAGE_S:g} s"
            for call in list(self._in_flight.by_id.values()):
                self._in_flight.finish(call, BrokerUnavailable(shown_url(self._connection.url), error))
