"""Budget of a proxy for bodies: bytes of requests that it holds, and of replies that its clients have not read yet.

A request's body is held from its first byte until the request is answered, as it is published again if the broker loses
it. A reply is held until the kernel has taken it. Beyond the budget the proxy refuses requests with 503.
"""

from __future__ import annotations

from collections.abc import Callable

from ...handles.errors import PenstockError
from ...runtime.machine_memory import memory_bytes


class BuffersFull(PenstockError):
    """The proxy holds as many bytes of bodies as it may: the request was not accepted."""

    status = 503

    def __init__(self, held: int, limit: int, retry_after_s: float = 1.0) -> None:
        super().__init__(held, limit, retry_after_s)
        self.held, self.limit, self.retry_after_s = held, limit, retry_after_s

    def __str__(self) -> str:
        return (
            f"the proxy holds {self.held} bytes of bodies, too many for this request (max_buffered_bytes is "
            f"{self.limit}); retry in {self.retry_after_s:g} s"
        )


class Buffers:
    """What one proxy holds, over all connections."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.requests_bytes = 0
        self.replies_bytes = 0
        """An upper bound, made exact by `measure` before anything is refused for it."""
        self.measure: Callable[[], int] = lambda: 0
        """Returns the bytes of replies that the kernel has not taken yet. Set by whoever has the server."""

    def check(self, size: int) -> None:
        """Raise `BuffersFull` if there is no room for ``size`` more bytes."""
        if self.requests_bytes + self.replies_bytes + size <= self.limit_bytes:
            return
        self.replies_bytes = self.measure()
        if (held := self.requests_bytes + self.replies_bytes) + size > self.limit_bytes:
            raise BuffersFull(held, self.limit_bytes)

    def hold(self, size: int) -> None:
        """Count ``size`` bytes of a request. Raises `BuffersFull`, and counts nothing, if there is no room for them."""
        self.check(size)
        self.requests_bytes += size

    def release(self, size: int) -> None:
        self.requests_bytes -= size


def default_bytes(max_body_bytes: int, proxies: int = 1) -> int:
    """Return an eighth of the memory of this machine or container, shared by its proxies; room for a body at least."""
    return max(max_body_bytes, memory_bytes() // 8 // proxies)
