"""All errors that a caller can meet: one class per situation, each with its HTTP status.

::

    PenstockError
    ├── BackendError            the user's code raised
    ├── BackendNotFound         (a KeyError)
    ├── BrokerRefused           Redis answered with an error
    │   ├── BrokerFull
    │   └── NotPermitted        its rules do not let our user do that
    ├── BrokerUnavailable
    ├── CallMethodRefused       the endpoint does not offer that method
    ├── ConfigError             (a ValueError)
    ├── DeliveryLimitExceeded   every replica that took the request died
    ├── EndpointNotFound        (a KeyError)
    ├── MalformedBody           (a ValueError)
    ├── Overloaded
    ├── PayloadTooLarge
    ├── RequestCancelled
    ├── RequestTimeout          (a TimeoutError)
    ├── StreamBroken            an answer had begun, and cannot go on
    └── WireError
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    "MalformedBody",
    "NotPermitted",
    "Overloaded",
    "PayloadTooLarge",
    "PenstockError",
    "RequestCancelled",
    "RequestTimeout",
    "StreamBroken",
    "WireError",
]


class BackendError(PenstockError):
    """The backend's code raised.

    ``type_name`` and ``message`` are those of its exception, ``traceback`` is its traceback as text, ``status`` what
    HTTP callers get: 500, or what a Starlette ``HTTPException`` asked for.
    """

    def __init__(self, type_name: str, message: str, traceback: str = "", status: int = 500) -> None:
        super().__init__(type_name, message, traceback, status)
        self.type_name, self.message, self.traceback, self.status = type_name, message, traceback, status

    def __str__(self) -> str:
        said = f"{self.type_name}: {self.message}" if self.message else self.type_name
        return f"{said}\n\n{self.traceback}" if self.traceback else said


class BackendNotFound(PenstockError, KeyError):
    """No backend has that tag."""

    status = 404

    def __init__(self, name: str, known: Iterable[str] = ()) -> None:
        self.name, self.known = name, sorted(known)
        super().__init__(name, self.known)

    def __str__(self) -> str:
        return f"there is no backend {self.name!r}; there is {_listed(self.known)}"


class CallMethodRefused(PenstockError):
    """The endpoint was created with ``call_methods``, and the method is not one of them."""

    status = 403

    def __init__(self, endpoint: str, method: str, allowed: Iterable[str] = ()) -> None:
        self.endpoint, self.method, self.allowed = endpoint, method, list(allowed)
        super().__init__(endpoint, method, self.allowed)

    def __str__(self) -> str:
        return f"endpoint {self.endpoint!r} offers the methods {_listed(self.allowed)}, not {self.method!r}"


class EndpointNotFound(PenstockError, KeyError):
    """No endpoint has that name."""

    status = 404

    def __init__(self, name: str, known: Iterable[str] = ()) -> None:
        self.name, self.known = name, sorted(known)
        super().__init__(name, self.known)

    def __str__(self) -> str:
        return f"there is no endpoint {self.name!r}; there is {_listed(self.known)}"


class DeliveryLimitExceeded(PenstockError):
    """Every replica that took the request died; it lies among the backend's dead letters."""

    def __init__(self, backend: str, request_id: str, deliveries: int, limit: int) -> None:
        super().__init__(backend, request_id, deliveries, limit)
        self.backend, self.request_id, self.deliveries, self.limit = backend, request_id, deliveries, limit

    def __str__(self) -> str:
        return (
            f"{self.deliveries} replicas of {self.backend!r} died with request {self.request_id!r} "
            f"(max_deliveries is {self.limit}); it is a dead letter now"
        )


class MalformedBody(PenstockError, ValueError):
    """The body is not what its content type, or the code that reads it, says."""

    status = 400


class PayloadTooLarge(PenstockError):
    """The body has more bytes than is allowed."""

    status = 413

    def __init__(self, size: int, limit: int, limited_by: str = "max_body_bytes") -> None:
        super().__init__(size, limit, limited_by)
        self.size, self.limit, self.limited_by = size, limit, limited_by

    def __str__(self) -> str:
        return f"the body has {self.size} bytes or more ({self.limited_by} is {self.limit})"


class RequestCancelled(PenstockError):
    """The caller gave the request up."""

    status = 499  # nobody is left to read it; the number is nginx's, for logs

    def __init__(self, request_id: str) -> None:
        super().__init__(request_id)
        self.request_id = request_id

    def __str__(self) -> str:
        return f"request {self.request_id!r} was cancelled"


class RequestTimeout(PenstockError, TimeoutError):
    """The deadline passed before an answer came."""

    status = 504

    def __init__(self, what: str, timeout_s: float) -> None:
        super().__init__(what, timeout_s)
        self.what, self.timeout_s = what, timeout_s

    def __str__(self) -> str:
        return f"{self.what} did not answer within {self.timeout_s:g} s"


class StreamBroken(PenstockError):
    """An answer that streams cannot go on. What came of it stands; to run it again would send that twice."""

    status = 502

    def __init__(self, backend: str, request_id: str, reason: str) -> None:
        super().__init__(backend, request_id, reason)
        self.backend, self.request_id, self.reason = backend, request_id, reason

    def __str__(self) -> str:
        return f"the answer of {self.backend!r} to request {self.request_id!r} broke off: {self.reason}"


# What replicas may say over the wire: built from its arguments here, never by name from anywhere else.
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
        MalformedBody,
        NotPermitted,
        Overloaded,
        PayloadTooLarge,
        RequestCancelled,
        RequestTimeout,
        StreamBroken,
        WireError,
    )
}


def to_wire(error: PenstockError) -> dict[str, Any]:
    """Return ``error`` as the JSON object that a reply carries."""
    return {"kind": type(error).__name__, "args": list(error.args)}


def from_wire(raw: Mapping[str, Any]) -> PenstockError:
    """Return the error that `to_wire` wrote; one of a kind unknown here is a plain `PenstockError` that quotes it."""
    kind, args = raw.get("kind"), raw.get("args")
    known = _KINDS.get(kind) if isinstance(kind, str) else None
    if known is not None and isinstance(args, list):
        try:
            error = known(*args)  # pyright: ignore[reportUnknownArgumentType]
            if str(error) and _is_status(error.status):
                return error
        except Exception:
            pass  # a later release may give it other arguments
    return PenstockError(f"{kind}: {args}")


def _is_status(status: object) -> bool:
    return type(status) is int and 100 <= status <= 599


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names)) if names else "none"
