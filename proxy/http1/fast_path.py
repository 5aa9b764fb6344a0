"""The fast path: requests from the parser to the request stream and back without an asyncio task.

A task, its two steps and two ASGI messages are a third of the proxy's cost of a small request. So a request that
arrives whole with its head, or soon after, is published from the parser's callback, and its response is written from
the callback of its reply. The ASGI path serves the others: large or slow bodies, HEAD, ``Expect: 100-continue``,
streamed replies, the metrics page, and every request if there are middlewares.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, cast

from starlette.types import ASGIApp, Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from ...handles.calls.call import CallOutcome
from ...handles.calls.incoming_stream import IncomingStream
from ..app import App, ProxiedRequest
from ..pages.system_pages import AWAITED
from ..preferences import may_be_kept
from ..responses import HTTPResponse
from .protocol import Protocol

_WHOLE_BYTES = 256 * 1024
"""A longer body takes the ASGI path, which has backpressure."""

_BODY_WAIT_S = 0.05
"""A body that is incomplete this long after its head takes the ASGI path as well, where it has a time limit."""


def _declared_bytes(cycle: RequestResponseCycle) -> float:
    """Return the declared length of a request's body, or infinity if none is declared or it is not a number."""
    for name, value in cycle.scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() and len(value) < 19 else math.inf
    return math.inf


class _NoEvent:
    """Stands for an `asyncio.Event` while no task waits for more of a body, because an event is costly to make."""

    def set(self) -> None:
        pass


def protocol_for(app: ASGIApp) -> type[Protocol]:
    """Return the class of connections that serves ``app`` fastest."""
    return FastPath if type(app) is App else Protocol


class FastPath(Protocol):
    """A connection to an `App` without middlewares."""

    _app_checks_framing = True
    _message_event = cast("Callable[[], asyncio.Event]", _NoEvent)
    _undecided: RequestResponseCycle | None = None
    """The request whose head is complete and whose path is not chosen yet: its body may soon be complete."""
    _pieces: list[bytes]
    """The pieces of its body that have arrived."""
    _body_timer: asyncio.TimerHandle | None = None
    _waiting: tuple[RequestResponseCycle, ProxiedRequest] | None = None
    """The request that awaits its outcome."""

    @cached_property
    def _application(self) -> App:
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
            self._serve(cycle, self._take_body())

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._undecided is not None:
            self._decide_or_wait()

    def _read(self) -> None:
        super()._read()
        if self._undecided is not None:
            self._decide_or_wait()

    def _decide_or_wait(self) -> None:
        if (cycle := self._undecided) is not None and self._body_timer is None:
            if self.transport.is_closing():
                self._take_body()
            elif _declared_bytes(cycle) <= min(_WHOLE_BYTES, self._application.max_body_bytes):
                self._body_timer = self.loop.call_later(_BODY_WAIT_S, self._choose_asgi_path)
            else:
                self._choose_asgi_path()

    def _take_body(self) -> bytes:
        """Return the pieces of the undecided request's body. From here on no request is undecided."""
        self._undecided = None
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
        pieces, self._pieces = self._pieces, []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _choose_asgi_path(self) -> None:
        cycle = self._undecided
        assert cycle is not None
        body = self._take_body()
        if not self.transport.is_closing():
            self._start_asgi_path(cycle, body)

    def _start_asgi_path(self, cycle: RequestResponseCycle, body: bytes) -> None:
        cycle.body = cast("bytearray", body)  # as in `Protocol.on_body`
        self._start_task(cycle, cast(Any, self.app))

    def _start_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:
        """Run ``app`` in a task. ``cycle`` has the part of the body that has arrived."""
        cycle.message_event = asyncio.Event()
        cycle.message_event.set()
        super()._start_asgi_task(cycle, cast(Any, app))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if (cycle := self._undecided) is not None:
            self._take_body()
            request = ProxiedRequest(cast("Scope", cycle.scope))
            self._application.route(request)
            self._application.finish(request)  # counted as a client disconnect, as on the ASGI path
        if self._waiting is not None:
            _, request = self._waiting
            self._waiting = None
            self._application.withdraw(request)
            self._application.finish(request)

    def give_up(self) -> None:
        """Respond with 503 to the request that awaits its outcome."""
        if self._waiting is not None:
            cycle, request = self._waiting
            self._application.withdraw(request)
            self._write(cycle, request, self._application.shutdown_response())

    # -- one request

    def _serve(self, cycle: RequestResponseCycle, body: bytes) -> None:
        app = self._application
        if len(body) > min(_WHOLE_BYTES, app.max_body_bytes):
            self._start_asgi_path(cycle, body)
            return
        request = ProxiedRequest(cast("Scope", cycle.scope))
        if may_be_kept(request.headers):
            self._start_asgi_path(cycle, body)
            return
        response = app.route(request)
        if response is None:
            self._waiting = cycle, request
            try:
                app.dispatch(request, body, partial(self._on_outcome, cycle, request), app.request_timeout_s)
                return
            except Exception as e:
                response = app.response_to(request, e)
        elif response is AWAITED:
            self._start_asgi_path(cycle, body)
            return
        self._write(cycle, request, response)

    def _on_outcome(self, cycle: RequestResponseCycle, request: ProxiedRequest, outcome: CallOutcome) -> None:
        if self._waiting is None or self._waiting[1] is not request:
            # `dispatch` raised after it had published the request. A second response would be taken for that to the
            # next request of the connection.
            if isinstance(outcome, IncomingStream):
                outcome.close()
            return
        if isinstance(outcome, IncomingStream):
            self._waiting = None
            self._start_task(cycle, self._application.relay_app(request, outcome))
            return
        self._write(cycle, request, self._application.response_to(request, outcome))

    def _write(self, cycle: RequestResponseCycle, request: ProxiedRequest, response: HTTPResponse) -> None:
        self._waiting, application = None, self._application
        # No header needs a check: those of a backend have passed `responses.response_headers`.
        status, headers, body = application.render(request, response)
        if response.close or application.draining:
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
        application.finish(request)
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()
