"""Replies, from a caller's stream to the calls that wait for them: whole, large or in parts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from ..broker.flow import WINDOW
from ..broker.keys import Keys
from ..broker.wire import PART_VERSION, Part, Reply
from .bodies import Bodies
from .calls import Call, InFlight
from .errors import BrokerRefused, BrokerUnavailable, NotPermitted, StreamBroken, WireError
from .incoming import Incoming

log = logging.getLogger(__name__)


class Receiver:
    """Hears the replies to one caller, and ends its calls by them. Only for its loop."""

    def __init__(
        self,
        in_flight: InFlight,
        bodies: Bodies,
        keys: Keys,
        caller: str,
        shown_url: str,
        grant: Callable[[Call, int], None],
        *,
        keeps_bodies: bool,
    ) -> None:
        """``grant`` tells how much of an answer in parts was taken. ``keeps_bodies``: a job's next producer may need
        those of its replies.
        """
        self._in_flight, self._calls, self._finish = in_flight, in_flight.calls, in_flight.finish
        self._bodies, self._keys, self._caller, self._shown_url = bodies, keys, caller, shown_url
        self._grant, self._keeps_bodies = grant, keeps_bodies
        self._fetches: set[asyncio.Task[None]] = set()
        self.on_stray: Callable[[str, Reply | BaseException], None] | None = None
        """Hears, by the request's id, what else comes: results that a job's former producer has left."""

    async def drain(self) -> None:
        """Return when what has come by now has been heard, the bodies of large replies included."""
        if self._fetches:
            await asyncio.wait(self._fetches)

    def close(self) -> None:
        for fetch in self._fetches:
            fetch.cancel()

    def on_reply(self, fields: list[bytes]) -> None:
        """Take an entry of the reply stream."""
        if fields[1] == PART_VERSION:
            self._hear_part(fields)
            return
        try:
            replies = Reply.all_of(fields)
        except WireError as e:
            log.error("dropped a reply that cannot be read: %s", e)
            for id_ in Reply.ids_of(fields):
                if (call := self._calls.get(id_)) is not None:
                    self._finish(call, e)
            return
        for reply in replies:
            self._hear(reply)

    def _hear(self, reply: Reply) -> None:
        call = self._calls.get(reply.id)
        if reply.large:
            self._hear_large(reply, call)
        elif call is not None:
            if not call.answered:  # else a second answer, while the body of the first is on its way
                self._finish(call, reply)
        elif self.on_stray is not None:
            self.on_stray(reply.id, reply)

    def _hear_large(self, reply: Reply, call: Call | None) -> None:
        then: Callable[[Reply | BaseException], None]
        if call is not None:
            if call.answered:
                return
            call.answered = True
            then = partial(self._finish, call)
        elif self.on_stray is not None:
            then = partial(self.on_stray, reply.id)
        else:  # cancelled, too late, or a second answer after a take-over
            self._bodies.drop(self._keys.reply_body(self._caller, reply.id))
            return
        task = asyncio.get_running_loop().create_task(self._fetch(reply, then))
        self._fetches.add(task)
        task.add_done_callback(self._fetches.discard)

    def _hear_part(self, fields: list[bytes]) -> None:
        try:
            part = Part.of(fields)
        except WireError as e:
            log.error("dropped a part of an answer that cannot be read: %s", e)
            for id_ in Reply.ids_of(fields):
                if (call := self._calls.get(id_)) is not None:
                    self._in_flight.break_off(call, e)
            return
        call = self._calls.get(part.id)
        if call is None:
            return  # cancelled, or broken off
        incoming = call.incoming
        if incoming is None:
            incoming = Incoming(part, call.backend, WINDOW, partial(self._grant, call), call.cancel)
        try:
            incoming.take(part)
        except StreamBroken as e:
            self._in_flight.break_off(call, e)
            return
        if call.incoming is None:
            self._in_flight.stream(call, incoming)

    async def _fetch(self, reply: Reply, then: Callable[[Reply | BaseException], None]) -> None:
        key = self._keys.reply_body(self._caller, reply.id)
        try:
            body = await self._bodies.get(key)
        except NotPermitted as e:
            then(e)
            return
        except (BrokerUnavailable, BrokerRefused) as e:
            then(BrokerUnavailable(self._shown_url, f"cannot fetch the body of a reply: {e}"))
            return
        if not self._keeps_bodies:
            self._bodies.drop(key)
        if body is None:
            then(WireError(f"the body of the reply to {reply.id!r} has expired"))
            return
        reply.body, reply.large = body, False
        then(reply)
