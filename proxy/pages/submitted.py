"""Kept requests over HTTP: submitted ones, those with an ``Idempotency-Key``, and the pages below ``/-/requests/``."""

from __future__ import annotations

import asyncio
import math

from ...broker.registry.records import EndpointRecord
from ...broker.wire import exact_json
from ...broker.wire.kept import CANCELLED, FINAL, Result
from ...broker.wire.requests import Header
from ...handles.calls.incoming_stream import StreamPiece
from ...handles.calls.kept.submission import IdempotencyKey, Ticket
from ...handles.calls.request_client import RequestClient
from ...handles.errors import PenstockError, RequestCancelled, RequestTimeout
from .. import response_streaming, responses
from ..preferences import Preferences, RawHeaders, idempotency_key_of, preferences_of
from ..responses import HTTPResponse

PAGES = "requests/"
"""The pages of submitted requests lie below this, within the proxy's own."""

_NO_STORE = (b"cache-control", b"no-store")
_REPLAYED = (b"idempotency-replayed", b"true")
_RETRY_AFTER_S = 1


class KeptCall:
    """The headers that make a request a kept one: it is submitted, or has a key."""

    __slots__ = ("backend", "key", "preferences")

    def __init__(self, key: IdempotencyKey | None, preferences: Preferences) -> None:
        self.key, self.preferences = key, preferences
        self.backend = ""
        """The backend that has it, once it is accepted."""

    @classmethod
    def of(cls, headers: RawHeaders) -> KeptCall | None:
        """Read the headers of a request; return None for a plain one. Raises `ConfigError`: the key is malformed."""
        key, preferences = idempotency_key_of(headers), preferences_of(headers)
        if key is None and not preferences.respond_async:
            return None
        credentials = b"\n".join(value for name, value in headers if name == b"authorization")
        return cls(None if key is None else IdempotencyKey(key, credentials), preferences)


