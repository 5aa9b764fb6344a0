"""Errors of the broker: of the connection to Redis, of its replies and of its queues.

::

    PenstockError
    ├── BrokerRefused           Redis answered with an error
    │   ├── BrokerFull
    │   ├── NotPermitted
    │   └── StringTooLong
    ├── BrokerUnavailable
    ├── ConfigError (a ValueError)
    ├── Overloaded
    └── WireError

`EmbeddedServerError`, a ``RuntimeError``, stands apart. Other errors that calls of a backend raise are in
``handles/errors.py``.
"""

from __future__ import annotations

__all__ = [
    "BrokerFull",
    "BrokerRefused",
    "BrokerUnavailable",
    "ConfigError",
    "EmbeddedServerError",
    "NotPermitted",
    "Overloaded",
    "PenstockError",
    "StringTooLong",
    "WireError",
]

RULES = "docs/security.md has the rules that each role needs"
"""The hint in errors about missing permissions."""

NO_CLUSTER = (
    "Penstock needs one server that has all keys; give the URL of one without cluster mode, or that of sentinels "
    "(docs/operations.md)"
)
"""The hint in errors about nodes of a cluster."""


class PenstockError(Exception):
    """The base class of all errors that Penstock raises deliberately, except ``TypeError``.

    Each subclass passes all its arguments to its base, because unpickling rebuilds an exception from ``args``.
    """

    status: int = 500
    """The status of the proxy's HTTP response (RFC 9110, section 15)."""


class EmbeddedServerError(RuntimeError):
    """An embedded server could not be started. The message has the reason and, if there is one, the way out."""


class WireError(PenstockError):
    """An entry or a registry record cannot be read: it is malformed, or of another wire version."""


class ConfigError(PenstockError, ValueError):
    """An argument or a setting has an invalid value: the message names it, the value and what is allowed."""

    status = 400


class BrokerUnavailable(PenstockError):
    """Redis cannot be reached, or the connection was lost before the reply to a command.

    Retry after ``retry_after_s`` seconds.
    """

    status = 503

    def __init__(self, url: str, reason: str, retry_after_s: float = 1.0) -> None:
        super().__init__(url, reason, retry_after_s)
        self.url, self.reason, self.retry_after_s = url, reason, retry_after_s

    def __str__(self) -> str:
        return f"the broker at {self.url} is unavailable: {self.reason}"


class BrokerRefused(PenstockError):
    """Redis answered a command with an error.

    ``message`` is its text, ``command`` the command with its keys, ``user`` the Redis user of the connection.
    """

    status = 503

    def __init__(self, message: str, command: str, url: str, user: str = "") -> None:
        super().__init__(message, command, url, user)
        self.message, self.command, self.url, self.user = message, command, url, user

    def __str__(self) -> str:
        return f"the broker at {self.url} refused {self.command}: {self.message}"


class BrokerFull(BrokerRefused):
    """Redis has reached its memory limit (``OOM``)."""

    def __str__(self) -> str:
        return f"the broker at {self.url} has no memory left for {self.command}: {self.message}"


class StringTooLong(BrokerRefused):
    """A string is longer than Redis accepts (``proto-max-bulk-len``)."""

    status = 413


class NotPermitted(BrokerRefused):
    """The Redis user of the URL lacks a permission (``NOPERM``); ``user`` is its name, "" for the default user."""

    status = 500

    def __str__(self) -> str:
        user = self.user or "default"
        return f"the Redis user {user!r} may not do {self.command} at {self.url}: {self.message} ({RULES})"


class Overloaded(PenstockError):
    """The backend's queue is full, or the broker is out of memory: the request was not accepted.

    ``depth`` and ``limit`` are numbers of unsettled requests, or bytes if ``size_bytes``, the size of the refused
    request, is given. Retry after ``retry_after_s`` seconds.
    """

    status = 503

    def __init__(
        self, backend: str, depth: int, limit: int, retry_after_s: float = 1.0, size_bytes: int | None = None
    ) -> None:
        super().__init__(backend, depth, limit, retry_after_s, size_bytes)
        self.backend, self.depth, self.limit, self.retry_after_s = backend, depth, limit, retry_after_s
        self.size_bytes = size_bytes

    def __str__(self) -> str:
        if self.size_bytes is not None:
            return (
                f"the unsettled requests of {self.backend!r} take {self.depth} bytes, and this one has "
                f"{self.size_bytes} more (max_queued_bytes is {self.limit}); retry in {self.retry_after_s:g} s"
            )
        if self.depth < self.limit:
            return f"the broker has no memory left for requests to {self.backend!r}; retry in {self.retry_after_s:g} s"
        return (
            f"{self.backend!r} has {self.depth} unsettled requests (max_queued_requests is {self.limit}); "
            f"retry in {self.retry_after_s:g} s"
        )
