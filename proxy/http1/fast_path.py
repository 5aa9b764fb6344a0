"""The fast path: requests from the parser to the request stream and back without an asyncio task.

A task, its two steps and two ASGI messages are a third of what a small request costs a proxy. So what arrives whole
with its head, or soon after, is sent from the parser's callback, and its answer is written by whoever brings the reply.
All else takes the ASGI way: bodies that are large or slow, HEAD, ``Expect: 100-continue``, answers in parts, the
metrics, and whatever has middlewares.
"""

from __future__ import annotations

import asyncio
import math
from functools import partial
from typing import Any, cast

from starlette.types import ASGIApp, Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from ...handles.calls.call import CallOutcome
from ...handles.calls.incoming_stream import IncomingStream
from ..app import SCRAPED, App, ProxiedRequest
from ..responses import HTTPResponse
from .protocol import Protocol

_WHOLE_BYTES = 256 * 1024
"""A longer body takes the ASGI way, which reads no more of it than somebody takes."""
_PATIENCE_S = 0.05
"""So does one that is not complete this soon after the read that brought its head: there it has a time limit."""


def _declared_bytes(cycle: RequestResponseCycle) -> float:
    """Return the length that a request's body is said to have; infinity if that is not said, or is no number."""
    for name, value in cycle.scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() and len(value) < 19 else math.inf
    return math.inf


class _NoEvent:
    """In place of an `asyncio.Event` while no task waits for more of a body: an event costs as much as a look-up."""

    def set(self) -> None:
        pass


_NO_EVENT = cast("asyncio.Event", _NoEvent())


def protocol_for(app: ASGIApp) -> type[Protocol]:
    """Return what serves ``app`` best."""
    return FastPath if type(app) is App else Protocol


class FastPath(Protocol):
    """A connection whose application is an `App` without middlewares."""

    _app_checks_framing = True
    _message_event = staticmethod(lambda: _NO_EVENT)
    _undecided: RequestResponseCycle | None = None
    """Its head has been read, and its body may soon be complete."""
    _pieces: list[bytes]
    """What there is of that."""
    _patience: asyncio.TimerHandle | None = None
    _waiting: tuple[RequestResponseCycle, ProxiedRequest] | None = None
    """Its outcome is awaited."""

    @property
    def _penstock(self) -> App:
        return cast("App", self.app)

    # -- uvicorn's protocol

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.waiting_for_100_continue or cycle.scope["method"] == "HEAD":
            cycle.message_event = asyncio.Event()
            super()._start_asgi_task(cycle, app)
        else:
            self._undecided, self._pieces = cycle, []

    def on_body(self, body: bytes) -> None:
        if self._undecided is None:
            super().on_body(body)
        else:
            self._has_progressed = True
            self._pieces.append(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if (cycle := self._undecided) is not None and not cycle.more_body:
            self._begin(cycle, self._decide())

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._undecided is not None:
            self._decide_soon()

    def _read(self) -> None:
        super()._read()
        if self._undecided is not None:
            self._decide_soon()

    def _decide_soon(self) -> None:
        if (cycle := self._undecided) is not None and self._patience is None:
            if self.transport.is_closing():
                self._decide()
            elif _declared_bytes(cycle) <= min(_WHOLE_BYTES, self._penstock.max_body_bytes):
                self._patience = self.loop.call_later(_PATIENCE_S, self._take_asgi_way)
            else:
                self._take_asgi_way()

    def _decide(self) -> bytes:
        """Return what has come of the undecided one's body."""
        self._undecided = None
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        pieces, self._pieces = self._pieces, []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _take_asgi_way(self) -> None:
        cycle = self._undecided
        assert cycle is not None
        body = self._decide()
        if not self.transport.is_closing():
            self._hand_over(cycle, body)

    def _hand_over(self, cycle: RequestResponseCycle, body: bytes) -> None:
        cycle.body = cast("bytearray", body)  # as in `Protocol.on_body`
        self._start_task(cycle, cast(Any, self.app))

    def _start_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:
        """Run ``app`` for a request whose body is in ``cycle``, as far as it has come."""
        cycle.message_event = asyncio.Event()
        cycle.message_event.set()
        super()._start_asgi_task(cycle, cast(Any, app))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if (cycle := self._undecided) is not None:
            self._decide()
            asked = ProxiedRequest(cast("Scope", cycle.scope))
            self._penstock.route(asked)
            self._penstock.done(asked)  # counted as one whose client hung up, as on the other way
        if self._waiting is not None:
            _, asked = self._waiting
            self._waiting = None
            self._penstock.withdraw(asked)
            self._penstock.done(asked)

    def give_up(self) -> None:
        """Answer at once what is still waited for."""
        if self._waiting is not None:
            cycle, asked = self._waiting
            self._penstock.withdraw(asked)
            self._write(cycle, asked, self._penstock.out_of_time())

    # -- one request

    def _begin(self, cycle: RequestResponseCycle, body: bytes) -> None:
        app = self._penstock
        if len(body) > min(_WHOLE_BYTES, app.max_body_bytes):
            self._hand_over(cycle, body)
            return
        asked = ProxiedRequest(cast("Scope", cycle.scope))
        answer = app.route(asked)
        if answer is None:
            self._waiting = cycle, asked
            try:
                app.dispatch(asked, body, partial(self._on_outcome, cycle, asked), app.request_timeout_s)
                return
            except Exception as e:
                answer = app.answer(asked, e)
        elif answer is SCRAPED:
            self._hand_over(cycle, body)
            return
        self._write(cycle, asked, answer)

    def _on_outcome(self, cycle: RequestResponseCycle, asked: ProxiedRequest, outcome: CallOutcome) -> None:
        if isinstance(outcome, IncomingStream):
            self._waiting = None
            self._start_task(cycle, self._penstock.relaying(asked, outcome))
            return
        self._write(cycle, asked, self._penstock.answer(asked, outcome))

    def _write(self, cycle: RequestResponseCycle, asked: ProxiedRequest, answer: HTTPResponse) -> None:
        self._waiting = None
        # Nothing of it needs a check: a backend's headers have passed `replies.response_headers`, the rest is ours.
        status, headers, body = self._penstock.render(asked, answer)
        if answer.close or self._penstock.draining:
            cycle.keep_alive = False
        elif not cycle.keep_alive:
            headers.append((b"connection", b"close"))
        lines = [STATUS_LINE[status]]
        for name, value in cycle.default_headers:
            lines += (name, b": ", value, b"\r\n")
        for name, value in headers:
            lines += (name, b": ", value, b"\r\n")
        lines.append(b"\r\n")
        self._writer.write_response(b"".join(lines), body)
        cycle.response_started = cycle.response_complete = True
        self._penstock.done(asked)
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()
