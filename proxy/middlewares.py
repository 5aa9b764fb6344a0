"""Starlette's middlewares around the application, where a user sets some."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..handles.log_lines import work_on
from . import replies, request_ids
from .streaming import CutOff

logger = logging.getLogger("penstock.proxy")


def wrap(app: ASGIApp, middlewares: Sequence[Middleware]) -> ASGIApp:
    """Return ``app`` inside ``middlewares``, the first of them outermost; ``app`` itself if there are none."""
    if not middlewares:
        return app
    for cls, args, kwargs in reversed(middlewares):
        app = cls(app, *args, **kwargs)
    return _Outermost(app)


class _Outermost:
    """What `App` promises of every answer, for those that a middleware gives in its place."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_ids.request_id_of(dict(scope["headers"]))
        work_on([(request_id.decode(), "")])
        id_header = (request_ids.HEADER, request_id)
        kept = [pair for pair in scope["headers"] if pair[0] != request_ids.HEADER]
        scope["headers"] = [*kept, id_header]
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = list(message.get("headers", ()))
                if all(name.lower() != request_ids.HEADER for name, _ in headers):
                    message = {**message, "headers": [*headers, id_header]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as e:
            if started:
                raise
            if isinstance(e, HTTPException):
                answer = replies.of_http_exception(e)
            elif isinstance(e, CutOff):  # a middleware has held its head back
                answer = replies.of_error(e.error, debug=False)
            else:
                logger.exception("request %s failed in a middleware", request_id.decode())
                answer = replies.of_status(500, f"a middleware failed with {type(e).__name__}")
            length = b"%d" % len(answer.body)
            headers = [*answer.headers, id_header, (b"content-length", length)]
            await send({"type": "http.response.start", "status": answer.status, "headers": headers})
            await send({"type": "http.response.body", "body": answer.body})
