"""Encoding of batch items: values as users give them become requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from ...broker.registry.records import Snapshot
from ...broker.wire import exact_json
from ...broker.wire.requests import Header, RawEntry
from ..calls.large_bodies import LEAST_LARGE
from ..calls.request_client import RequestClient
from ..codec import encode, load_json
from ..options import CallOptions
from .items import BatchItem


class EncodedItem(NamedTuple):
    """An item in the form in which it is sent, or the error for which it cannot be sent."""

    options: CallOptions
    query: dict[str, Any] | None
    codec: str
    body: bytes
    error: Exception | None = None

    def fingerprint(self) -> bytes:
        """Return the bytes by which a job recognises the item. Equal items have equal fingerprints."""
        if self.error is not None:
            return f"{type(self.error).__name__}: {self.error}".encode(errors="surrogatepass")
        body = b"" if self.codec == "pickle" else self.body  # a set that is pickled twice may give different bytes
        if not self.query and self.options.method_name == "__call__":
            return b"%b:%b" % (self.codec.encode(), body)
        return b"%b:%b" % (exact_json.dumps([self.query or "", self.options.method_name, self.codec]), body)


def allows_pickle(snapshot: Snapshot, endpoint: str) -> bool:
    """Return whether all backends of an endpoint allow pickle."""
    record = snapshot.endpoints.get(endpoint)
    backends = [snapshot.backends.get(tag) for tag in (record.traffic if record else ())]
    return bool(backends) and all(backend and backend.config.allow_pickle for backend in backends)


class ItemEncoder:
    """Encodes the items of one batch."""

    def __init__(self, client: RequestClient, endpoint: str, options: CallOptions) -> None:
        """``options`` apply to items without options of their own."""
        self._client, self._endpoint, self._options = client, endpoint, options
        self._last_header: tuple[tuple[object, ...], bytes] = ((), b"")

    def encode(self, value: Any) -> EncodedItem:
        """Encode a value or a `BatchItem`. Never raises: the error becomes the item's result."""
        options, query = self._options, None
        try:
            if isinstance(value, Exception):
                raise value
            if isinstance(value, BatchItem):
                options, query = self._options_of(value), _query_of(value)
                value = value.data
            try:
                codec, body = encode(value)
            except TypeError:
                if not allows_pickle(self._client.snapshot, self._endpoint):
                    raise
                codec, body = encode(value, allow_pickle=True)
        except Exception as e:  # methods of the value may raise anything
            return EncodedItem(options, query, "", b"", e)
        return EncodedItem(options, query, codec, body)

    def request(self, id_: str, item: EncodedItem, deadline_ms: int) -> RawEntry:
        """Return the request of an item, without its body if that is large.

        Args:
            id_: id of the request.
            item: the item, which has no error.
            deadline_ms: when it expires, by the broker's clock; 0 for never.
        """
        header = self._header(item, deadline_ms)
        size = len(item.body)
        if size > LEAST_LARGE:  # a batch keeps many items in flight
            return RawEntry(id_.encode(), self._client.wire_id, header, None, size)
        return RawEntry(id_.encode(), self._client.wire_id, header, item.body)

    def _options_of(self, item: BatchItem) -> CallOptions:
        own = {"method_name": item.method_name, "shard_key": item.shard_key, "timeout_s": item.timeout_s}
        changes = {name: value for name, value in own.items() if value is not None}
        return self._options.with_(changes) if changes else self._options

    def _header(self, item: EncodedItem, deadline_ms: int) -> bytes:
        options, query, codec, _, _ = item
        key = options, codec, deadline_ms
        if not query and key == self._last_header[0]:  # most items have the header of the previous one
            return self._last_header[1]
        header = Header(
            endpoint=self._endpoint,
            method=options.http_method.upper(),
            path=options.http_path,
            query=query or "",
            headers=[(name.lower(), value) for name, value in options.http_headers.items()],
            codec=codec,
            deadline_ms=deadline_ms,
            call=options.method_name,
        ).dump()
        if not query:
            self._last_header = key, header
        return header


def _query_of(item: BatchItem) -> dict[str, Any] | None:
    if not isinstance(cast(object, item.query), Mapping):
        raise TypeError(f"query must be a dict of JSON values, not {type(item.query).__name__}")
    # A copy: the caller may change the mapping before the item is sent.
    return load_json(exact_json.dumps(dict(item.query))) if item.query else None
