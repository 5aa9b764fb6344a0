"""Errors that a caller can meet: one class for each situation, with its HTTP status.

::

    PenstockError
    ├── BackendError            the backend's code raised
    ├── BackendNotFound         (a KeyError)
    ├── BrokerRefused           Redis answered with an error
    │   ├── BrokerFull
    │   └── NotPermitted        the Redis user lacks a permission
    ├── BrokerUnavailable
    ├── CallMethodRefused       the endpoint does not offer the method
    ├── ConfigError             (a ValueError)
    ├── DeliveryLimitExceeded   every replica that ran the request died
    ├── EndpointNotFound        (a KeyError)
    ├── IdempotencyConflict     the key was used for another request
    ├── MalformedBody           (a ValueError)
    ├── Overloaded
    ├── PayloadTooLarge
    ├── RequestCancelled
    ├── RequestNotFound         (a KeyError)
    ├── RequestTimeout          (a TimeoutError)
    ├── ResultExpired
    ├── ResultsFull             no room for another kept result
    ├── StreamBroken            a streamed reply had begun and cannot continue
    └── WireError
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from ..broker.errors import (
    BrokerFull,
    BrokerRefused,
    BrokerUnavailable,
    ConfigError,
    NotPermitted,
    Overloaded,
    PenstockError,
    WireError,
)

__all__ = [
    "BackendError",
    "BackendNotFound",
    "BrokerFull",
    "BrokerRefused",
    "BrokerUnavailable",
    "CallMethodRefused",
    "ConfigError",
    "DeliveryLimitExceeded",
    "EndpointNotFound",
    "IdempotencyConflict",
    "MalformedBody",
    "NotPermitted",
    "Overloaded",
    "PayloadTooLarge",
    "PenstockError",
    "RequestCancelled",
    "RequestNotFound",
    "RequestTimeout",
    "ResultExpired",
    "ResultsFull",
    "StreamBroken",
    "WireError",
]


_MAX_SHOWN = 10
"""The most names that the message of an error lists."""


class BackendError(PenstockError):
    """The backend's code raised an exception.

    Args:
        type_name: name of the exception's class.
        message: its message.
        traceback: its traceback as text; empty if the caller may not see it.
        status: the HTTP status: 500, or that of a Starlette ``HTTPException``.
    """

    def __init__(self, type_name: str, message: str, traceback: str = "", status: int = 500) -> None:
        super().__init__(type_name, message, traceback, status)
        self.type_name, self.message, self.traceback, self.status = type_name, message, traceback, status

    def __str__(self) -> str:
        summary = f"{self.type_name}: {self.message}" if self.message else self.type_name
        return f"{summary}\n\n{self.traceback}" if self.traceback else summary


class BackendNotFound(PenstockError, KeyError):
    """No backend has the tag ``name``, or, if that is empty, the endpoint sends its requests to no backend.

    ``known`` are the tags of the instance's backends.
    """

    status = 404

    def __init__(self, name: str, known: Iterable[str] = ()) -> None:
        self.name, self.known = name, sorted(known)
        super().__init__(name, self.known)

    def __str__(self) -> str:
        if not self.name:
            return "the endpoint sends its requests to no backend; client.set_traffic() chooses one"
        return _not_found("backend", self.name, self.known)


class CallMethodRefused(PenstockError):
    """The endpoint was created with ``call_methods``, and the called method is not one of them."""

    status = 403

    def __init__(self, endpoint: str, method: str, allowed: Iterable[str] = ()) -> None:
        self.endpoint, self.method, self.allowed = endpoint, method, list(allowed)
        super().__init__(endpoint, method, self.allowed)

    def __str__(self) -> str:
        offered = ", ".join(map(repr, self.allowed)) or "none"
        return f"endpoint {self.endpoint!r} offers the methods {offered}, not {self.method!r}"


class EndpointNotFound(PenstockError, KeyError):
    """No endpoint has the name ``name``. ``known`` are the names of the instance's endpoints."""

    status = 404

    def __init__(self, name: str, known: Iterable[str] = ()) -> None:
        self.name, self.known = name, sorted(known)
        super().__init__(name, self.known)

    def __str__(self) -> str:
        return _not_found("endpoint", self.name, self.known)


class DeliveryLimitExceeded(PenstockError):
    """Every replica that ran the request died. The request is now a dead letter of the backend."""

    def __init__(self, backend: str, request_id: str, deliveries: int, limit: int) -> None:
        super().__init__(backend, request_id, deliveries, limit)
        self.backend, self.request_id, self.deliveries, self.limit = backend, request_id, deliveries, limit

    def __str__(self) -> str:
        return (
            f"{self.deliveries} replicas of {self.backend!r} died with request {self.request_id!r} "
            f"(max_deliveries is {self.limit}); it is a dead letter now"
        )


class IdempotencyConflict(PenstockError):
    """The idempotency key was used for another request: its method, path, query, content type or body differ."""

    status = 422

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.endpoint = endpoint

    def __str__(self) -> str:
        return (
            f"the idempotency key was used for another request to endpoint {self.endpoint!r}, with a different method, "
            "path, query, content type or body: repeat that request unchanged, or use a new key"
        )


