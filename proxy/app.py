"""The ASGI application: publishes each HTTP request and responds with its reply.

The application is plain ASGI, for speed: a routed request costs one coroutine besides the server's own, one `Header`,
one awaited future and two ASGI messages. Starlette's own application class is not involved.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from ..broker.queue.flow_control import WINDOW
from ..broker.registry.records import EndpointRecord, Snapshot
from ..broker.wire.path_params import PathParam
from ..broker.wire.replies import Reply
from ..broker.wire.requests import Header
from ..handles.calls.call import Call, CallOutcome
from ..handles.calls.incoming_stream import IncomingStream
from ..handles.calls.request_client import RequestClient
from ..handles.errors import PenstockError
from . import request_ids, response_streaming, responses, scopes
from .access_log import AccessLog
from .call_headers import carried_headers, header_text, public_method
from .http1 import framing
from .http1.buffers import Buffers, default_bytes
from .http1.disconnects import ClientDisconnected, DisconnectWatcher
from .options import DEFAULTS
from .pages.metrics import Metrics
from .pages.metrics_page import MetricsPage, ProxyIdentity
from .pages.submitted import KeptCall, SubmittedRequests
from .pages.system_pages import AWAITED, SystemPages
from .preferences import may_be_kept
from .request_body import has_body, read_body
from .responses import HTTPResponse, RawHeaders
from .routing import RESERVED, MethodNotAllowed, RouteMatch, Routes, mount_of

logger = logging.getLogger("penstock.proxy")

CLIENT_CLOSED_REQUEST = 499
"""Status in the metrics of a request whose client disconnected before the response. The number is nginx's."""

_COUNTED_REQUEST_BYTES = 4 * 1024
"""Bodies up to this size that arrive in one read are not reserved: a connection has one, no larger than its buffers."""

_COUNTED_REPLY_BYTES = 64 * 1024
"""Replies up to this size are not added to `Buffers.replies_bytes`: usually the kernel takes them at once."""

_CLOSE = (b"connection", b"close")

HeaderDict = dict[bytes, bytes]


class ProxiedRequest:
    """One HTTP request, from its head to the end of its response."""

    __slots__ = (
        "call",
        "endpoint",
        "headers",
        "is_counted",
        "kept_by",
        "params",
        "request_id",
        "reserved_bytes",
        "scope",
        "started",
        "status",
    )

    def __init__(self, scope: Scope) -> None:
        self.started = time.perf_counter()
        self.scope = scope
        self.headers: HeaderDict = dict(scope["headers"])
        self.request_id = request_ids.request_id_of(self.headers)
        self.endpoint: EndpointRecord | None = None
        self.params: dict[str, PathParam] = {}
        self.call: Call | None = None
        self.kept_by = ""
        """The backend of a kept request, which has no call."""
        self.status = CLIENT_CLOSED_REQUEST
        """Status of the response; until there is one, that of a client that disconnected."""
        self.is_counted = False
        self.reserved_bytes = 0
        """Bytes of its body that are reserved in `App.buffers`."""


