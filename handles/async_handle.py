"""Asyncio handles: ``remote`` is a coroutine that returns once the request is durably queued."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

from ._base_handle import BaseHandle, EncodedCall
from .calls.submitted import AsyncSubmitted
from .errors import ConfigError
from .options import CallChanges, CallOptions, HandleChanges, ReplyChanges
from .replies.futures import KeptReplyFuture, new_reply_future
from .replies.object_refs import object_ref
from .replies.response_stream import AsyncResponseStream

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AsyncServeHandle(BaseHandle):
    """Calls an endpoint from asyncio code.

    Made by ``get_handle(name, sync=False)``. It can be pickled, and used in any event loop. All handles of a loop share
    one connection and one reply stream, which end with the loop.
    """

    __slots__ = ()

    async def remote(self, /, *body: Any, **query: Any) -> asyncio.Future[Any]:
        """Send a request, and return the future of its reply once the request is durably on its stream.

        The first ``await`` is for the queue, the second one, of the future, for the reply::

            future = await handle.remote("data")
            value = await future

        The future raises `BackendError` if the backend's code raised, `RequestTimeout` if ``timeout_s`` passed,
        `DeliveryLimitExceeded` if every replica that ran the request died. Cancelling it cancels the request.

        Args:
            *body: at most one value, which the backend reads as ``request.data``: None, ``str``, bytes, or what JSON
                can represent, including dataclasses, NumPy arrays, datetimes and pydantic models. Other values travel
                by pickle, if the backend was created with ``config={"allow_pickle": True}``.
            **query: JSON values, which the backend reads as ``request.query_params``.

        Raises:
            TypeError: the body or the query cannot be sent.
            EndpointNotFound: the endpoint does not exist.
            Overloaded: the backend's queue is full.
            RequestTimeout: ``timeout_s`` passed.
            BrokerUnavailable: Redis cannot be reached.
        """
        is_kept = self._options.idempotency_key is not None
        try:
            encoded = self._encode(body, query, is_kept=is_kept)
        except TypeError as e:
            raise e.with_traceback(None) from None
        if is_kept:
            return await self._submit_and_wait(encoded)
        timeout_s = self._options.timeout_s
        if (found := self._find_connected()) is not None:
            client, endpoint = found
        else:
            client, endpoint, timeout_s = await self._connect(timeout_s)
        future = new_reply_future(self._endpoint, client.loop)
        try:
            future.call = call = self._dispatch(client, endpoint, encoded, timeout_s, future.settle)
            await call.accepted()
        except BaseException as e:
            if isinstance(e, asyncio.CancelledError) and future.call is not None:
                future.call.cancel()
            future.mark_read()  # `remote` raises the same error
            raise
        finally:
            if future.done():
                future.call = None
        return future

    async def submit(self, /, *body: Any, **query: Any) -> AsyncSubmitted:
        """Submit a request whose result stays in Redis; see `ServeHandle.submit`."""
        _, ticket, _ = await self._submit(self._encode(body, query, is_kept=True), waits=False)
        return AsyncSubmitted(self._url, self._instance, ticket.id)

    async def _submit_and_wait(self, encoded: EncodedCall) -> asyncio.Future[Any]:
        """Submit a request with an idempotency key; return the future of its result."""
        client, ticket, timeout_s = await self._submit(encoded, waits=True)
        future = KeptReplyFuture(loop=client.loop)
        future.on_cancel = partial(client.kept.forget, ticket)
        client.kept.on_result(ticket, timeout_s, future.settle)
        return future

    @overload
    def options(
        self, *, return_type: Literal["future"] = ..., stream: Literal[False] = ..., **changes: Unpack[ReplyChanges]
    ) -> AsyncServeHandle: ...

    @overload
    def options(
        self, *, return_type: Literal["future"] = ..., stream: Literal[True], **changes: Unpack[CallChanges]
    ) -> AsyncStreamingHandle: ...

    @overload
    def options(
        self, *, return_type: Literal["object_ref"], stream: Literal[False] = ..., **changes: Unpack[ReplyChanges]
    ) -> AsyncObjectRefHandle: ...

    @overload
    def options(
        self, **changes: Unpack[HandleChanges]
    ) -> AsyncServeHandle | AsyncStreamingHandle | AsyncObjectRefHandle: ...

    def options(
        self, **changes: Unpack[HandleChanges]
    ) -> AsyncServeHandle | AsyncStreamingHandle | AsyncObjectRefHandle:
        """Return a handle to the same endpoint with other options. Options that are not given keep their values.

        Args:
            method_name: the method of the backend's class; ``"__call__"`` by default.
            shard_key: requests with the same key go to the same backend; None, the default, selects by the weights
                alone.
            http_method: value of ``request.method``; ``"GET"`` by default.
            http_path: the path that code gets, ``"/"`` by default: the one to call of an ASGI application.
            http_headers: ``request.headers``; empty by default. Names are ASCII tokens, values ISO 8859-1 without
                control characters, as in HTTP.
            timeout_s: seconds until a request expires, counted from ``remote``; None, the default, for never.
            return_type: ``"future"``, the default, or ``"object_ref"``: ``remote`` then returns a ``ray.ObjectRef`` for
                ``ray.get``, ``ray.wait`` and ``await``. It needs Ray, and costs each request a call of a Ray actor.
            stream: whether ``remote`` returns an `AsyncResponseStream`, an iterator over the values that the
                backend yields, instead of a future. ``timeout_s`` is then the time until the first value.
            idempotency_key: within ``result_ttl_s`` of the backend, requests to this endpoint with the same key are
                accepted once, and all get the one result; None, the default, for none. Cancelling the future of such a
                request ends the wait alone.
            model_id: the model that the request names, for code with loaders (``serve.multiplexed``); None, the
                default, for none.

        Raises:
            TypeError: an option has the wrong type.
            ConfigError: an option has a value that is not allowed.
        """
        arguments = self._arguments_with(changes)
        return _kind_for(arguments)(*arguments)._sharing(self, changes)


class AsyncStreamingHandle(BaseHandle):
    """An asyncio handle whose replies are streamed. Made by ``handle.options(stream=True)``."""

    __slots__ = ()

    async def remote(self, /, *body: Any, **query: Any) -> AsyncResponseStream:
        """Send a request, and return its streamed reply once the request is durably on its stream.

        Args:
            *body: at most one value, which the backend reads as ``request.data``: None, ``str``, bytes, or what JSON
                can represent, including dataclasses, NumPy arrays, datetimes and pydantic models. Other values travel
                by pickle, if the backend was created with ``config={"allow_pickle": True}``.
            **query: JSON values, which the backend reads as ``request.query_params``.

        Raises:
            TypeError: the body or the query cannot be sent.
            EndpointNotFound: the endpoint does not exist.
            Overloaded: the backend's queue is full.
            RequestTimeout: ``timeout_s`` passed.
            BrokerUnavailable: Redis cannot be reached.
        """
        try:
            encoded = self._encode(body, query)
        except TypeError as e:
            raise e.with_traceback(None) from None
        return await AsyncResponseStream.open(self._open_stream(encoded))

    @overload
    def options(
        self, *, return_type: Literal["future"] = ..., stream: Literal[True] = ..., **changes: Unpack[CallChanges]
    ) -> AsyncStreamingHandle: ...

    @overload
    def options(
        self, *, return_type: Literal["future"] = ..., stream: Literal[False], **changes: Unpack[ReplyChanges]
    ) -> AsyncServeHandle: ...

    @overload
    def options(
        self, **changes: Unpack[HandleChanges]
    ) -> AsyncServeHandle | AsyncStreamingHandle | AsyncObjectRefHandle: ...

    def options(
        self, **changes: Unpack[HandleChanges]
    ) -> AsyncServeHandle | AsyncStreamingHandle | AsyncObjectRefHandle:
        """Return a handle with other options; see `AsyncServeHandle.options`."""
        arguments = self._arguments_with(changes)
        return _kind_for(arguments)(*arguments)


class ObjectRefCaller(BaseHandle):
    """A handle whose calls are made by a Ray actor; see `object_ref`."""

    __slots__ = ()

    def _object_ref(self, body: tuple[Any, ...], query: dict[str, Any]) -> Any:
        """Make a call from the actor, through an asyncio handle with the same options.

        Raises:
            TypeError: the body or the query cannot be sent.
            ConfigError: this process is not connected to Ray, or Ray is not installed.
        """
        try:
            self._encode(body, query)  # an argument that cannot be sent raises here, not in the actor
            caller = AsyncServeHandle(*self._arguments_with({"return_type": "future"}))
            return object_ref(caller.remote, body, query)
        except (TypeError, ConfigError) as e:
            raise e.with_traceback(None) from None


class AsyncObjectRefHandle(ObjectRefCaller):
    """An asyncio handle whose replies are Ray object references. Made by ``options(return_type="object_ref")``."""

    __slots__ = ()

    async def remote(self, /, *body: Any, **query: Any) -> Any:
        """Send a request, and return the ``ray.ObjectRef`` of its reply.

        Args:
            *body: at most one value, which the backend reads as ``request.data``: None, ``str``, bytes, or what JSON
                can represent, including dataclasses, NumPy arrays, datetimes and pydantic models. Other values travel
                by pickle, if the backend was created with ``config={"allow_pickle": True}``.
            **query: JSON values, which the backend reads as ``request.query_params``.

        Raises:
            TypeError: the body or the query cannot be sent.
            ConfigError: this process is not connected to Ray, or Ray is not installed.
        """
        return self._object_ref(body, query)

    @overload
    def options(
        self, *, return_type: Literal["object_ref"] = ..., stream: Literal[False] = ..., **changes: Unpack[ReplyChanges]
    ) -> AsyncObjectRefHandle: ...

    @overload
    def options(
        self, *, return_type: Literal["future"], stream: Literal[False] = ..., **changes: Unpack[ReplyChanges]
    ) -> AsyncServeHandle: ...

    @overload
    def options(
        self, **changes: Unpack[HandleChanges]
    ) -> AsyncServeHandle | AsyncStreamingHandle | AsyncObjectRefHandle: ...

    def options(
        self, **changes: Unpack[HandleChanges]
    ) -> AsyncServeHandle | AsyncStreamingHandle | AsyncObjectRefHandle:
        """Return a handle with other options; see `AsyncServeHandle.options`."""
        arguments = self._arguments_with(changes)
        return _kind_for(arguments)(*arguments)


def _kind_for(
    arguments: tuple[Any, ...],
) -> type[AsyncServeHandle] | type[AsyncStreamingHandle] | type[AsyncObjectRefHandle]:
    """Return the class of the handle with these arguments."""
    options: CallOptions = arguments[3]
    if options.stream:
        return AsyncStreamingHandle
    return AsyncObjectRefHandle if options.return_type == "object_ref" else AsyncServeHandle
