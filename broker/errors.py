"""What can go wrong between a process and its broker.

::

    PenstockError
    ├── BrokerUnavailable
    ├── ConfigError (a ValueError)
    ├── Overloaded
    └── WireError

The errors that a caller of a backend sees besides these are in ``handles/errors.py``.
"""

from __future__ import annotations

# What a server says against a command are redis-py's classes. Whoever may import only `broker` catches them by these.
from redis.exceptions import NoPermissionError, OutOfMemoryError, RedisError, ResponseError

__all__ = [
    "BrokerUnavailable",
    "ConfigError",
    "NoPermissionError",
    "OutOfMemoryError",
    "Overloaded",
    "PenstockError",
    "RedisError",
    "ResponseError",
    "WireError",
]


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


class Overloaded(PenstockError):
    """The backend's queue is full, or the broker is out of memory: the request was not accepted."""

    status = 503

    def __init__(self, backend: str, depth: int, limit: int, retry_after_s: float = 1.0) -> None:
        super().__init__(backend, depth, limit, retry_after_s)
        self.backend, self.depth, self.limit, self.retry_after_s = backend, depth, limit, retry_after_s

    def __str__(self) -> str:
        if self.depth < self.limit:
            return f"the broker has no memory left for requests to {self.backend!r}; retry in {self.retry_after_s:g} s"
        return (
            f"{self.backend!r} has {self.depth} unsettled requests (max_queued_requests is {self.limit}); "
            f"retry in {self.retry_after_s:g} s"
        )
