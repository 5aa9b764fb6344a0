"""The ASGI application: publishes each HTTP request and answers with its reply.

It is raw ASGI, for speed: a request that matches costs one coroutine beside the server's own, one `Header`, one awaited
future and two messages. Nothing of Starlette's application runs unless middlewares are set.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial

from starlette.types import ASGIApp, Receive, Scope, Send

from ..broker.errors import BrokerRefused, BrokerUnavailable
from ..broker.queue.flow_control import WINDOW
from ..broker.queue.stats import BackendStats
from ..broker.registry.records import EndpointRecord, Snapshot
from ..broker.wire.path_params import PathParam
from ..broker.wire.replies import Reply
from ..broker.wire.requests import Header
from ..handles.calls.call import Call, CallOutcome
from ..handles.calls.incoming_stream import IncomingStream
from ..handles.calls.request_client import RequestClient
from ..handles.errors import ConfigError, PenstockError
from . import metrics, request_ids, response_streaming, responses, scopes
from .disconnects import ClientDisconnected, DisconnectWatcher
from .http1 import framing
from .http1.buffers import Buffers, default_bytes
from .request_body import has_body, read_body
from .responses import HTTPResponse, RawHeaders
from .routing import RESERVED, MethodNotAllowed, RouteMatch, Routes

logger = logging.getLogger("penstock.proxy")

CLIENT_CLOSED_REQUEST = 499
"""How the metrics count a request whose client hung up; nobody is left to read it. The number is nginx's."""

SCRAPED = HTTPResponse(200, [])
"""In place of the metrics, which are read from the broker while their client waits."""
_SCRAPE_S = 2.0
_COUNTED_BYTES = 64 * 1024
"""A shorter reply is not counted as one that its client may not read: the kernel takes it, or the sweep will see it."""

_HOP_BY_HOP = frozenset(name.encode() for name in responses.HOP_BY_HOP)
_USUAL_CONNECTION = (None, b"keep-alive", b"close")
_CLOSE = (b"connection", b"close")

RawNamed = dict[bytes, bytes]


class ProxiedRequest:
    """One request, from its head to its answer."""

    __slots__ = (
        "call",
        "endpoint",
        "held_bytes",
        "is_counted",
        "named",
        "params",
        "request_id",
        "scope",
        "started",
        "status",
    )

    def __init__(self, scope: Scope) -> None:
        self.started = time.perf_counter()
        self.scope = scope
        self.named: RawNamed = dict(scope["headers"])
        self.request_id = request_ids.request_id_of(self.named)
        self.endpoint: EndpointRecord | None = None
        self.params: dict[str, PathParam] = {}
        self.call: Call | None = None
        self.status = CLIENT_CLOSED_REQUEST
        """Of its answer, once there is one."""
        self.is_counted = False
        self.held_bytes = 0
        """Of its body, in the proxy's budget."""


