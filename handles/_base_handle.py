"""Base of sync and asyncio handles: the address of an endpoint, the options, and the way to the request client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..broker.queue.flow_control import WINDOW
from ..broker.registry.records import EndpointRecord
from ..broker.wire import exact_json
from ..broker.wire.kept import MAX_STREAM_BYTES
from ..broker.wire.keys import check_name
from ..broker.wire.requests import Header
from ..runtime.notebooks import NotebookTable
from .calls import tracing
from .calls.call import Call, CallOutcome
from .calls.kept.submission import IdempotencyKey, Ticket
from .calls.request_client import RequestClient
from .calls.shared_client import SharedClient, starting
from .codec import encode, load_json
from .errors import BackendNotFound, EndpointNotFound, RequestTimeout
from .options import MODEL_ID_HEADER, CallOptions, HandleChanges
from .replies.response_stream import StreamState

HandleT = TypeVar("HandleT", bound="BaseHandle")

MISSING_OK_S = 30.0
"""Seconds for which a call without a deadline waits for an endpoint that may be missing."""


_KEY_ALONE = {"idempotency_key"}

_KEPT = "kept:"
"""The beginning of the names of headers of kept requests, before the codec."""


class EncodedCall:
    """The head and the body of a call, or the reason why the body cannot be sent without pickle."""

    __slots__ = ("body", "error", "header", "value")

    def __init__(self, header: Header, body: bytes, value: Any = None, error: TypeError | None = None) -> None:
        self.header, self.body, self.value, self.error = header, body, value, error

    def body_for(self, client: RequestClient, endpoint: EndpointRecord) -> bytes:
        """Return the body, pickled if that is necessary.

        Raises:
            TypeError: the body must be pickled, and a backend of the endpoint does not allow that.
            BackendNotFound: the endpoint has a backend that does not exist.
        """
        if self.error is None:
            return self.body
        for tag in endpoint.traffic:
            backend = client.snapshot.backends.get(tag)
            if backend is None:
                raise BackendNotFound(tag, client.snapshot.backends)
            if not backend.config.allow_pickle:
                raise TypeError(
                    f"{self.error}; backend {tag!r} would take it pickled if it had config={{'allow_pickle': True}}"
                )
        _, body = encode(self.value, allow_pickle=True)
        return body


class BaseHandle(NotebookTable):
    """An endpoint of an instance on a Redis, and the options of calls to it.

    A handle holds no connection: it can be pickled, and connects where it is used.
    """

    __slots__ = ("_endpoint", "_headers", "_instance", "_missing_ok", "_options", "_url")

    def __init__(
        self, url: str, instance: str, endpoint: str, options: CallOptions | None = None, missing_ok: bool = False
    ) -> None:
        """Create a handle; users call ``get_handle``.

        Args:
            url: the Redis URL.
            instance: name of the instance.
            endpoint: name of the endpoint.
            options: options of the calls.
            missing_ok: a call waits for an endpoint that does not exist yet.

        Raises:
            TypeError, ConfigError: ``instance`` or ``endpoint`` is not a name.
        """
        self._url, self._instance = url, check_name("an instance", instance)
        self._endpoint = check_name("an endpoint", endpoint)
        self._options = options or CallOptions()
        self._missing_ok = missing_ok
        self._headers: dict[str, Header] = {}
        """By codec: the sealed header of calls without a query and without a deadline; that of kept requests too."""

    @property
    def endpoint(self) -> str:
        """The name of the endpoint."""
        return self._endpoint

    def __repr__(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self._shown_options().items())
        return f"{type(self).__name__}({self._endpoint!r}, instance={self._instance!r}{options})"

    def _notebook_fields(self) -> Mapping[str, object]:
        return {"endpoint": self._endpoint, "instance": self._instance, **self._shown_options()}

    def _shown_options(self) -> dict[str, str]:
        shown = self._options.shown()
        if self._missing_ok:
            shown["missing_ok"] = "True"
        return shown

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._url, self._instance, self._endpoint, self._options, self._missing_ok)

    def _arguments_with(self, changes: HandleChanges) -> tuple[Any, ...]:
        """Return the arguments of a handle with other options.

        Raises:
            TypeError, ConfigError: an option has a wrong type or value.
        """
        try:
            options = self._options.with_(changes)
        except (TypeError, ValueError) as e:
            raise e.with_traceback(None) from None
        return self._url, self._instance, self._endpoint, options, self._missing_ok

    def _sharing(self: HandleT, other: BaseHandle, changes: HandleChanges) -> HandleT:
        """Return this handle after it took over the headers of ``other``, if they differ in their key alone."""
        if changes.keys() == _KEY_ALONE:
            self._headers = other._headers
        return self

    def _encode(self, arguments: tuple[Any, ...], keywords: dict[str, Any], *, is_kept: bool = False) -> EncodedCall:
        """Encode a call. This happens in the calling thread, so that an argument that cannot be sent raises there."""
        if len(arguments) > 1:
            raise TypeError(
                "remote() takes one positional argument, the body, and keyword arguments, the query; "
                f"not {len(arguments)} positional ones"
            )
        value = arguments[0] if arguments else None
        try:
            codec, body = encode(value)
        except TypeError as e:
            # Whether the backend allows pickle is known once the endpoint is: see `EncodedCall.body_for`.
            return EncodedCall(self._header("pickle", keywords, is_kept), b"", value, e)
        return EncodedCall(self._header(codec, keywords, is_kept), body)

    def _header(self, codec: str, keywords: dict[str, Any], is_kept: bool) -> Header:
        if keywords or self._options.timeout_s is not None or tracing.current_traceparent() is not None:
            return self._new_header(codec, keywords, is_kept)
        name = _KEPT + codec if is_kept else codec
        header = self._headers.get(name)
        if header is None:
            header = self._headers[name] = self._new_header(codec, {}, is_kept).seal()
        return header

    def _new_header(self, codec: str, keywords: dict[str, Any], is_kept: bool) -> Header:
        options = self._options
        if keywords:
            try:
                # A copy: the caller may change the values before they are sent.
                keywords = load_json(exact_json.dumps(keywords))
            except TypeError as e:
                raise TypeError(f"the keyword arguments must be JSON values: {e}") from None
        headers = [(name.lower(), value) for name, value in options.http_headers.items()]
        if options.model_id is not None:
            headers = [header for header in headers if header[0] != MODEL_ID_HEADER]
            headers.append((MODEL_ID_HEADER, options.model_id))
        if (traceparent := tracing.current_traceparent()) is not None and tracing.traceparent_of(headers) is None:
            headers.append((tracing.TRACEPARENT, traceparent))
        return Header(
            endpoint=self._endpoint,
            method=options.http_method.upper(),
            path=options.http_path,
            query=keywords,
            headers=headers,
            codec=codec,
            call=options.method_name,
            window=WINDOW if options.stream or is_kept else 0,  # the parts of a kept request are kept as one result
        )

    def _find_connected(self) -> tuple[RequestClient, EndpointRecord] | None:
        """Return the client of the running loop and the endpoint, unless a call has to wait for one of them."""
        client = SharedClient.find(self._url, self._instance)
        endpoint = None if client is None else client.snapshot.endpoints.get(self._endpoint)
        return None if client is None or endpoint is None else (client, endpoint)

    async def _connect(self, timeout_s: float | None) -> tuple[RequestClient, EndpointRecord, float | None]:
        """Return the client of the running loop, the endpoint, and the rest of the timeout.

        Connects if that is necessary, and waits for an endpoint that may be missing.

        Raises:
            EndpointNotFound: the endpoint does not exist.
            RequestTimeout: ``timeout_s`` passed before the connection was open.
            BrokerUnavailable: Redis cannot be reached.
        """
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + (MISSING_OK_S if timeout_s is None else timeout_s)
        with starting(self._url, self._instance):
            try:
                client = await asyncio.wait_for(self._open_client(), timeout_s)
            except asyncio.TimeoutError:
                assert timeout_s is not None
                raise RequestTimeout(f"the broker of endpoint {self._endpoint!r}", timeout_s) from None
            while (endpoint := client.snapshot.endpoints.get(self._endpoint)) is None:
                left_s = ends_s - loop.time()
                if not self._missing_ok or left_s <= 0:
                    raise EndpointNotFound(self._endpoint, client.snapshot.endpoints)
                await client.watcher.next_change(left_s)
        return client, endpoint, None if timeout_s is None else max(0.0, ends_s - loop.time())

    async def _open_client(self) -> RequestClient:
        client = await SharedClient.get(self._url, self._instance)
        if self._endpoint not in client.snapshot.endpoints:
            await client.watcher.refresh()  # the snapshot follows the registry with a short delay
        return client

    def _dispatch(
        self,
        client: RequestClient,
        endpoint: EndpointRecord,
        encoded: EncodedCall,
        timeout_s: float | None,
        on_outcome: Callable[[CallOutcome], None],
    ) -> Call:
        body = encoded.body if encoded.error is None else encoded.body_for(client, endpoint)
        shard_key = self._options.shard_key
        return client.dispatch(endpoint, encoded.header, body, on_outcome, shard_key=shard_key, timeout_s=timeout_s)

    async def _submit(self, encoded: EncodedCall, *, waits: bool) -> tuple[RequestClient, Ticket, float | None]:
        """Submit a request. Returns the client, the ticket, and the rest of the timeout."""
        timeout_s = self._options.timeout_s
        if (found := self._find_connected()) is not None:
            client, endpoint = found
        else:
            client, endpoint, timeout_s = await self._connect(timeout_s)
        body = encoded.body if encoded.error is None else encoded.body_for(client, endpoint)
        key, began_s = self._options.idempotency_key, client.loop.time()
        with starting(self._url, self._instance):
            ticket = await client.kept.submission.submit(
                endpoint,
                encoded.header,
                body,
                key=None if key is None else IdempotencyKey(key),
                shard_key=self._options.shard_key,
                timeout_s=timeout_s,
                max_stream_bytes=MAX_STREAM_BYTES,
                waits=waits,
            )
        return client, ticket, None if timeout_s is None else max(0.0, timeout_s + began_s - client.loop.time())

    async def _open_stream(self, encoded: EncodedCall) -> StreamState:
        """Publish a request with a streamed reply."""
        client, endpoint, timeout_s = await self._connect(self._options.timeout_s)
        stream = StreamState(self._endpoint, client.pickles)
        stream.call = self._dispatch(client, endpoint, encoded, timeout_s, stream.on_outcome)
        return stream
