"""Reply receiver: matches replies to the calls in flight, whole, large or in parts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Union

from ...broker.queue.flow_control import WINDOW
from ...broker.wire.call_ids import shown_id
from ...broker.wire.keys import Keys
from ...broker.wire.replies import PART_VERSION, Part, Reply
from ..errors import BrokerRefused, BrokerUnavailable, NotPermitted, StreamBroken, WireError
from ..pickle_policy import PicklePolicy
from .call import Call, CallsInFlight
from .incoming_stream import IncomingStream
from .large_bodies import LargeBodies

log = logging.getLogger(__name__)

_Then = Callable[[Union[Reply, BaseException]], None]  # noqa: UP007 - it is evaluated, also on Python 3.10


class ReplyReceiver:
    """Hears the replies to one caller, and ends its calls by them. Only for its loop."""

    def __init__(
        self,
        in_flight: CallsInFlight,
        bodies: LargeBodies,
        keys: Keys,
        caller: str,
        shown_url: str,
        grant: Callable[[Call, int], None],
        pickles: PicklePolicy,
        *,
        keeps_bodies: bool,
    ) -> None:
        """``grant`` tells how much of an answer in parts was taken. ``keeps_bodies``: a job's next producer may need
        those of its replies.
        """
        self._in_flight, self._calls, self._finish = in_flight, in_flight.calls, in_flight.finish
        self._bodies, self._keys, self._caller, self._shown_url = bodies, keys, caller, shown_url
        self._grant, self._pickles, self._keeps_bodies = grant, pickles, keeps_bodies
        self._fetches: set[asyncio.Task[None]] = set()
        self.stray: Callable[[str], _Then | None] | None = None
        """Returns who takes the reply to a call that is not in flight, by the call's id: an item of a job, which a
        former producer sent. None where the id is that of no item.
        """

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
        if call is None:
            self._hear_stray(reply)
        elif call.answered:
            pass  # a second answer, while the first is completed
        elif reply.large or (reply.codec == "pickle" and not self._pickles.allows(call)):
            call.answered = True
            self._complete(reply, call, partial(self._finish, call))
        else:
            self._finish(call, reply)

    def _hear_stray(self, reply: Reply) -> None:
        then = None if self.stray is None else self.stray(reply.id)
        if then is None:  # cancelled, too late, a second answer after a take-over, or no reply to a call of ours
            if reply.large:
                self._bodies.drop(self._keys.reply_body(self._caller, reply.id))
        elif reply.large:
            self._complete(reply, None, then)
        else:
            then(reply)

    def _complete(self, reply: Reply, call: Call | None, then: _Then) -> None:
        task = asyncio.get_running_loop().create_task(self._check_and_fetch(reply, call, then))
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
            incoming = IncomingStream(
                part, call.backend, lambda: call.shown_id, WINDOW, partial(self._grant, call), call.cancel
            )
        try:
            incoming.take(part)
        except StreamBroken as e:
            self._in_flight.break_off(call, e)
            return
        if call.incoming is None:
            self._in_flight.stream(call, incoming)

    async def _check_and_fetch(self, reply: Reply, call: Call | None, then: _Then) -> None:
        key = self._keys.reply_body(self._caller, reply.id)
        if call is not None and reply.codec == "pickle":
            try:
                await self._pickles.check(call)
            except WireError as e:
                if reply.large:
                    self._bodies.drop(key)
                then(e)
                return
        if not reply.large:
            then(reply)
            return
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
            shown = shown_id("", reply.id) if call is None else call.shown_id
            then(WireError(f"the body of the reply to request {shown!r} has expired"))
            return
        reply.body, reply.large = body, False
        then(reply)
