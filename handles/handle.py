"""Sync handles: ``remote`` returns a future at once, from any thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

from ..broker.registry.records import EndpointRecord
from . import background_loop
from ._base_handle import BaseHandle, EncodedCall
from .async_handle import ObjectRefCaller
from .calls.request_client import RequestClient
from .calls.submitted import Submitted
from .options import CallChanges, CallOptions, HandleChanges, ReplyChanges
from .replies.futures import ReplyFuture
from .replies.response import value_of_result
from .replies.response_stream import ResponseStream

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ServeHandle(BaseHandle):
    """Calls an endpoint from sync code, from any number of threads.

    Made by ``get_handle(name)``. It can be pickled. All handles of a process share one connection and one reply stream,
    in a background thread.
    """

    __slots__ = ()

    def remote(self, /, *body: Any, **query: Any) -> concurrent.futures.Future[Any]:
        """Send a request and return the future of its reply. Never waits for the broker.

        The future raises `EndpointNotFound` if the endpoint does not exist, `Overloaded` if the backend's queue is
        full, `BrokerUnavailable` if Redis cannot be reached, `BackendError` if the backend's code raised,
        `RequestTimeout` if ``timeout_s`` passed, and `DeliveryLimitExceeded` if every replica that ran the request
        died. Cancelling it cancels the request.

        Args:
            *body: at most one value, which the backend reads as ``request.data``: None, ``str``, bytes, or what JSON
                can represent, including dataclasses, NumPy arrays, datetimes and pydantic models. Other values travel
                by pickle, if the backend was created with ``config={"allow_pickle": True}``.
            **query: JSON values, which the backend reads as ``request.query_params``.

        Raises:
            TypeError: the body or the query cannot be sent.
        """
        is_kept = self._options.idempotency_key is not None
        try:
            encoded = self._encode(body, query, is_kept=is_kept)
        except TypeError as e:
            raise e.with_traceback(None) from None
        future = ReplyFuture()
        background_loop.soon(partial(self._start_kept if is_kept else self._start, encoded, future))
        return future

    def submit(self, /, *body: Any, **query: Any) -> Submitted:
        """Submit a request whose result stays in Redis, and return once it is durably queued.

        It has no deadline unless the handle has ``timeout_s``, and it outlives this process. Its result stays for
        ``result_ttl_s`` seconds after its end. What the code yields is kept whole, up to 64 MiB.

        Args:
            *body: as of `remote`.
            **query: as of `remote`.

        Raises:
            TypeError: the body or the query cannot be sent.
            EndpointNotFound: the endpoint does not exist.
            IdempotencyConflict: the ``idempotency_key`` was used for another request.
            Overloaded, ResultsFull: the backend's queue is full, or the space for its results.
            RequestTimeout: ``timeout_s`` passed.
            BrokerUnavailable: Redis cannot be reached.
        """
        encoded = self._encode(body, query, is_kept=True)
        _, ticket, _ = background_loop.run(self._submit(encoded, waits=False))
        return Submitted(self._url, self._instance, ticket.id)

    def _start_kept(self, encoded: EncodedCall, future: ReplyFuture) -> None:
        """Submit a request with an idempotency key, on the background loop."""
        if future.cancelled():
            future.set_running_or_notify_cancel()
            return
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._submit_and_wait(encoded, future))
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)
        future.on_cancel(loop, task.cancel)

    async def _submit_and_wait(self, encoded: EncodedCall, future: ReplyFuture) -> None:
        try:
            client, ticket, timeout_s = await self._submit(encoded, waits=True)
            value = value_of_result(await client.kept.result(ticket, timeout_s))
        except (Exception, asyncio.CancelledError) as e:
            future.fail(e)  # the task is cancelled only when the future is
        else:
            future.resolve(value)

    def _start(self, encoded: EncodedCall, future: ReplyFuture) -> None:
        """Publish the request, on the background loop."""
        if future.cancelled():
            future.set_running_or_notify_cancel()  # otherwise `concurrent.futures.wait` would wait for it
            return
        if (found := self._find_connected()) is not None:
            client, endpoint = found
            self._publish(client, endpoint, encoded, self._options.timeout_s, future)
            return
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._connect_and_publish(encoded, future))
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)
        future.on_cancel(loop, task.cancel)

    async def _connect_and_publish(self, encoded: EncodedCall, future: ReplyFuture) -> None:
        try:
            client, endpoint, timeout_s = await self._connect(self._options.timeout_s)
        except (Exception, asyncio.CancelledError) as e:
            future.fail(e)  # the task is cancelled only when the future is
            return
        self._publish(client, endpoint, encoded, timeout_s, future)

    def _publish(
        self,
        client: RequestClient,
        endpoint: EndpointRecord,
        encoded: EncodedCall,
        timeout_s: float | None,
        future: ReplyFuture,
    ) -> None:
        try:
            call = self._dispatch(client, endpoint, encoded, timeout_s, future.settle)
        except Exception as e:
            future.fail(e)
            return
        future.on_cancel(client.loop, partial(future.cancel_call, call))

    @overload
    def options(
        self, *, return_type: Literal["future"] = ..., stream: Literal[False] = ..., **changes: Unpack[ReplyChanges]
    ) -> ServeHandle: ...

    @overload
    def options(
        self, *, return_type: Literal["future"] = ..., stream: Literal[True], **changes: Unpack[CallChanges]
    ) -> StreamingHandle: ...

    @overload
    def options(
        self, *, return_type: Literal["object_ref"], stream: Literal[False] = ..., **changes: Unpack[ReplyChanges]
    ) -> ObjectRefHandle: ...

    @overload
    def options(self, **changes: Unpack[HandleChanges]) -> ServeHandle | StreamingHandle | ObjectRefHandle: ...

    def options(self, **changes: Unpack[HandleChanges]) -> ServeHandle | StreamingHandle | ObjectRefHandle:
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
            stream: whether ``remote`` returns a `ResponseStream`, an iterator over the values that the
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


class StreamingHandle(BaseHandle):
    """A sync handle whose replies are streamed. Made by ``handle.options(stream=True)``."""

    __slots__ = ()

    def remote(self, /, *body: Any, **query: Any) -> ResponseStream:
        """Send a request and return its streamed reply. Never waits for the broker.

        Errors, such as `EndpointNotFound` or `Overloaded`, are raised by the iteration.

        Args:
            *body: at most one value, which the backend reads as ``request.data``: None, ``str``, bytes, or what JSON
                can represent, including dataclasses, NumPy arrays, datetimes and pydantic models. Other values travel
                by pickle, if the backend was created with ``config={"allow_pickle": True}``.
            **query: JSON values, which the backend reads as ``request.query_params``.

        Raises:
            TypeError: the body or the query cannot be sent.
        """
        try:
            encoded = self._encode(body, query)
        except TypeError as e:
            raise e.with_traceback(None) from None
        return ResponseStream(self._endpoint, self._open_stream(encoded))

    @overload
    def options(
        self, *, return_type: Literal["future"] = ..., stream: Literal[True] = ..., **changes: Unpack[CallChanges]
    ) -> StreamingHandle: ...

    @overload
    def options(
        self, *, return_type: Literal["future"] = ..., stream: Literal[False], **changes: Unpack[ReplyChanges]
    ) -> ServeHandle: ...

    @overload
    def options(self, **changes: Unpack[HandleChanges]) -> ServeHandle | StreamingHandle | ObjectRefHandle: ...

    def options(self, **changes: Unpack[HandleChanges]) -> ServeHandle | StreamingHandle | ObjectRefHandle:
        """Return a handle with other options; see `ServeHandle.options`."""
        arguments = self._arguments_with(changes)
        return _kind_for(arguments)(*arguments)


class ObjectRefHandle(ObjectRefCaller):
    """A sync handle whose replies are Ray object references. Made by ``options(return_type="object_ref")``."""

    __slots__ = ()

    def remote(self, /, *body: Any, **query: Any) -> Any:
        """Send a request and return the ``ray.ObjectRef`` of its reply.

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
    ) -> ObjectRefHandle: ...

    @overload
    def options(
        self, *, return_type: Literal["future"], stream: Literal[False] = ..., **changes: Unpack[ReplyChanges]
    ) -> ServeHandle: ...

    @overload
    def options(self, **changes: Unpack[HandleChanges]) -> ServeHandle | StreamingHandle | ObjectRefHandle: ...

    def options(self, **changes: Unpack[HandleChanges]) -> ServeHandle | StreamingHandle | ObjectRefHandle:
        """Return a handle with other options; see `ServeHandle.options`."""
        arguments = self._arguments_with(changes)
        return _kind_for(arguments)(*arguments)


def _kind_for(arguments: tuple[Any, ...]) -> type[ServeHandle] | type[StreamingHandle] | type[ObjectRefHandle]:
    """Return the class of the handle with these arguments."""
    options: CallOptions = arguments[3]
    if options.stream:
        return StreamingHandle
    return ObjectRefHandle if options.return_type == "object_ref" else ServeHandle


_tasks: set[asyncio.Task[None]] = set()
"""References to running tasks, of which the event loop has none."""


def warn_about_face(sync: bool, stacklevel: int) -> None:
    """Warn when a sync handle is created in a running event loop, or an asyncio handle outside of one."""
    try:
        asyncio.get_running_loop()
        in_loop = True
    except RuntimeError:
        in_loop = False
    if sync and in_loop:
        warnings.warn(
            "a sync handle was created inside a running event loop, which future.result() would block; "
            "get_handle(..., sync=False) gives one to await",
            UserWarning,
            stacklevel=stacklevel + 1,
        )
    elif not sync and not in_loop:
        warnings.warn(
            "an asyncio handle was created where no event loop runs, so its remote() cannot be awaited here; "
            "get_handle(...) gives one for sync code",
            UserWarning,
            stacklevel=stacklevel + 1,
        )
