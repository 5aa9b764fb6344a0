"""Request bodies: limited in size and in the time they take."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping
from typing import Any

from starlette.types import Receive

from ..handles.errors import MalformedBody, PayloadTooLarge, PenstockError
from .disconnects import ClientDisconnected


class SlowBody(PenstockError):
    """The client did not send its whole body in time."""

    status = 408

    def __init__(self, received: int, timeout_s: float) -> None:
        super().__init__(received, timeout_s)
        self.received, self.timeout_s = received, timeout_s

    def __str__(self) -> str:
        return f"only {self.received} bytes of the body came within {self.timeout_s:g} s"


def has_body(headers: Mapping[bytes, bytes]) -> bool:
    """Say whether an HTTP/1.1 request has a body (RFC 9112, section 6.3).

    Where it has none, `receive` need not be called: that saves a fast request a turn through the server.
    """
    return b"content-length" in headers or b"transfer-encoding" in headers


def _no_budget(size: int) -> None:
    """Count nothing."""


async def read_body(
    receive: Receive,
    headers: Mapping[bytes, bytes],
    *,
    limit: int,
    timeout_s: float,
    hold: Callable[[int], None] = _no_budget,
    check: Callable[[int], None] = _no_budget,
) -> bytes:
    """Return the whole body.

    ``hold`` gets the size of each piece as it comes, ``check`` the declared length before; what they raise ends it.

    Raises:
        PayloadTooLarge: it is longer than ``limit``; by its declared length before anything of it is read.
        MalformedBody: its declared length is no number.
        SlowBody: it was not complete after ``timeout_s``.
        HungUp: the client went away before the end.
    """
    declared = headers.get(b"content-length")
    if declared is not None:
        if not declared.isdigit():
            raise MalformedBody(f"the content-length {declared.decode('latin-1')!r} is not a number")
        if len(declared) > 18 or int(declared) > limit:
            raise PayloadTooLarge(int(declared[:19]), limit)
        check(int(declared))
    deadline = _Deadline(timeout_s)
    chunks: list[bytes] = []
    size = 0
    try:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnected
            chunk: bytes = message.get("body", b"")
            size += len(chunk)
            if size > limit:
                raise PayloadTooLarge(size, limit)
            hold(len(chunk))
            chunks.append(chunk)
            if not message.get("more_body", False):
                return chunk if len(chunks) == 1 else b"".join(chunks)
    except asyncio.CancelledError:
        if deadline.took_back():
            raise SlowBody(size, timeout_s) from None
        raise
    finally:
        deadline.cancel()


class _Deadline:
    """Cancels the running task after a time.

    ``asyncio.timeout`` needs Python 3.11, and before 3.12 ``wait_for`` makes a task for each thing that it waits for.
    """

    def __init__(self, timeout_s: float) -> None:
        task: asyncio.Task[Any] | None = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = 0
        if sys.version_info >= (3, 11):
            self._cancelling = task.cancelling()
        self._passed = False
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self._pass)

    def _pass(self) -> None:
        self._passed = True
        self._task.cancel()

    def took_back(self) -> bool:
        """Say whether the cancellation was ours alone, and forget it."""
        if not self._passed:
            return False
        if sys.version_info >= (3, 11):
            return self._task.uncancel() <= self._cancelling
        return True

    def cancel(self) -> None:
        self._timer.cancel()
