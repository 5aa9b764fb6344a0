"""Starlette middlewares that a user places around the application.

A body that broke off never looks complete, whatever the middlewares do. Several of Starlette's own middlewares end
the body that they send as soon as the body that they read ends, for any reason: the client would see a proper last
chunk, or the valid end of a compressed stream. So each application of the stack is watched, and the end of the outer
body is withheld if a body inside it broke off.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..handles.errors import PenstockError
from ..handles.log_context import NamedWork, work_on
from . import request_ids, responses
from .response_streaming import CutOff
from .responses import HTTPResponse

logger = logging.getLogger("penstock.proxy")

_RESPONSE = "penstock.response"
"""Key of the ASGI scope for its `_Response`."""


class _Response:
    """One response as it passes through the middlewares."""

    broken_by: Exception | None = None
    """Why a body inside it ended before it was complete; None while none did."""


def wrap(app: ASGIApp, middlewares: Sequence[Middleware]) -> ASGIApp:
    """Return ``app`` inside ``middlewares``, the first of them outermost; ``app`` itself if there are none."""
    if not middlewares:
        return app
    for cls, args, kwargs in reversed(middlewares):
        app = cls(_Watched(app), *args, **kwargs)
    return _Outermost(_Watched(app))


class _Watched:
    """Wraps an application so that its body ends properly only if every body inside it does."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response: _Response | None = scope.get(_RESPONSE)
        if response is None:  # not HTTP, or a new scope made by a middleware
            await self._app(scope, receive, send)
            return
        response.broken_by = None  # a middleware may call the application again
        started = complete = withheld = False

        async def watched(message: Message) -> None:
            nonlocal started, complete, withheld
            if message["type"] == "http.response.start":
                started = True
                if message["status"] >= 500:
                    response.broken_by = None  # a middleware responds with an error instead
                withheld = response.broken_by is not None
            elif _ends_body(message):
                withheld = withheld or response.broken_by is not None
                complete = not withheld
            if not withheld:
                await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as e:
            if started and not complete and response.broken_by is None:
                response.broken_by = e
            raise
        if started and not complete and response.broken_by is None:
            response.broken_by = CutOff(PenstockError("the response ended before its body was complete"))


class _Outermost:
    """Adds to responses of middlewares what `App` adds to its own: a request id, and an error for an exception."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_ids.request_id_of(dict(scope["headers"]))
        work_on([NamedWork(request_id.decode())])
        id_header = (request_ids.HEADER, request_id)
        kept = [pair for pair in scope["headers"] if pair[0] != request_ids.HEADER]
        scope["headers"] = [*kept, id_header]
        scope[_RESPONSE] = response = _Response()
        started = complete = is_disconnected = False

        async def watched_receive() -> Message:
            nonlocal is_disconnected
            message = await receive()
            if message["type"] == "http.disconnect" and not complete:
                is_disconnected = True
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal started, complete
            if message["type"] == "http.response.start":
                started = True
                headers = list(message.get("headers", ()))
                if all(name.lower() != request_ids.HEADER for name, _ in headers):
                    message = {**message, "headers": [*headers, id_header]}
            elif _ends_body(message):
                complete = True
            await send(message)

        error: Exception | None = None
        try:
            await self._app(scope, watched_receive, send_with_id)
        except Exception as e:
            error = e
        if complete and error is None:
            return
        if is_disconnected or isinstance(error, ClientDisconnect):
            logger.debug("the client of request %s disconnected", request_id.decode(), exc_info=error)
        elif (error := response.broken_by or error) is not None:
            if started:
                raise error
            error_response = _error_response(error, request_id.decode())
            headers = [*error_response.headers, id_header]
            if error_response.status not in (204, 304):
                headers.append((b"content-length", b"%d" % len(error_response.body)))
            await send({"type": "http.response.start", "status": error_response.status, "headers": headers})
            await send({"type": "http.response.body", "body": error_response.body})


def _ends_body(message: Message) -> bool:
    kind = message["type"]
    return kind == "http.response.pathsend" or (kind == "http.response.body" and not message.get("more_body", False))


def _error_response(error: Exception, request_id: str) -> HTTPResponse:
    """Return the response for a request whose middlewares raised ``error`` before they sent a head."""
    if isinstance(error, HTTPException):
        return responses.of_http_exception(error)
    if isinstance(error, CutOff):
        return responses.of_error(error.error, debug=False)
    logger.error("request %s failed in a middleware", request_id, exc_info=error)
    return responses.of_status(500, f"a middleware failed with {type(error).__name__}")
