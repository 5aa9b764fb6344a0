"""Requests from the parser to the request stream and back without a task: the fast way through `App`.

A task, its two steps and two ASGI messages are a third of what a small request costs a proxy. So what has arrived whole
with its head is sent from the parser's callback, and its answer is written by whoever brings the reply. All else takes
the ASGI way: bodies that are large or still to come, HEAD, ``Expect: 100-continue``, answers in parts, the metrics, and
whatever has middlewares.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from starlette.types import ASGIApp, Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from ..handles.calls import Outcome
from ..handles.incoming import Incoming
from .app import SCRAPED, App, Asked
from .protocol import JOINED_BYTES, Protocol
from .replies import Answer

_WHOLE_BYTES = 64 * 1024
"""A longer body takes the ASGI way, as uvicorn pauses reading for it."""


def protocol_for(app: ASGIApp) -> type[Protocol]:
    """Return what serves ``app`` best."""
    return Direct if type(app) is App else Protocol


class Direct(Protocol):
    """A connection whose application is an `App` without middlewares."""

    _undecided: RequestResponseCycle | None = None
    """Its head has been read, and its body may be complete by the end of this read."""
    _waiting: tuple[RequestResponseCycle, Asked] | None = None
    """Its outcome is awaited."""

    @property
    def _penstock(self) -> App:
        return cast("App", self.app)

    # -- uvicorn's protocol

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if self.transport.is_closing():
            return  # it came behind what was answered with the end of the connection
        if (
            app is not self.app
            or self.flow.write_paused
            or cycle.waiting_for_100_continue
            or cycle.scope["method"] == "HEAD"
        ):
            super()._start_asgi_task(cycle, app)
        elif cycle.more_body:
            self._undecided = cycle
        else:
            self._begin(cycle)  # it has waited behind another one of its connection

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if (cycle := self._undecided) is not None and not cycle.more_body:
            self._undecided = None
            self._begin(cycle)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if (cycle := self._undecided) is not None:
            self._undecided = None
            if not self.transport.is_closing():
                super()._start_asgi_task(cycle, cast(Any, self.app))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
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

    def _begin(self, cycle: RequestResponseCycle) -> None:
        app, body = self._penstock, bytes(cycle.body)
        if len(body) > min(_WHOLE_BYTES, app.max_body_bytes):
            super()._start_asgi_task(cycle, cast(Any, self.app))
            return
        asked = Asked(cast("Scope", cycle.scope))
        answer = app.route(asked)
        if answer is None:
            self._waiting = cycle, asked
            try:
                app.dispatch(asked, body, partial(self._on_outcome, cycle, asked), app.request_timeout_s)
                return
            except Exception as e:
                answer = app.answer(asked, e)
        elif answer is SCRAPED:
            super()._start_asgi_task(cycle, cast(Any, self.app))
            return
        self._write(cycle, asked, answer)

    def _on_outcome(self, cycle: RequestResponseCycle, asked: Asked, outcome: Outcome) -> None:
        if isinstance(outcome, Incoming):
            self._waiting = None
            super()._start_asgi_task(cycle, cast(Any, self._penstock.relaying(asked, outcome)))
            return
        self._write(cycle, asked, self._penstock.answer(asked, outcome))

    def _write(self, cycle: RequestResponseCycle, asked: Asked, answer: Answer) -> None:
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
        if len(body) > JOINED_BYTES:
            self._tcp.write(b"".join(lines))
            self._tcp.write(body)
        else:
            lines.append(body)
            self._tcp.write(b"".join(lines))
        cycle.response_started = cycle.response_complete = True
        self._penstock.done(asked)
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()
