"""Memory budget of a proxy for bodies: those of unanswered requests, and of replies that clients have not read yet.

The body of a request counts from its first byte until the response, because the request is published again if the
broker loses it. A reply counts until the kernel has taken it. Beyond the budget the proxy refuses requests with 503.
"""

from __future__ import annotations

from collections.abc import Callable

from ...handles.errors import PenstockError
from ...runtime.machine_memory import memory_bytes


class BuffersFull(PenstockError):
    """The proxy's budget for bodies (``max_buffered_bytes``) is used up: the request was not accepted."""

    status = 503

    def __init__(self, used: int, limit: int, retry_after_s: float = 1.0) -> None:
        super().__init__(used, limit, retry_after_s)
        self.used, self.limit, self.retry_after_s = used, limit, retry_after_s

    def __str__(self) -> str:
        return (
            f"the proxy holds {self.used} bytes of bodies, too many to accept this request "
            f"(max_buffered_bytes is {self.limit}); retry in {self.retry_after_s:g} s"
        )


class Buffers:
    """Bytes of bodies in one proxy, over all its connections."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.requests_bytes = 0
        self.replies_bytes = 0
        """An upper bound; `measure` replaces it by the exact value before a request is refused."""
        self.measure: Callable[[], int] = lambda: 0
        """Returns the bytes of replies that the kernel has not taken yet. Set once the server exists."""

    def may_be_full(self) -> bool:
        """Return whether the budget is used up by the estimate, so that `check` has to measure."""
        return self.requests_bytes + self.replies_bytes > self.limit_bytes

    def check(self, size: int) -> None:
        """Raise `BuffersFull` if there is no room for ``size`` more bytes."""
        if self.requests_bytes + self.replies_bytes + size <= self.limit_bytes:
            return
        self.replies_bytes = self.measure()
        if (used := self.requests_bytes + self.replies_bytes) + size > self.limit_bytes:
            raise BuffersFull(used, self.limit_bytes)

    def reserve(self, size: int) -> None:
        """Reserve ``size`` bytes for the body of a request.

        Raises:
            BuffersFull: there is no room for them. Nothing is reserved.
        """
        self.check(size)
        self.requests_bytes += size

    def release(self, size: int) -> None:
        """Give back ``size`` bytes that were reserved."""
        self.requests_bytes -= size


def default_bytes(max_body_bytes: int, proxies: int = 1) -> int:
    """Return the default budget: an eighth of the machine's or container's memory, divided among its proxies.

    It is at least ``max_body_bytes``, so that one body of that size has room.
    """
    return max(max_body_bytes, memory_bytes() // 8 // proxies)