class SubmittedRequests:
    """Answers kept requests of one proxy.

    Args:
        client: the request client of the proxy.
        max_body_bytes: the most bytes of a streamed result that is kept.
        request_timeout_s: the longest that a client waits.
        root_path: the prefix under which the proxy is mounted.
        debug: whether clients see tracebacks.
    """

    def __init__(
        self, client: RequestClient, *, max_body_bytes: int, request_timeout_s: float, root_path: str, debug: bool
    ) -> None:
        self._kept, self._loop = client.kept, client.loop
        self._max_body_bytes, self._timeout_s = max_body_bytes, request_timeout_s
        self._root_path, self._debug = root_path, debug
        self._submitting: set[asyncio.Task[Ticket]] = set()

    async def respond(
        self,
        call: KeptCall,
        endpoint: EndpointRecord,
        header: Header,
        body: bytes,
        *,
        shard_key: str | None,
        timeout_s: float,
    ) -> HTTPResponse:
        """Submit a request and return the response to it.

        Cancelled, it ends the wait for the result. The request is accepted, if it is being submitted, and runs.

        Raises:
            PenstockError: it was refused.
        """
        prefers_async, preferred_s = call.preferences
        wait_s = min(preferred_s or 0, timeout_s) if prefers_async else timeout_s
        began_s = self._loop.time()
        submitting = self._loop.create_task(
            self._kept.submission.submit(
                endpoint,
                header,
                body,
                key=call.key,
                shard_key=shard_key,
                timeout_s=None if prefers_async else timeout_s,
                max_stream_bytes=self._max_body_bytes,
                waits=wait_s > 0,
            )
        )
        self._submitting.add(submitting)
        submitting.add_done_callback(self._submitting.discard)
        try:
            ticket = await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(self._forget)
            raise
        call.backend = ticket.backend
        response = await self._answer(ticket, prefers_async, wait_s - (self._loop.time() - began_s))
        return response._replace(headers=[*response.headers, _REPLAYED]) if ticket.is_replayed else response

    async def _answer(self, ticket: Ticket, prefers_async: bool, wait_s: float) -> HTTPResponse:
        if ticket.waiter is not None:
            try:
                return self._of_result(await self._kept.result(ticket, max(0.0, wait_s)))
            except RequestTimeout as e:
                if not prefers_async:
                    return self._of_error(e)
            except PenstockError as e:
                return self._of_error(e)
        location = f"{self._root_path}/-/{PAGES}{ticket.id}".encode()
        headers = [(b"location", location), (b"preference-applied", b"respond-async"), _NO_STORE]
        return _json(202, {"id": ticket.id, "status": ticket.state}, headers)

    def _forget(self, submitting: asyncio.Task[Ticket]) -> None:
        if not submitting.cancelled() and submitting.exception() is None:
            self._kept.forget(submitting.result())

    # -- the pages

    async def page(self, method: str, path: str, headers: RawHeaders) -> HTTPResponse:
        """Return the response to a request for ``/-/requests/<id>`` or ``…/result``; ``path`` begins after `PAGES`."""
        id_, slash, rest = path.partition("/")
        if slash and rest != "result":
            return responses.of_status(404, f"no page {rest!r} of a submitted request; there is 'result'")
        allowed = ("GET", "HEAD") if slash else ("GET", "HEAD", "DELETE")
        if method not in allowed:
            listed = ", ".join(allowed)
            return responses.of_status(405, f"this page allows {listed}, not {method}", [(b"allow", listed.encode())])
        try:
            backend = self._kept.backend_of(id_)
            if slash:
                return await self._result_page(backend, id_, preferences_of(headers).wait_s or 0)
            if method == "DELETE":
                return await self._cancel(backend, id_)
            status = await self._kept.status(backend, id_)
            extra: responses.RawHeaders = [_NO_STORE] if status.is_final else [_NO_STORE, _retry_after()]
            return _json(200, status.to_dict(), extra)
        except PenstockError as e:
            return self._of_error(e)

    async def _result_page(self, backend: str, id_: str, wait_s: float) -> HTTPResponse:
        if wait_s:
            try:
                return self._of_result(await self._kept.wait(backend, id_, min(wait_s, self._timeout_s)))
            except RequestTimeout:
                pass  # there may be a result now
        if (result := await self._kept.find_result(backend, id_)) is not None:
            return self._of_result(result)
        status = await self._kept.status(backend, id_)
        location = f"{self._root_path}/-/{PAGES}{id_}".encode()
        return _json(202, status.to_dict(), [(b"location", location), _NO_STORE, _retry_after()])

    async def _cancel(self, backend: str, id_: str) -> HTTPResponse:
        state = await self._kept.cancel(backend, id_)
        if state in FINAL and state != CANCELLED:
            return responses.of_status(409, f"the request has {state}: only one that is queued or running is cancelled")
        return _json(200, {"id": id_, "status": CANCELLED}, [_NO_STORE])

    # -- responses

    def _of_result(self, result: Result) -> HTTPResponse:
        if result.reply.error is not None or result.reply.codec != "stream":
            return responses.of_reply(result.reply, debug=self._debug)
        pieces, start = list[StreamPiece](), 0
        for codec, size, more in result.pieces:
            pieces.append(StreamPiece(codec, result.reply.body[start : start + size], more))
            start += size
        try:
            return response_streaming.whole(pieces, debug=self._debug)
        except PenstockError as e:
            return responses.of_error(e, debug=self._debug)

    def _of_error(self, error: PenstockError) -> HTTPResponse:
        if isinstance(error, RequestCancelled):
            return responses.of_status(410, str(error))
        return responses.of_error(error, debug=self._debug)


def _retry_after() -> tuple[bytes, bytes]:
    return b"retry-after", b"%d" % max(1, math.ceil(_RETRY_AFTER_S))


def _json(status: int, value: object, headers: responses.RawHeaders) -> HTTPResponse:
    return HTTPResponse(status, [(b"content-type", b"application/json"), *headers], exact_json.dumps(value))
