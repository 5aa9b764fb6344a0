"""Reply receiver: matches the entries of the reply stream to the calls in flight."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Union

from ...broker.queue.flow_control import WINDOW
from ...broker.wire.call_ids import shown_id
from ...broker.wire.replies import PART_VERSION, Part, Reply
from ..errors import BrokerRefused, BrokerUnavailable, NotPermitted, StreamBroken, WireError
from .call import Call, CallsInFlight
from .incoming_stream import IncomingStream
from .large_bodies import LargeBodies
from .pickle_policy import PicklePolicy

log = logging.getLogger(__name__)

OnReply = Callable[[Union[Reply, BaseException]], None]  # noqa: UP007 - it is evaluated, also on Python 3.10
"""Called with a reply whose body is complete, or with the reason why it cannot be read."""

FindReceiver = Callable[[str], Union[OnReply, None]]  # noqa: UP007 - it is evaluated, also on Python 3.10
"""Returns the receiver of a reply to a call that is not in flight, by the call's id, or None."""


def no_receiver(call_id: str) -> OnReply | None:
    """Ignore replies to calls that are not in flight."""
    return None


class ReplyReceiver:
    """Ends the calls of one client when their replies arrive. Only for the client's event loop."""

    def __init__(
        self,
        in_flight: CallsInFlight,
        bodies: LargeBodies,
        pickles: PicklePolicy,
        shown_url: str,
        send_credit: Callable[[Call, int], None],
        *,
        find_receiver: FindReceiver = no_receiver,
        keep_bodies: bool = False,
    ) -> None:
        """Create the receiver for the calls ``in_flight``.

        Args:
            in_flight: the calls.
            bodies: fetches the bodies of large replies.
            pickles: decides whether pickled replies are let through.
            shown_url: URL of the broker for error messages.
            send_credit: reports to a replica how many bytes of its streamed reply have been read.
            find_receiver: finds the receiver of a reply to a call that is not in flight. A batch job has those, to
                items that an earlier producer published.
            keep_bodies: do not delete the bodies of large replies: the next producer of a job may need them.
        """
        self._in_flight, self._bodies, self._pickles = in_flight, bodies, pickles
        self._shown_url, self._send_credit = shown_url, send_credit
        self._find_receiver, self._keep_bodies = find_receiver, keep_bodies
        self._fetches: set[asyncio.Task[None]] = set()

    async def drain(self) -> None:
        """Return once all replies that have arrived are passed on, including those whose bodies are being fetched."""
        if self._fetches:
            await asyncio.wait(self._fetches)

    def close(self) -> None:
        """Stop fetching bodies."""
        for fetch in self._fetches:
            fetch.cancel()

    def on_entry(self, fields: list[bytes]) -> None:
        """Process an entry of the reply stream: replies, or a part of one."""
        if fields[1] == PART_VERSION:
            self._on_part(fields)
            return
        try:
            replies = Reply.all_of(fields)
        except WireError as e:
            log.error("dropped a reply that cannot be read: %s", e)
            for id_ in Reply.ids_of(fields):
                if (call := self._in_flight.by_id.get(id_)) is not None:
                    self._in_flight.finish(call, e)
            return
        for reply in replies:
            self._on_reply(reply)

    def _on_reply(self, reply: Reply) -> None:
        call = self._in_flight.by_id.get(reply.id)
        if call is None:
            self._on_unexpected(reply)
        elif call.has_reply:
            pass  # a second reply, while the body of the first is being fetched
        elif reply.large or (reply.codec == "pickle" and not self._pickles.allows(call)):
            call.has_reply = True
            self._complete_in_background(reply, call, partial(self._in_flight.finish, call))
        else:
            self._in_flight.finish(call, reply)

    def _on_unexpected(self, reply: Reply) -> None:
        """Process a reply to a call that is not in flight.

        It is an item's of an earlier producer, comes after a cancellation or a timeout, is the second one after a
        redelivery, or was forged.
        """
        on_reply = self._find_receiver(reply.id)
        if on_reply is None:
            if reply.large:
                self._bodies.drop_reply_body(reply.id)
        elif reply.large:
            self._complete_in_background(reply, None, on_reply)
        else:
            on_reply(reply)

    def _complete_in_background(self, reply: Reply, call: Call | None, on_reply: OnReply) -> None:
        task = self._in_flight.loop.create_task(self._complete(reply, call, on_reply))
        self._fetches.add(task)
        task.add_done_callback(self._fetches.discard)

    async def _complete(self, reply: Reply, call: Call | None, on_reply: OnReply) -> None:
        """Check that a pickled reply may be read, and fetch the body of a large one."""
        if call is not None and reply.codec == "pickle":
            try:
                await self._pickles.check(call)
            except WireError as e:
                if reply.large:
                    self._bodies.drop_reply_body(reply.id)
                on_reply(e)
                return
        if not reply.large:
            on_reply(reply)
            return
        try:
            body = await self._bodies.fetch_reply_body(reply.id)
        except NotPermitted as e:
            on_reply(e)
            return
        except (BrokerUnavailable, BrokerRefused) as e:
            on_reply(BrokerUnavailable(self._shown_url, f"cannot fetch the body of a reply: {e}"))
            return
        if not self._keep_bodies:
            self._bodies.drop_reply_body(reply.id)
        if body is None:
            shown = shown_id("", reply.id) if call is None else call.shown_id
            on_reply(WireError(f"the body of the reply to request {shown!r} has expired"))
            return
        reply.body, reply.large = body, False
        on_reply(reply)

    def _on_part(self, fields: list[bytes]) -> None:
        try:
            part = Part.of(fields)
        except WireError as e:
            log.error("dropped a part of a streamed reply that cannot be read: %s", e)
            for id_ in Reply.ids_of(fields):
                if (call := self._in_flight.by_id.get(id_)) is not None:
                    self._in_flight.abort(call, e)
            return
        call = self._in_flight.by_id.get(part.id)
        if call is None:
            return  # cancelled or aborted
        incoming = call.incoming
        if incoming is None:
            incoming = IncomingStream(
                part, call.backend, lambda: call.shown_id, WINDOW, partial(self._send_credit, call), call.cancel
            )
        try:
            incoming.add(part)
        except StreamBroken as e:
            self._in_flight.abort(call, e)
            return
        if call.incoming is None:
            self._in_flight.begin_stream(call, incoming)
