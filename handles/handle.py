"""Handles: the sync and the asyncio face of the request client."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar, cast

from ..broker.queue.flow_control import WINDOW
from ..broker.registry.records import EndpointRecord
from ..broker.wire import exact_json
from ..broker.wire.keys import check_name
from ..broker.wire.requests import Header
from . import background_loop
from .calls.call import Call, CallOutcome
from .calls.request_client import RequestClient
from .calls.shared_client import SharedClient, starting
from .codec import encode, load_json
from .errors import BackendNotFound, EndpointNotFound, PenstockError, RequestTimeout
from .futures import AsyncReplyFuture, ReplyFuture
from .object_refs import object_ref
from .options import CallOptions
from .response_stream import AsyncResponseStream, ResponseStream, StreamState

log = logging.getLogger(__name__)

_MISSING_OK_S = 30.0
_HandleT = TypeVar("_HandleT", bound="_Handle")

_UNSET: Any = object()


class _Handle:
    """What both faces share: which endpoint of which instance on which Redis, and the options."""

    __slots__ = ("_endpoint", "_headers", "_instance", "_missing_ok", "_options", "_url")

    def __init__(
        self, url: str, instance: str, endpoint: str, options: CallOptions | None = None, missing_ok: bool = False
    ) -> None:
        self._url, self._instance = url, check_name("an instance", instance)
        self._endpoint = check_name("an endpoint", endpoint)
        self._options = options or CallOptions()
        self._missing_ok = missing_ok
        self._headers: dict[str, Header] = {}
        """By codec: of the calls that differ in nothing else."""

    @property
    def endpoint(self) -> str:
        """The name of the endpoint."""
        return self._endpoint

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._endpoint!r}, instance={self._instance!r})"

    # A handle is its address: it travels by pickle and connects anew where it arrives.
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._url, self._instance, self._endpoint, self._options, self._missing_ok)

    def options(
        self: _HandleT,
        *,
        method_name: str = _UNSET,
        shard_key: str | None = _UNSET,
        http_method: str = _UNSET,
        http_headers: Mapping[str, str] = _UNSET,
        timeout_s: float | None = _UNSET,
        return_type: str = _UNSET,
        stream: bool = _UNSET,
    ) -> _HandleT:
        """Return a handle to the same endpoint with other options; those that are not named stay as they are.

        Args:
            method_name: the method of the backend's class; ``"__call__"`` unless set.
            shard_key: requests with the same key go to the same backend; None, the default, goes by the traffic's
                weights.
            http_method: what ``request.method`` says; ``"GET"`` unless set.
            http_headers: what ``request.headers`` holds; empty unless set. Names are ASCII tokens, values ISO 8859-1
                without control characters, as in HTTP.
            timeout_s: seconds until a request expires, counted from ``remote``; None, the default, is never.
            return_type: ``"future"``, the default, or ``"object_ref"``: ``remote`` then gives a ``ray.ObjectRef`` that
                ``ray.get``, ``ray.wait`` and ``await`` take. Needs Ray, and costs each request a call of Ray's.
            stream: ``remote`` gives an iterator over the values that the backend yields, as they are made, instead of a
                future; ``timeout_s`` is then the time until the first one.

        Raises:
            TypeError: an option is of the wrong type.
            ConfigError: an option cannot have that value.
        """
        given = {
            "method_name": method_name,
            "shard_key": shard_key,
            "http_method": http_method,
            "http_headers": http_headers,
            "timeout_s": timeout_s,
            "return_type": return_type,
            "stream": stream,
        }
        changes = {name: value for name, value in given.items() if value is not _UNSET}
        return type(self)(self._url, self._instance, self._endpoint, self._options.with_(changes), self._missing_ok)

    def _object_ref(self, body: tuple[Any, ...], query: dict[str, Any]) -> Any:
        """Let an actor make the call, through an asyncio handle of the same options."""
        self._write(body, query)  # what cannot travel is refused here, not there
        options = self._options.with_({"return_type": "future"})
        caller = AsyncServeHandle(self._url, self._instance, self._endpoint, options, self._missing_ok)
        return object_ref(caller.remote, body, query)

    def _write(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> _Written:
        """Encode a call in the thread that makes it, so that what cannot travel is refused on the spot."""
        if len(arguments) > 1:
            raise TypeError(
                "remote() takes one positional argument, the body, and keyword arguments, the query; "
                f"not {len(arguments)} positional ones"
            )
        value = arguments[0] if arguments else None
        try:
            codec, body = encode(value)
        except TypeError as e:
            # Whether the backend takes pickle is known once the endpoint is: see `_Written.body_for`.
            codec, body = "pickle", b""
            return _Written(self._header(codec, keywords), body, value, e)
        return _Written(self._header(codec, keywords), body, None, None)

    def _header(self, codec: str, keywords: dict[str, Any]) -> Header:
        if keywords or self._options.timeout_s is not None:
            return self._new_header(codec, keywords)
        header = self._headers.get(codec)
        if header is None:
            header = self._headers[codec] = self._new_header(codec, {}).seal()
        return header

    def _new_header(self, codec: str, keywords: dict[str, Any]) -> Header:
        options = self._options
        if keywords:
            try:
                # As a copy: the caller may change its own before they are sent.
                keywords = load_json(exact_json.dumps(keywords))
            except TypeError as e:
                raise TypeError(f"the keyword arguments must be JSON values: {e}") from None
        headers = [(name.lower(), value) for name, value in options.http_headers.items()]
        return Header(
            endpoint=self._endpoint,
            method=options.http_method.upper(),
            query=keywords,
            headers=headers,
            codec=codec,
            call=options.method_name,
            window=WINDOW if options.stream else 0,
        )

    async def _connect(self) -> RequestClient:
        caller = await SharedClient.get(self._url, self._instance)
        if self._endpoint not in caller.snapshot.endpoints:
            await caller.watcher.refresh()  # it may be a moment behind
        return caller

    async def _reach(self, timeout_s: float | None) -> tuple[RequestClient, EndpointRecord, float | None]:
        """Connect if need be, and find the endpoint, waiting for it if it may be missing.

        Returns with them what is left of the time.
        """
        loop = asyncio.get_running_loop()
        ends = loop.time() + (_MISSING_OK_S if timeout_s is None else timeout_s)
        with starting(self._url, self._instance):
            try:
                caller = await asyncio.wait_for(self._connect(), timeout_s)
            except asyncio.TimeoutError:
                assert timeout_s is not None
                raise RequestTimeout(f"the broker of endpoint {self._endpoint!r}", timeout_s) from None
            while (endpoint := caller.snapshot.endpoints.get(self._endpoint)) is None:
                left_s = ends - loop.time()
                if not self._missing_ok or left_s <= 0:
                    raise EndpointNotFound(self._endpoint, caller.snapshot.endpoints)
                await caller.watcher.next_change(left_s)
        return caller, endpoint, None if timeout_s is None else max(0.0, ends - loop.time())

    def _send(
        self,
        caller: RequestClient,
        endpoint: EndpointRecord,
        written: _Written,
        timeout_s: float | None,
        then: Callable[[CallOutcome], None],
    ) -> Call:
        body = written.body
        if written.unsendable is not None:
            body = written.body_for(caller, endpoint)
        return caller.dispatch(
            endpoint, written.header, body, then, shard_key=self._options.shard_key, timeout_s=timeout_s
        )

    async def _open_stream(self, written: _Written) -> StreamState:
        """Send a request whose answer is taken as it comes."""
        caller, endpoint, timeout_s = await self._reach(self._options.timeout_s)
        stream = StreamState(caller.pickles)
        stream.call = self._send(caller, endpoint, written, timeout_s, stream.hear)
        return stream


class _Written:
    """A call as bytes."""

    __slots__ = ("body", "header", "unsendable", "value")

    def __init__(self, header: Header, body: bytes, value: Any, unsendable: TypeError | None) -> None:
        self.header, self.body, self.value, self.unsendable = header, body, value, unsendable

    def body_for(self, caller: RequestClient, endpoint: EndpointRecord) -> bytes:
        """Return the pickled value if every backend of the endpoint takes pickle; else raise why it cannot travel."""
        for tag in endpoint.traffic:
            backend = caller.snapshot.backends.get(tag)
            if backend is None:
                raise BackendNotFound(tag, caller.snapshot.backends)
            if not backend.config.allow_pickle:
                raise TypeError(
                    f"{self.unsendable}; backend {tag!r} would take it pickled "
                    "if it had config={'allow_pickle': True}"
                )
        _, body = encode(self.value, allow_pickle=True)
        return body


class AsyncServeHandle(_Handle):
    """Calls an endpoint from asyncio code.

    Made by ``get_handle(name, sync=False)``. It can be pickled, and used in any loop; all handles of one loop share one
    connection and one reply stream. Both end with the loop.
    """

    __slots__ = ()

    async def remote(self, /, *body: Any, **query: Any) -> asyncio.Future[Any]:
        """Send a request; return, once it is durably on its stream, the future of its answer.

        With ``options(stream=True)`` it returns an `AsyncResponseStream` instead, to read by ``async for``.

        Args:
            *body: at most one value, which the backend reads as ``request.data``: None, ``str``, bytes, or what JSON
                can hold (dataclasses, numpy arrays, datetimes and pydantic models included).
            **query: JSON values, which the backend reads as ``request.query_params``.

        Raises:
            TypeError: the body or the query cannot travel.
            EndpointNotFound: there is no such endpoint.
            Overloaded: the backend's queue is full.
            RequestTimeout: ``timeout_s`` passed.
            BrokerUnavailable: Redis cannot be reached.

        The future raises `BackendError` if the backend's code raised, `RequestTimeout` if ``timeout_s`` passed,
        `DeliveryLimitExceeded` if every replica that took the request died. Cancelling it cancels the request.
        """
        if self._options.return_type == "object_ref":
            return cast("asyncio.Future[Any]", self._object_ref(body, query))
        written = self._write(body, query)
        if self._options.stream:
            return cast("asyncio.Future[Any]", await AsyncResponseStream.open(self._open_stream(written)))
        caller: RequestClient | None = SharedClient.find(self._url, self._instance)
        endpoint = None if caller is None else caller.snapshot.endpoints.get(self._endpoint)
        timeout_s = self._options.timeout_s
        if caller is None or endpoint is None:
            caller, endpoint, timeout_s = await self._reach(timeout_s)
        future = AsyncReplyFuture(loop=caller.loop)
        future.call = call = self._send(caller, endpoint, written, timeout_s, future.settle)
        try:
            await call.accepted()
        except asyncio.CancelledError:
            call.cancel()
            raise
        except PenstockError:
            future.consume()  # the same error: raised here, not also reported as never retrieved
            raise
        finally:
            if future.done():
                future.call = None
        return future


class ServeHandle(_Handle):
    """Calls an endpoint from sync code, from any number of threads.

    Made by ``get_handle(name)``. It can be pickled. All handles of one process share one connection and one reply
    stream, in a background thread.
    """

    __slots__ = ()

    def remote(self, /, *body: Any, **query: Any) -> concurrent.futures.Future[Any]:
        """Send a request and return the future of its answer, at once: what the broker has to say comes through it.

        With ``options(stream=True)`` it returns a `ResponseStream` instead, to read by ``for``.

        Args:
            *body: at most one value, which the backend reads as ``request.data``: None, ``str``, bytes, or what JSON
                can hold (dataclasses, numpy arrays, datetimes and pydantic models included).
            **query: JSON values, which the backend reads as ``request.query_params``.

        Raises:
            TypeError: the body or the query cannot travel.

        The future raises what ``AsyncServeHandle.remote`` and its future raise. Cancelling it cancels the request.
        """
        if self._options.return_type == "object_ref":
            return cast("concurrent.futures.Future[Any]", self._object_ref(body, query))
        written = self._write(body, query)
        if self._options.stream:
            return cast("concurrent.futures.Future[Any]", ResponseStream(self._open_stream(written)))
        future = ReplyFuture()
        background_loop.soon(partial(self._start, written, future))
        return future

    def _start(self, written: _Written, future: ReplyFuture) -> None:
        """Send it, in the background loop."""
        if future.cancelled():
            future.set_running_or_notify_cancel()  # or `concurrent.futures.wait` would wait for it
            return
        caller: RequestClient | None = SharedClient.find(self._url, self._instance)
        endpoint = None if caller is None else caller.snapshot.endpoints.get(self._endpoint)
        if caller is None or endpoint is None:
            loop = asyncio.get_running_loop()
            task = loop.create_task(self._start_slowly(written, future))
            _starting.add(task)
            task.add_done_callback(_starting.discard)
            future.on_cancel(loop, task.cancel)
            return
        self._go(caller, endpoint, written, self._options.timeout_s, future)

    async def _start_slowly(self, written: _Written, future: ReplyFuture) -> None:
        """Connect first, or wait for an endpoint that may be missing."""
        try:
            caller, endpoint, timeout_s = await self._reach(self._options.timeout_s)
        except (Exception, asyncio.CancelledError) as e:
            future.fail(e)  # if it was cancelled, so was the future
            return
        self._go(caller, endpoint, written, timeout_s, future)

    def _go(
        self,
        caller: RequestClient,
        endpoint: EndpointRecord,
        written: _Written,
        timeout_s: float | None,
        future: ReplyFuture,
    ) -> None:
        try:
            call = self._send(caller, endpoint, written, timeout_s, future.settle)
        except Exception as e:
            future.fail(e)
            return
        future.on_cancel(caller.loop, partial(future.give_up, call))


_starting: set[asyncio.Task[None]] = set()


def warn_of_the_other_face(sync: bool) -> None:
    """Warn when a sync handle is asked for inside a running loop, or an asyncio one outside of any."""
    try:
        asyncio.get_running_loop()
        in_loop = True
    except RuntimeError:
        in_loop = False
    if sync and in_loop:
        warnings.warn(
            "a sync handle was asked for inside a running event loop, which future.result() would block; "
            "get_handle(..., sync=False) gives one to await",
            UserWarning,
            stacklevel=3,
        )
    elif not sync and not in_loop:
        warnings.warn(
            "an asyncio handle was asked for where no event loop runs, so its remote() cannot be awaited here; "
            "get_handle(...) gives one for sync code",
            UserWarning,
            stacklevel=3,
        )