class MalformedBody(PenstockError, ValueError):
    """The body does not have the format that its content type declares, or that the code reads."""

    status = 400


class PayloadTooLarge(PenstockError):
    """The body has more bytes than are allowed. ``limited_by`` names the limit."""

    status = 413

    def __init__(self, size: int, limit: int, limited_by: str = "max_body_bytes") -> None:
        super().__init__(size, limit, limited_by)
        self.size, self.limit, self.limited_by = size, limit, limited_by

    def __str__(self) -> str:
        return f"the body has {self.size} bytes or more ({self.limited_by} is {self.limit})"


class RequestCancelled(PenstockError):
    """The caller cancelled the request, or closed its connection."""

    status = 499  # for logs, as nginx has it: no client is left to read it

    def __init__(self, request_id: str) -> None:
        super().__init__(request_id)
        self.request_id = request_id

    def __str__(self) -> str:
        return f"request {self.request_id!r} was cancelled"


class RequestNotFound(PenstockError, KeyError):
    """No submitted request has that id, or its result expired some time ago."""

    status = 404

    def __str__(self) -> str:
        return "there is no submitted request with this id, or its result expired some time ago"


class RequestTimeout(PenstockError, TimeoutError):
    """The deadline passed before a reply arrived."""

    status = 504

    def __init__(self, what: str, timeout_s: float) -> None:
        super().__init__(what, timeout_s)
        self.what, self.timeout_s = what, timeout_s

    def __str__(self) -> str:
        return f"{self.what} did not answer within {self.timeout_s:g} s"


class ResultExpired(PenstockError):
    """The result of a submitted request was kept for ``result_ttl_s`` seconds after its end, and is gone."""

    status = 410

    def __init__(self, request_id: str) -> None:
        super().__init__(request_id)
        self.request_id = request_id

    def __str__(self) -> str:
        return f"the result of request {self.request_id!r} has expired: its backend keeps results for result_ttl_s"


class ResultsFull(PenstockError):
    """The results that a backend keeps have reached ``max_result_bytes``. The request was not accepted."""

    status = 503

    def __init__(self, backend: str, used_bytes: int, limit: int, retry_after_s: float = 10.0) -> None:
        super().__init__(backend, used_bytes, limit, retry_after_s)
        self.backend, self.used_bytes, self.limit, self.retry_after_s = backend, used_bytes, limit, retry_after_s

    def __str__(self) -> str:
        return (
            f"the kept requests and results of {self.backend!r} take {self.used_bytes} bytes (max_result_bytes is "
            f"{self.limit}): wait until some expire, or give the backend a larger max_result_bytes"
        )


class StreamBroken(PenstockError):
    """A streamed reply ended before it was complete. It is not run again, as its first values would arrive twice."""

    status = 502

    def __init__(self, backend: str, request_id: str, reason: str) -> None:
        super().__init__(backend, request_id, reason)
        self.backend, self.request_id, self.reason = backend, request_id, reason

    def __str__(self) -> str:
        return f"the streamed reply of {self.backend!r} to request {self.request_id!r} broke off: {self.reason}"


# The errors that a reply can carry. `from_wire` constructs these classes only, whatever the reply names.
_KINDS: dict[str, type[PenstockError]] = {
    kind.__name__: kind
    for kind in (
        BackendError,
        BackendNotFound,
        BrokerFull,
        BrokerRefused,
        BrokerUnavailable,
        CallMethodRefused,
        ConfigError,
        DeliveryLimitExceeded,
        EndpointNotFound,
        IdempotencyConflict,
        MalformedBody,
        NotPermitted,
        Overloaded,
        PayloadTooLarge,
        RequestCancelled,
        RequestNotFound,
        RequestTimeout,
        ResultExpired,
        ResultsFull,
        StreamBroken,
        WireError,
    )
}


def to_wire(error: PenstockError) -> dict[str, Any]:
    """Return the JSON object by which a reply carries ``error``."""
    return {"kind": type(error).__name__, "args": list(error.args)}


def from_wire(raw: Mapping[str, Any]) -> PenstockError:
    """Return the error that `to_wire` wrote, or a plain `PenstockError` that quotes one of an unknown class."""
    kind, args = raw.get("kind"), raw.get("args")
    known = _KINDS.get(kind) if isinstance(kind, str) else None
    if known is not None and isinstance(args, list):
        try:
            error = known(*args)  # pyright: ignore[reportUnknownArgumentType]
            if str(error) and _is_status(error.status):
                return error
        except Exception:
            pass  # another release may give it other arguments
    return PenstockError(f"{kind}: {args}")


def _is_status(status: object) -> bool:
    return type(status) is int and 100 <= status <= 599


def _not_found(kind: str, name: str, known: list[str]) -> str:
    if not known:
        return f"no {kind} {name!r}; this instance has no {kind}s yet"
    shown = ", ".join(map(repr, known[:_MAX_SHOWN]))
    if len(known) > _MAX_SHOWN:
        shown += f" and {len(known) - _MAX_SHOWN} more"
    similar = get_close_matches(name, known, n=1)
    hint = f"; did you mean {similar[0]!r}?" if similar else ""
    return f"no {kind} {name!r}; this instance has {shown}{hint}"
