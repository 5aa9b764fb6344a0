"""Follower of one backend's record, for its replicas: they need no other part of the registry.

A change of the registry sends a signal to the replicas of the backends that it concerns (`RECORD_CHANGED`), so the
others are not disturbed. A lost signal delays a change by `READ_EVERY_S` at most.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from ..errors import BrokerUnavailable, WireError
from ..transport.clock import on_grid
from ..transport.connection import RedisConnection
from ..wire.keys import Keys
from .json_records import parse_objects, read_record
from .records import BackendRecord

log = logging.getLogger(__name__)

READ_EVERY_S = 10.0
"""Seconds between two readings of the record."""


class RecordFollower:
    """Reads the record of one backend over and over. Only for the event loop of the connection.

    Args:
        connection: to the broker.
        keys: of the instance.
        backend: tag of the backend.
    """

    def __init__(self, connection: RedisConnection, keys: Keys, backend: str) -> None:
        self._connection, self._key, self._backend = connection, keys.backends, backend
        self._raw: bytes | None = None
        self.record: BackendRecord | None = None
        """The record as it was read last; None if there is none."""
        self._on_change: Callable[[], None] | None = None
        self._is_reading = False
        self._must_read_again = False
        self._timer: asyncio.TimerHandle | None = None

    async def start(self) -> BackendRecord | None:
        """Read the record, return it, and go on reading it.

        Raises:
            BrokerUnavailable: the broker cannot be reached.
            BrokerRefused: the broker answered with an error, such as a missing permission.
            WireError: the record cannot be read.
        """
        self._apply(await self._connection.send("HGET", self._key, self._backend, repeat=True))
        self._connection.on_reconnect(self._read_after_reconnect)
        self._schedule()
        return self.record

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` on the event loop whenever the record has changed."""
        self._on_change = listener

    def read(self) -> None:
        """Read the record now: it may have changed."""
        if self._is_reading:
            self._must_read_again = True
            return
        self._is_reading = True
        self._connection.post(self._on_read, "HGET", self._key, self._backend, repeat=True)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _schedule(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(
            on_grid(READ_EVERY_S, self._connection.now_ms()), self._read_regularly
        )

    def _read_regularly(self) -> None:
        self._schedule()
        self.read()

    async def _read_after_reconnect(self) -> None:
        if self._timer is not None:
            self.read()

    def _on_read(self, reply: Any) -> None:
        self._is_reading = False
        if isinstance(reply, Exception):
            if not isinstance(reply, BrokerUnavailable):
                log.error("cannot read the record of backend %r: %s", self._backend, reply)
        elif reply != self._raw:
            try:
                self._apply(reply)
            except WireError as e:
                log.error("%s", e)
            else:
                if self._on_change is not None:
                    self._on_change()
        if self._must_read_again:
            self._must_read_again = False
            self.read()

    def _apply(self, raw: bytes | None) -> None:
        tag, record = self._backend, None
        if raw is not None:
            record = read_record(BackendRecord, tag, parse_objects([tag.encode(), raw])[tag])
        self._raw, self.record = raw, record