class App:
    """Serves the endpoints of one instance over HTTP."""

    def __init__(
        self,
        caller: RequestClient,
        *,
        max_body_bytes: int = DEFAULTS.max_body_bytes,
        max_buffered_bytes: int | None = None,
        request_timeout_s: float = DEFAULTS.request_timeout_s,
        root_path: str = "",
        debug: bool = False,
        unready_after_s: float = DEFAULTS.unready_after_s,
        access_log: bool = DEFAULTS.access_log,
        identity: ProxyIdentity | None = None,
        has_admin_port: bool = False,
        ray_serve_metrics: bool = False,
    ) -> None:
        self._caller = caller
        self.max_body_bytes = max_body_bytes
        self.buffers = Buffers(default_bytes(max_body_bytes) if max_buffered_bytes is None else max_buffered_bytes)
        self.request_timeout_s = request_timeout_s
        self._root_path = root_path.rstrip("/")
        self._debug = debug
        self._access_log = AccessLog() if access_log else None
        self._disconnects = DisconnectWatcher()
        self._routes = Routes()
        self.metrics = Metrics()
        self._submitted = SubmittedRequests(
            caller,
            max_body_bytes=max_body_bytes,
            request_timeout_s=request_timeout_s,
            root_path=self._root_path,
            debug=debug,
        )
        self._pages = SystemPages(
            caller,
            self._submitted,
            MetricsPage(
                caller,
                self.metrics,
                lambda: self.buffers.requests_bytes + self.buffers.measure(),
                identity or ProxyIdentity(),
                with_ray_serve=ray_serve_metrics,
            ),
            has_admin_port=has_admin_port,
            unready_after_s=unready_after_s,
        )
        self.draining = False
        """While true, ``/-/readyz`` is 503 and every response closes its connection: clients move to other proxies."""
        self.apply(caller.snapshot)

    def apply(self, snapshot: Snapshot) -> None:
        """Route further requests by ``snapshot``."""
        self._routes = Routes(snapshot.endpoints.values(), self._routes)

    def close(self) -> None:
        """Stop watching for client disconnects."""
        self._disconnects.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _other_than_http(scope, receive, send)
            return
        request = ProxiedRequest(scope)
        try:
            response = self.route(request)
            if response is None:
                called = await self._call(request, receive)
                if isinstance(called, IncomingStream):
                    await self._relay(request, called, receive, send)
                    return
                response = called
            else:
                if response is AWAITED:
                    response = await self._awaited_page(request, receive)
                if has_body(request.headers):
                    response = response._replace(close=True)  # rather than read and drop the rest of the body
            status, headers, body = self.render(request, response)
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        except ClientDisconnected:
            pass
        finally:
            self.finish(request)

    def relay_app(self, request: ProxiedRequest, incoming: IncomingStream) -> ASGIApp:
        """Return an ASGI application that sends a streamed reply as the response and then calls `finish`."""

        async def relay(_: Scope, receive: Receive, send: Send) -> None:
            try:
                await self._relay(request, incoming, receive, send)
            except ClientDisconnected:
                pass
            finally:
                self.finish(request)

        return relay

    async def _relay(self, request: ProxiedRequest, incoming: IncomingStream, receive: Receive, send: Send) -> None:
        try:
            response = response_streaming.head(incoming, debug=self._debug)
            status, headers = self.render_head(request, response)
            if status == 200 and request.scope["http_version"] == "1.0" and response.head_length is None:
                # HTTP/1.0 has no chunked coding: collect the body, to send its length or an error instead.
                response = await response_streaming.gather(
                    incoming, response, limit=self.max_body_bytes, debug=self._debug
                )
            if response.body or request.scope["method"] == "HEAD" or status in (204, 304):
                status, headers, body = self.render(request, response)
                await send({"type": "http.response.start", "status": status, "headers": headers})
                await send({"type": "http.response.body", "body": body})
            else:
                await response_streaming.send_on(incoming, status, headers, receive, send)
        finally:
            incoming.close()

    # The steps of a request, in the order in which `__call__` or `http1.fast_path.FastPath` calls them.

    def route(self, request: ProxiedRequest) -> HTTPResponse | None:
        """Find the endpoint of a request and return None; if there is none to call, return the response instead.

        `AWAITED` means a system page whose response has to be awaited.
        """
        scope, headers = request.scope, request.headers
        path = self._route_path(scope["path"])
        # Three look-ups decide that a usual request needs no further check of its framing.
        is_unusual = (
            len(headers) != len(scope["headers"])
            or headers.get(b"host") not in framing.valid_hosts
            or b"transfer-encoding" in headers
        )
        if is_unusual and (refusal := framing.refusal(scope["headers"], scope.get("http_version", ""))) is not None:
            return responses.of_status(*refusal)._replace(close=True)
        if path.startswith(RESERVED):
            return self._pages.page(scope["method"], path, self._routes, draining=self.draining)
        self.metrics.in_flight += 1
        request.is_counted = True
        found = self._routes.match(scope["method"], path)
        if isinstance(found, RouteMatch):
            request.endpoint, request.params = found
            return None
        if isinstance(found, MethodNotAllowed):
            return responses.not_allowed(scope["method"], path, found.allowed)
        if found.redirect is not None:
            return responses.redirect(self._root_path + found.redirect, scope["query_string"])
        return responses.of_status(404, f"no endpoint has a route for {path!r}")

    def dispatch(
        self, request: ProxiedRequest, body: bytes, then: Callable[[CallOutcome], None], timeout_s: float
    ) -> None:
        """Publish a request for its endpoint's backend and call ``then`` with the outcome, unless `withdraw` is first.

        Args:
            request: the request, which `route` gave an endpoint.
            body: its whole body.
            then: receives the reply, the streamed reply or the exception; called at most once.
            timeout_s: seconds until the request expires.

        Raises:
            PenstockError: the request cannot be published. `response_to` turns this, as any exception, into a response.
        """
        endpoint = request.endpoint
        assert endpoint is not None
        unreserved = len(body) - request.reserved_bytes  # `read_body` has reserved every byte that it read
        if unreserved > _COUNTED_REQUEST_BYTES or self.buffers.may_be_full():
            self._reserve(request, unreserved)
        shard_key = request.headers.get(b"x-serve-shard-key")
        request.call = self._caller.dispatch(
            endpoint,
            self._header(request, endpoint),
            body,
            then,
            shard_key=None if shard_key is None else header_text(shard_key),
            timeout_s=timeout_s,
        )

    def _header(self, request: ProxiedRequest, endpoint: EndpointRecord) -> Header:
        scope, headers = request.scope, request.headers
        method_name = headers.get(b"x-serve-call-method")
        client = scope["client"]
        path = self._root_path + self._route_path(scope["path"])
        members = scopes.carried(scope, headers.get(b"host"), path, self._root_path)
        if request.params and (mount := mount_of(endpoint.route or "")):
            members = {**(members or {}), "mount": mount}
        # The codec keeps its default, that of HTTP, so that nothing a client sends is ever unpickled.
        return Header(
            endpoint=endpoint.name,
            method=scope["method"],
            path=path,
            path_params=request.params,
            query=scope["query_string"].decode("latin-1"),
            headers=carried_headers(scope, headers),
            call="__call__" if method_name is None else public_method(method_name),
            request_id=request.request_id.decode(),
            client=f"{client[0]}:{client[1]}" if client else "",
            window=WINDOW,
            scope=members,
        )

    def _reserve(self, request: ProxiedRequest, size: int) -> None:
        self.buffers.reserve(size)
        request.reserved_bytes += size

    def withdraw(self, request: ProxiedRequest) -> None:
        """Cancel the call of a request whose response cannot be delivered any more."""
        if request.call is not None:
            request.call.cancel()

    def response_to(self, request: ProxiedRequest, outcome: Reply | BaseException) -> HTTPResponse:
        """Return the response for an outcome, or for what `dispatch` raised."""
        if isinstance(outcome, Reply):
            return responses.of_reply(outcome, debug=self._debug)
        if isinstance(outcome, PenstockError):
            return responses.of_error(outcome, debug=self._debug)
        logger.error("request %s failed in the proxy", request.request_id.decode(), exc_info=outcome)
        return responses.of_status(500, f"the proxy failed with {type(outcome).__name__}; see its log")

    def shutdown_response(self) -> HTTPResponse:
        """Return the response to requests that are unfinished when the time to shut down is over."""
        return responses.of_status(503, "the proxy is shutting down", [(b"retry-after", b"1")])

    def render(self, request: ProxiedRequest, response: HTTPResponse) -> tuple[int, RawHeaders, bytes]:
        """Return status, headers and body of a whole response as they are sent."""
        status, headers, body, head_length, close = response
        request.status = status
        headers = [*headers, (request_ids.HEADER, request.request_id)]
        if status == 204 or status == 304:
            body = b""
        else:
            length = len(body)
            if request.scope["method"] == "HEAD":
                length, body = head_length or length, b""
            headers.append((b"content-length", b"%d" % length))
            if length > _COUNTED_REPLY_BYTES:
                self.buffers.replies_bytes += len(body)
        if self.draining or close:
            headers.append(_CLOSE)
        return status, headers, body

    def render_head(self, request: ProxiedRequest, response: HTTPResponse) -> tuple[int, RawHeaders]:
        """Return status and headers of a response whose body follows in parts."""
        request.status = response.status
        headers = [*response.headers, (request_ids.HEADER, request.request_id)]
        if response.head_length is not None:
            headers.append((b"content-length", b"%d" % response.head_length))
        if self.draining:
            headers.append(_CLOSE)
        return response.status, headers

    def finish(self, request: ProxiedRequest) -> None:
        """Record the end of a request: its metrics, its budget and its line of the access log.

        To be called once for each routed request.
        """
        if request.reserved_bytes:
            self.buffers.release(request.reserved_bytes)
            request.reserved_bytes = 0
        call = request.call
        request.call = None  # the call may refer to the request, and a cycle would wait for the garbage collector
        if request.is_counted:
            self.metrics.in_flight -= 1
            endpoint = "" if request.endpoint is None else request.endpoint.name
            took_s = time.perf_counter() - request.started
            self.metrics.of(endpoint).count(request.status, took_s)
            if self._access_log is not None:
                self._access_log.write(
                    request.scope["method"],
                    request.scope["path"],
                    request.status,
                    took_s,
                    request_id=request.request_id,
                    endpoint=request.endpoint,
                    backend=request.kept_by if call is None else call.backend,
                )

    def _route_path(self, path: str) -> str:
        # A proxy in front may strip the prefix or leave it.
        if self._root_path and (path + "/").startswith(self._root_path + "/"):
            return path[len(self._root_path) :] or "/"
        return path

    async def _call(self, request: ProxiedRequest, receive: Receive) -> HTTPResponse | IncomingStream:
        """Call the endpoint's backend and return its response, or a streamed reply as soon as it has begun.

        Raises:
            ClientDisconnected: the client disconnected; its request is cancelled.
        """
        body, timeout_s = b"", self.request_timeout_s
        if has_body(request.headers):
            began = time.perf_counter()
            try:
                body = await read_body(
                    receive,
                    request.headers,
                    limit=self.max_body_bytes,
                    timeout_s=timeout_s,
                    reserve=partial(self._reserve, request),
                    check=self.buffers.check,
                )
            except PenstockError as e:
                return self.response_to(request, e)._replace(close=True)
            timeout_s -= time.perf_counter() - began
        if may_be_kept(request.headers):
            kept = await self._call_kept(request, body, timeout_s, receive)
            if kept is not None:
                return kept
        watched = self._disconnects.watch(receive)
        try:
            self.dispatch(request, body, watched.resolve, timeout_s)
            outcome = await watched.outcome
        except asyncio.CancelledError:
            self.withdraw(request)
            if self.draining:  # the server's time to finish is over
                return self.shutdown_response()
            raise
        except Exception as e:
            outcome = e
        finally:
            self._disconnects.unwatch(watched)
        if type(outcome) is ClientDisconnected:
            self.withdraw(request)
            # A new exception: the traceback of the outcome would refer to this frame, and the frame to the outcome and
            # the body. This cycle would wait for the garbage collector: 16 clients that disconnected in the middle of
            # 10 MiB cost 150 MiB each time.
            raise ClientDisconnected
        return outcome if isinstance(outcome, IncomingStream) else self.response_to(request, outcome)

    async def _call_kept(
        self, request: ProxiedRequest, body: bytes, timeout_s: float, receive: Receive
    ) -> HTTPResponse | None:
        """Return the response to a request that is submitted or has an idempotency key; None if it is neither.

        Raises:
            ClientDisconnected: the client disconnected; its request goes on.
        """
        endpoint = request.endpoint
        assert endpoint is not None
        call: KeptCall | None = None
        try:
            if (call := KeptCall.of(request.scope["headers"])) is None:
                return None
            self._reserve(request, len(body) - request.reserved_bytes)
            shard_key = request.headers.get(b"x-serve-shard-key")
            responding = self._submitted.respond(
                call,
                endpoint,
                self._header(request, endpoint),
                body,
                shard_key=None if shard_key is None else header_text(shard_key),
                timeout_s=timeout_s,
            )
            return await self._until_disconnect(responding, receive)
        except ClientDisconnected:
            raise
        except Exception as e:
            return self.response_to(request, e)
        finally:
            request.kept_by = "" if call is None else call.backend

    async def _until_disconnect(self, response: Coroutine[Any, Any, HTTPResponse], receive: Receive) -> HTTPResponse:
        """Return the response, or cancel it when the client disconnects.

        Raises:
            ClientDisconnected: the client disconnected.
        """
        responding = asyncio.get_running_loop().create_task(response)
        watched = self._disconnects.watch(receive)
        try:
            either: list[asyncio.Future[Any]] = [responding, watched.outcome]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            responding.cancel()
            if self.draining:  # the server's time to finish is over
                return self.shutdown_response()
            raise
        finally:
            self._disconnects.unwatch(watched)
        if responding.done():
            return responding.result()
        responding.cancel()
        raise ClientDisconnected

    async def admin_page(self, scope: Scope) -> HTTPResponse:
        """Return the response to a request to the admin port."""
        method, path = scope["method"], scope["path"]
        page = self._pages.page(method, path, self._routes, draining=self.draining, is_admin=True)
        if page is AWAITED:
            return await self._pages.awaited_page(method, path, scope["headers"])
        return page

    @property
    def metrics_page(self) -> MetricsPage:
        """The page of the metrics, which also reports them to other proxies."""
        return self._pages.metrics_page

    async def _awaited_page(self, request: ProxiedRequest, receive: Receive) -> HTTPResponse:
        scope = request.scope
        page = self._pages.awaited_page(scope["method"], self._route_path(scope["path"]), scope["headers"])
        if has_body(request.headers):
            return await page  # `receive` gives the body here, not the disconnect
        return await self._until_disconnect(page, receive)


async def _other_than_http(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
    elif scope["type"] == "websocket":
        # To close a WebSocket before accepting it makes the server refuse the handshake with 403.
        await send({"type": "websocket.close", "code": 1000, "reason": "websockets are not served"})
    else:
        raise ValueError(f"cannot serve the ASGI scope {scope['type']!r}")
