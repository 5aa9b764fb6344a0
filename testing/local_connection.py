"""A connection to a queue in memory, for what callers and replicas do with a connection to Redis themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from ..broker.errors import PenstockError
from ..broker.transport.commands import Arg, Script, Then
from ..broker.transport.connection import RedisConnection
from .local_queue import LocalQueue


class NeedsBroker(PenstockError):
    """A feature that stores something in Redis was used with ``penstock.testing.local``, which has none."""

    status = 501

    def __str__(self) -> str:
        return (
            "submitted requests and idempotency keys are stored in Redis, which penstock.testing.local does without: "
            "test them with serve.start()"
        )


class LocalConnection(RedisConnection):
    """Stores large bodies in the queue. Any other command fails with `NeedsBroker`."""

    def __init__(self, url: str, queue: LocalQueue) -> None:
        super().__init__(url)
        self._queue = queue
        self._running_loop = asyncio.get_running_loop()

    @property
    def connected(self) -> bool:
        return True

    async def open(self) -> LocalConnection:
        return self

    async def close(self) -> None:
        pass

    def flush_if_idle(self) -> None:
        pass

    def join_write(self, fill: Callable[[], None]) -> None:
        self._running_loop.call_soon(fill)

    def post(self, then: Then, *args: Arg, **options: Any) -> None:
        self._running_loop.call_soon(then, self._result_of(args))

    def send(self, *args: Arg, **options: Any) -> asyncio.Future[Any]:
        return self._resolved(self._result_of(args))

    def post_script(self, then: Then, script: Script, keys: Sequence[str], args: Sequence[Arg], **options: Any) -> None:
        self._running_loop.call_soon(then, NeedsBroker())

    def run_script(
        self, script: Script, keys: Sequence[str], args: Sequence[Arg], **options: Any
    ) -> asyncio.Future[Any]:
        return self._resolved(NeedsBroker())

    def _resolved(self, result: Any) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._running_loop.create_future()
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
        return future

    def _result_of(self, command: tuple[Arg, ...]) -> Any:
        """Carry out a command on a large body."""
        bodies = self._queue.bodies
        match command:
            case ("SET", str(key), bytes(body), *_):
                bodies[key] = body
                return b"OK"
            case ("GET", str(key)):
                return bodies.get(key)
            case ("UNLINK", str(key)):
                return int(bodies.pop(key, None) is not None)
            case _:
                return NeedsBroker()
