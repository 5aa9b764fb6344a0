"""The ASGI application: HTTP in, a call on the request stream, the reply out as HTTP.

It is raw ASGI, for speed: a request that matches costs one coroutine beside the server's own, one `Header`, one awaited
future and two messages. Nothing of Starlette's application runs unless middlewares are set.
"""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.types import Receive, Scope, Send

from ..broker.registry import EndpointRecord, Snapshot
from ..broker.wire import Header, PathParam, Reply
from ..handles.caller import Call, Caller
from ..handles.errors import ConfigError, PenstockError
from . import metrics, replies, request_ids
from .bodies import has_body, read_body
from .hangups import HangUps, HungUp
from .replies import Answer
from .routing import RESERVED, Found, MethodNotAllowed, Routes

logger = logging.getLogger("penstock.proxy")

CLIENT_CLOSED_REQUEST = 499
"""How the metrics count a request whose client hung up; nobody is left to read it. The number is nginx's."""

_HOP_BY_HOP = frozenset(name.encode() for name in replies.HOP_BY_HOP)
_USUAL_CONNECTION = (None, b"keep-alive", b"close")
_CLOSE = (b"connection", b"close")

RawNamed = dict[bytes, bytes]


class App:
    """Serves the endpoints of one instance over HTTP."""

    def __init__(
        self,
        caller: Caller,
        *,
        max_body_bytes: int = 64 * 1024 * 1024,
        request_timeout_s: float = 60.0,
        root_path: str = "",
        debug: bool = False,
    ) -> None:
        self._caller = caller
        self._max_body_bytes = max_body_bytes
        self._request_timeout_s = request_timeout_s
        self._root_path = root_path.rstrip("/")
        self._debug = debug
        self._hang_ups = HangUps()
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
        started = time.perf_counter()
        named: RawNamed = dict(scope["headers"])
        request_id = request_ids.request_id_of(named)
        path = self._route_path(scope["path"])
        if path.startswith(RESERVED):
            await self._send(send, self._about_itself(scope["method"], path), scope["method"], request_id)
            return

        self.metrics.in_flight += 1
        endpoint, status = "", CLIENT_CLOSED_REQUEST
        try:
            found = self._routes.match(scope["method"], path)
            if isinstance(found, Found):
                endpoint = found.endpoint.name
                answer = await self._call(*found, scope, receive, named, request_id.decode())
            elif isinstance(found, MethodNotAllowed):
                answer = _not_allowed(scope["method"], path, found.allowed)
            elif found.redirect is not None:
                answer = replies.redirect(self._root_path + found.redirect, scope["query_string"])
            else:
                answer = replies.of_status(404, f"no endpoint has a route for {path!r}")
            if not isinstance(found, Found) and has_body(named):
                answer = answer._replace(close=True)  # rather than read and drop whatever may still come
            status = answer.status
            await self._send(send, answer, scope["method"], request_id)
        except HungUp:
            pass
        finally:
            self.metrics.in_flight -= 1
            self.metrics.of(endpoint).count(status, time.perf_counter() - started)

    def _route_path(self, path: str) -> str:
        # Whoever stands before us may strip the prefix or leave it.
        if self._root_path and (path + "/").startswith(self._root_path + "/"):
            return path[len(self._root_path) :] or "/"
        return path

    async def _call(
        self,
        endpoint: EndpointRecord,
        params: dict[str, PathParam],
        scope: Scope,
        receive: Receive,
        named: RawNamed,
        request_id: str,
    ) -> Answer:
        """Call the endpoint's backend.

        Raises:
            HungUp: the client went away; its request is cancelled.
        """
        body, timeout_s = b"", self._request_timeout_s
        if has_body(named):
            began = time.perf_counter()
            try:
                body = await read_body(receive, named, limit=self._max_body_bytes, timeout_s=timeout_s)
            except PenstockError as e:
                return replies.of_error(e, debug=self._debug)._replace(close=True)
            timeout_s -= time.perf_counter() - began
        waiting = self._hang_ups.watch(receive)
        call: Call | None = None
        try:
            method_name = named.get(b"x-serve-call-method")
            client = scope["client"]
            shard_key = named.get(b"x-serve-shard-key")
            call = self._caller.dispatch(
                endpoint,
                # The codec stays as it is for HTTP, so that nothing a client sends is ever unpickled.
                Header(
                    endpoint=endpoint.name,
                    method=scope["method"],
                    path=self._root_path + self._route_path(scope["path"]),
                    path_params=params,
                    query=scope["query_string"].decode("latin-1"),
                    headers=_request_headers(scope, named),
                    call="__call__" if method_name is None else _public(method_name),
                    request_id=request_id,
                    client=f"{client[0]}:{client[1]}" if client else "",
                ),
                body,
                waiting.hear,
                shard_key=None if shard_key is None else _text(shard_key),
                timeout_s=timeout_s,
            )
            outcome = await waiting.outcome
            if type(outcome) is Reply:
                return replies.of_reply(outcome, debug=self._debug)
            assert isinstance(outcome, BaseException)
            raise outcome
        except PenstockError as e:
            return replies.of_error(e, debug=self._debug)
        except (HungUp, asyncio.CancelledError) as e:
            if call is not None:
                call.cancel()
            if self.draining and isinstance(e, asyncio.CancelledError):  # the server's time to finish is over
                return replies.of_status(503, "the proxy is shutting down", [(b"retry-after", b"1")])
            raise
        except Exception as e:
            logger.exception("request %s to %s failed in the proxy", request_id, endpoint.name)
            return replies.of_status(500, f"the proxy failed with {type(e).__name__}; its log says more")
        finally:
            self._hang_ups.forget(waiting)

    def _about_itself(self, method: str, path: str) -> Answer:
        name = path[len(RESERVED) :]
        if name not in ("routes", "healthz", "metrics"):
            return replies.of_status(404, f"there is no {path!r}")
        if method not in ("GET", "HEAD"):
            return _not_allowed(method, path, ("GET", "HEAD"))
        if name == "routes":
            return replies.of_json(self._routes.listing())
        if name == "metrics":
            return replies.of_text(self.metrics.render(), content_type=metrics.CONTENT_TYPE)
        if self.draining:
            return replies.of_text("draining", 503)
        if not self._caller.connected:
            return replies.of_text("no broker", 503)
        return replies.of_text("ok")

    async def _send(self, send: Send, answer: Answer, method: str, request_id: bytes) -> None:
        status, headers, body, head_length, close = answer
        headers = [*headers, (request_ids.HEADER, request_id)]
        if status == 204 or status == 304:
            body = b""
        else:
            length = len(body)
            if method == "HEAD":
                length, body = head_length or length, b""
            headers.append((b"content-length", b"%d" % length))
        if self.draining or close:
            headers.append(_CLOSE)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


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


def _not_allowed(method: str, path: str, allowed: tuple[str, ...]) -> Answer:
    listed = ", ".join(allowed)
    message = f"{path!r} takes {listed}, not {method}"
    return replies.of_status(405, message, [(b"allow", listed.encode())])


def _request_headers(scope: Scope, named: RawNamed) -> list[tuple[str, str]]:
    dropped = _HOP_BY_HOP
    connection = named.get(b"connection")
    if connection not in _USUAL_CONNECTION:
        dropped |= {token.strip().lower() for token in (connection or b"").split(b",")}
    pairs: list[tuple[bytes, bytes]] = scope["headers"]
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