class App:
    """Serves the endpoints of one instance over HTTP."""

    def __init__(
        self,
        caller: RequestClient,
        *,
        max_body_bytes: int = 64 * 1024 * 1024,
        max_buffered_bytes: int | None = None,
        request_timeout_s: float = 60.0,
        root_path: str = "",
        debug: bool = False,
    ) -> None:
        self._caller = caller
        self.max_body_bytes = max_body_bytes
        self.buffers = Buffers(default_bytes(max_body_bytes) if max_buffered_bytes is None else max_buffered_bytes)
        self.request_timeout_s = request_timeout_s
        self._root_path = root_path.rstrip("/")
        self._debug = debug
        self._hang_ups = DisconnectWatcher()
        self._routes = Routes()
        self.metrics = metrics.Metrics()
        self.draining = False
        """Set, ``/-/healthz`` says so, and every answer asks its client to connect anew: to another proxy."""
        self.apply(caller.snapshot)

    def apply(self, snapshot: Snapshot) -> None:
        """Route by ``snapshot`` from now on."""
        self._routes = Routes(snapshot.endpoints.values())

    def close(self) -> None:
        self._hang_ups.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _other_than_http(scope, receive, send)
            return
        asked = ProxiedRequest(scope)
        try:
            answer = self.route(asked)
            if answer is None:
                called = await self._call(asked, receive)
                if isinstance(called, IncomingStream):
                    await self._relay(asked, called, receive, send)
                    return
                answer = called
            else:
                if answer is SCRAPED:
                    answer = await self._scraped()
                if has_body(asked.named):
                    answer = answer._replace(close=True)  # rather than read and drop whatever may still come
            status, headers, body = self.render(asked, answer)
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        except ClientDisconnected:
            pass
        finally:
            self.done(asked)

    def relaying(self, asked: ProxiedRequest, incoming: IncomingStream) -> ASGIApp:
        """Return what sends an answer that has begun to come in parts, and does what is to be `done` at its end."""

        async def relay(_: Scope, receive: Receive, send: Send) -> None:
            try:
                await self._relay(asked, incoming, receive, send)
            except ClientDisconnected:
                pass
            finally:
                self.done(asked)

        return relay

    async def _relay(self, asked: ProxiedRequest, incoming: IncomingStream, receive: Receive, send: Send) -> None:
        try:
            answer = response_streaming.head(incoming, debug=self._debug)
            status, headers = self.render_head(asked, answer)
            if status == 200 and asked.scope["http_version"] == "1.0" and answer.head_length is None:
                # Its client knows of no chunks: it is told the length, or that there was an error.
                answer = await response_streaming.gather(incoming, answer, limit=self.max_body_bytes, debug=self._debug)
            if answer.body or asked.scope["method"] == "HEAD" or status in (204, 304):
                status, headers, body = self.render(asked, answer)
                await send({"type": "http.response.start", "status": status, "headers": headers})
                await send({"type": "http.response.body", "body": body})
            else:
                await response_streaming.send_on(incoming, status, headers, receive, send)
        finally:
            incoming.close()

    # The steps of a request. They are called in this order by whoever serves it: `__call__`, or `direct.Direct`.

    def route(self, asked: ProxiedRequest) -> HTTPResponse | None:
        """Find the endpoint; return the answer if there is none to call, or `SCRAPED`."""
        scope, named = asked.scope, asked.named
        path = self._route_path(scope["path"])
        # Usual requests pass by this at the cost of three look-ups.
        is_odd = (
            len(named) != len(scope["headers"])
            or named.get(b"host") not in framing.valid_hosts
            or b"transfer-encoding" in named
        )
        if is_odd and (refusal := framing.refusal(scope["headers"], scope.get("http_version", ""))) is not None:
            return responses.of_status(*refusal)._replace(close=True)
        if path.startswith(RESERVED):
            return self._about_itself(scope["method"], path)
        self.metrics.in_flight += 1
        asked.is_counted = True
        found = self._routes.match(scope["method"], path)
        if isinstance(found, RouteMatch):
            asked.endpoint, asked.params = found
            return None
        if isinstance(found, MethodNotAllowed):
            return _not_allowed(scope["method"], path, found.allowed)
        if found.redirect is not None:
            return responses.redirect(self._root_path + found.redirect, scope["query_string"])
        return responses.of_status(404, f"no endpoint has a route for {path!r}")

    def dispatch(
        self, asked: ProxiedRequest, body: bytes, then: Callable[[CallOutcome], None], timeout_s: float
    ) -> None:
        """Send it to its endpoint's backend; ``then`` hears the outcome, unless `withdraw` comes first.

        Raises:
            PenstockError: it cannot be sent. `answer` says what its client gets to see, also of any other exception.
        """
        scope, named, endpoint = asked.scope, asked.named, asked.endpoint
        assert endpoint is not None
        self._hold(asked, len(body) - asked.held_bytes)  # what `read_body` has counted is held already
        method_name = named.get(b"x-serve-call-method")
        client = scope["client"]
        shard_key = named.get(b"x-serve-shard-key")
        path = self._root_path + self._route_path(scope["path"])
        asked.call = self._caller.dispatch(
            endpoint,
            # The codec stays as it is for HTTP, so that nothing a client sends is ever unpickled.
            Header(
                endpoint=endpoint.name,
                method=scope["method"],
                path=path,
                path_params=asked.params,
                query=scope["query_string"].decode("latin-1"),
                headers=_request_headers(scope, named),
                call="__call__" if method_name is None else _public(method_name),
                request_id=asked.request_id.decode(),
                client=f"{client[0]}:{client[1]}" if client else "",
                window=WINDOW,
                scope=scopes.carried(scope, named.get(b"host"), path, self._root_path),
            ),
            body,
            then,
            shard_key=None if shard_key is None else _text(shard_key),
            timeout_s=timeout_s,
        )

    def _hold(self, asked: ProxiedRequest, size: int) -> None:
        self.buffers.hold(size)
        asked.held_bytes += size

    def withdraw(self, asked: ProxiedRequest) -> None:
        """Nobody waits for the outcome any more."""
        if asked.call is not None:
            asked.call.cancel()

    def answer(self, asked: ProxiedRequest, outcome: Reply | BaseException) -> HTTPResponse:
        """Return what the client gets to see of an outcome, or of what `dispatch` raised."""
        if isinstance(outcome, Reply):
            return responses.of_reply(outcome, debug=self._debug)
        if isinstance(outcome, PenstockError):
            return responses.of_error(outcome, debug=self._debug)
        logger.error("request %s failed in the proxy", asked.request_id.decode(), exc_info=outcome)
        return responses.of_status(500, f"the proxy failed with {type(outcome).__name__}; its log says more")

    def out_of_time(self) -> HTTPResponse:
        """Return the answer to what is unfinished when the time to shut down is over."""
        return responses.of_status(503, "the proxy is shutting down", [(b"retry-after", b"1")])

    def render(self, asked: ProxiedRequest, answer: HTTPResponse) -> tuple[int, RawHeaders, bytes]:
        """Return status, headers and body as they are sent."""
        status, headers, body, head_length, close = answer
        asked.status = status
        headers = [*headers, (request_ids.HEADER, asked.request_id)]
        if status == 204 or status == 304:
            body = b""
        else:
            length = len(body)
            if asked.scope["method"] == "HEAD":
                length, body = head_length or length, b""
            headers.append((b"content-length", b"%d" % length))
            if length > _COUNTED_BYTES:
                self.buffers.replies_bytes += len(body)
        if self.draining or close:
            headers.append(_CLOSE)
        return status, headers, body

    def render_head(self, asked: ProxiedRequest, answer: HTTPResponse) -> tuple[int, RawHeaders]:
        """Return status and headers of an answer whose body is still to come."""
        asked.status = answer.status
        headers = [*answer.headers, (request_ids.HEADER, asked.request_id)]
        if answer.head_length is not None:
            headers.append((b"content-length", b"%d" % answer.head_length))
        if self.draining:
            headers.append(_CLOSE)
        return answer.status, headers

    def done(self, asked: ProxiedRequest) -> None:
        """Count it. To be called once for everything that was routed, whatever became of it."""
        if asked.held_bytes:
            self.buffers.release(asked.held_bytes)
            asked.held_bytes = 0
        asked.call = None  # it may lead back to us, and what leads in circles waits for the garbage collector
        if asked.is_counted:
            self.metrics.in_flight -= 1
            endpoint = "" if asked.endpoint is None else asked.endpoint.name
            self.metrics.of(endpoint).count(asked.status, time.perf_counter() - asked.started)

    def _route_path(self, path: str) -> str:
        # Whoever stands before us may strip the prefix or leave it.
        if self._root_path and (path + "/").startswith(self._root_path + "/"):
            return path[len(self._root_path) :] or "/"
        return path

    async def _call(self, asked: ProxiedRequest, receive: Receive) -> HTTPResponse | IncomingStream:
        """Call the endpoint's backend. An answer in parts is returned when it has begun.

        Raises:
            HungUp: the client went away; its request is cancelled.
        """
        body, timeout_s = b"", self.request_timeout_s
        if has_body(asked.named):
            began = time.perf_counter()
            try:
                body = await read_body(
                    receive,
                    asked.named,
                    limit=self.max_body_bytes,
                    timeout_s=timeout_s,
                    hold=partial(self._hold, asked),
                    check=self.buffers.check,
                )
            except PenstockError as e:
                return self.answer(asked, e)._replace(close=True)
            timeout_s -= time.perf_counter() - began
        waiting = self._hang_ups.watch(receive)
        try:
            self.dispatch(asked, body, waiting.hear, timeout_s)
            outcome = await waiting.outcome
        except asyncio.CancelledError:
            self.withdraw(asked)
            if self.draining:  # the server's time to finish is over
                return self.out_of_time()
            raise
        except Exception as e:
            outcome = e
        finally:
            self._hang_ups.forget(waiting)
        if type(outcome) is ClientDisconnected:
            self.withdraw(asked)
            # A new one: its traceback leads to this frame, and that to the outcome and the body. So they would wait for
            # the garbage collector: 16 clients that left with 10 MiB under way cost 150 MiB each time.
            raise ClientDisconnected
        return outcome if isinstance(outcome, IncomingStream) else self.answer(asked, outcome)

    def _about_itself(self, method: str, path: str) -> HTTPResponse:
        name = path[len(RESERVED) :]
        if name not in ("routes", "healthz", "metrics"):
            return responses.of_status(404, f"there is no {path!r}")
        if method not in ("GET", "HEAD"):
            return _not_allowed(method, path, ("GET", "HEAD"))
        if name == "routes":
            return responses.of_json(self._routes.listing())
        if name == "metrics":
            return SCRAPED
        if self.draining:
            return responses.of_text("draining", 503)
        if not self._caller.connected:
            return responses.of_text("no broker", 503)
        if not self._caller.takes_writes:
            return responses.of_text("the broker refuses writes", 503)
        return responses.of_text("ok")

    async def _scraped(self) -> HTTPResponse:
        backend_stats: Mapping[str, BackendStats] | None = None
        try:
            backend_stats = await asyncio.wait_for(self._caller.backend_stats(), _SCRAPE_S)
        except (BrokerUnavailable, BrokerRefused, asyncio.TimeoutError) as e:
            # What we counted ourselves is worth telling, above all now.
            logger.warning("the metrics are without those of the backends: %s", str(e) or "the broker does not answer")
        return responses.of_text(
            self.metrics.render(self._caller.shadows.copies, backend_stats), content_type=metrics.CONTENT_TYPE
        )


