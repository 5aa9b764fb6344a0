"""Errors between a process and its broker.

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

The errors that a caller of a backend sees besides these are in ``handles/errors.py``.
"""

from __future__ import annotations

__all__ = [
    "BrokerFull",
    "BrokerRefused",
    "BrokerUnavailable",
    "ConfigError",
    "NotPermitted",
    "Overloaded",
    "PenstockError",
    "StringTooLong",
    "WireError",
]

RULES = "docs/security.md has the rules that each role needs"


class PenstockError(Exception):
    """The root of every error that Penstock raises on purpose, ``TypeError`` apart.

    Each class hands all its arguments to its base, as exceptions are rebuilt from ``args`` when they cross processes.
    """

    status: int = 500
    """The HTTP status that a proxy answers with (RFC 9110, section 15)."""


class WireError(PenstockError):
    """What lies on a stream is not what this process can read."""


class ConfigError(PenstockError, ValueError):
    """A value that cannot be: the message names it, what was met and what is allowed."""

    status = 400


class BrokerUnavailable(PenstockError):
    """Redis cannot be reached, or went away before it could say what became of a command."""

    status = 503

    def __init__(self, url: str, reason: str, retry_after_s: float = 1.0) -> None:
        super().__init__(url, reason, retry_after_s)
        self.url, self.reason, self.retry_after_s = url, reason, retry_after_s

    def __str__(self) -> str:
        return f"the broker at {self.url} is unavailable: {self.reason}"


class BrokerRefused(PenstockError):
    """Redis answered a command with an error. ``said`` is what it said, ``command`` what it was asked for."""

    status = 503

    def __init__(self, said: str, command: str, url: str, user: str = "") -> None:
        super().__init__(said, command, url, user)
        self.said, self.command, self.url, self.user = said, command, url, user

    def __str__(self) -> str:
        return f"{self.said}: that is what the broker at {self.url} answered to {self.command}"


class BrokerFull(BrokerRefused):
    """Redis has no memory left."""

    def __str__(self) -> str:
        return f"the broker at {self.url} has no memory left for {self.command}: {self.said}"


class StringTooLong(BrokerRefused):
    """Redis takes no string of that many bytes."""

    status = 413


class NotPermitted(BrokerRefused):
    """The Redis user of the URL may not do what that takes; ``user`` is its name."""

    status = 500

    def __str__(self) -> str:
        return (
            f"the Redis user {self.user or 'default'!r} may not do {self.command} at {self.url}: {self.said} ({RULES})"
        )


class Overloaded(PenstockError):
    """The backend's queue is full, or the broker is out of memory: the request was not accepted.

    ``depth`` and ``limit`` are numbers of requests; where ``size_bytes`` is given, the size of the request, they are
    bytes.
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