async def _other_than_http(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
    elif scope["type"] == "websocket":
        # Closed before it is accepted: the server answers the handshake with 403.
        await send({"type": "websocket.close", "code": 1000, "reason": "websockets are not served"})
    else:
        raise ValueError(f"cannot serve the ASGI scope {scope['type']!r}")


def _not_allowed(method: str, path: str, allowed: tuple[str, ...]) -> HTTPResponse:
    listed = ", ".join(allowed)
    message = f"{path!r} takes {listed}, not {method}"
    return responses.of_status(405, message, [(b"allow", listed.encode())])


def _request_headers(scope: Scope, named: RawNamed) -> list[tuple[str, str]]:
    dropped = _HOP_BY_HOP
    pairs: list[tuple[bytes, bytes]] = scope["headers"]
    if named.get(b"connection") not in _USUAL_CONNECTION or len(named) != len(pairs):  # there may be several
        for name, value in pairs:
            if name == b"connection":
                dropped |= {token.strip().lower() for token in value.split(b",")}
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in pairs if name not in dropped]


def _public(name: bytes) -> str:
    text = _text(name)
    if text == "__call__" or (text.isidentifier() and not text.startswith("_")):
        return text
    raise ConfigError(f"x-serve-call-method {text!r} is not the name of a public method")


def _text(raw: bytes) -> str:
    """Read a header that a Python caller would have given as a string."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")
