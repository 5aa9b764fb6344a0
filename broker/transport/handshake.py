"""Handshake with a server: connect and log in, check what it is and whether it accepts writes, read its clock."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

from redis import exceptions as redis_errors
from redis.asyncio.connection import Connection

from ..errors import RULES
from .clock import Clock
from .dial import CONNECT_S, GREETING, check_greeting, new_connection
from .error_replies import MEMORY, NOT_PRIMARY, TEMPORARY
from .sentinels.finder import PrimaryFinder
from .url import sentinel_service
from .write_probe import WRITE_PROBE

T = TypeVar("T")

_CANCEL_AGAIN_S = 5.0
"""A task that has not ended this long after its cancellation is cancelled again: it may take a second to clean up."""

_CODES: tuple[tuple[type[redis_errors.RedisError], str], ...] = (
    (redis_errors.MasterDownError, "MASTERDOWN"),
    (redis_errors.ClusterDownError, "CLUSTERDOWN"),
    (redis_errors.TryAgainError, "TRYAGAIN"),
    (redis_errors.ReadOnlyError, "READONLY"),
    (redis_errors.BusyLoadingError, "LOADING"),
    (redis_errors.OutOfMemoryError, MEMORY),
    (redis_errors.NoPermissionError, "NOPERM"),
)


class Greeted(NamedTuple):
    """A connection that has completed its handshake."""

    transport: asyncio.Transport
    refusal: str
    """The temporary error with which the server refuses writes; "" if it accepts them."""


class Handshake:
    """Connects to one server, again and again, with one redis-py connection.

    Raises `ConfigError` for a wrong URL or option.
    """

    def __init__(self, url: str, name: str) -> None:
        self._redis = new_connection(url, name)
        service = sentinel_service(url)
        self._finder = PrimaryFinder(service) if service is not None else None
        self._primary: tuple[str, int] | None = None
        """The server that a sentinel named last."""
        self._watch: asyncio.Task[None] | None = None

    async def connect(self, clock: Clock) -> Greeted:
        """Connect to the server, and set ``clock`` to its time.

        Raises:
            OSError, asyncio.TimeoutError, redis_errors.RedisError, UnicodeError: the server cannot be reached, rejects
                the login or is not the primary. `is_permanent` and `reason_of` interpret the error.
            WrongServer: it is a node of a cluster, or a sentinel.
        """
        if self._finder is None:
            return await self._greet(clock)
        assert isinstance(self._redis, Connection)
        self._primary = self._redis.host, self._redis.port = await self._finder.find()
        try:
            return await self._greet(clock)
        except (OSError, redis_errors.RedisError, asyncio.TimeoutError):
            self._finder.doubt()
            raise

    async def _greet(self, clock: Clock) -> Greeted:
        await wait_for(CONNECT_S, cast("Coroutine[Any, Any, None]", self._redis.connect()))  # type: ignore[no-untyped-call]
        # A server that loads its append-only file answers TIME, but not PING.
        await self._execute("PING")
        with contextlib.suppress(redis_errors.ResponseError):  # a proxy between may not know the command
            check_greeting(await self._execute(GREETING))
        refusal = await self._refusal_of_writes()
        await clock.read(partial(self._execute, "TIME"))
        writer = self._redis._writer  # pyright: ignore[reportPrivateUsage]
        assert writer is not None
        return Greeted(cast(asyncio.Transport, writer.transport), refusal)

    def watch_primary(self, on_moved: Callable[[str], None]) -> None:
        """Call ``on_moved`` with the reason when sentinels name another primary; until `disconnect`."""
        if self._finder is not None and self._primary is not None:
            watching = self._finder.watch(self._primary, on_moved)
            self._watch = asyncio.get_running_loop().create_task(watching, name="watch of the primary")

    async def disconnect(self, *, wait: bool) -> None:
        """Close the socket; with ``wait``, return when it is closed."""
        if self._watch is not None:
            self._watch.cancel()
            await end_of_cancelled(self._watch)
            self._watch = None
        if self._finder is not None and wait:
            await self._finder.close()
        # The socket is closed in any case, so an error here needs no handling.
        with contextlib.suppress(OSError, redis_errors.RedisError, asyncio.TimeoutError):
            await wait_for(1.0, self._redis.disconnect(nowait=not wait))

    async def _refusal_of_writes(self) -> str:
        """Return the temporary error with which the server refuses writes, or "". Raises: the server is no primary."""
        try:
            await self._execute("EVAL", WRITE_PROBE.text, "0")
        except redis_errors.ResponseError as e:
            code = code_of(e)
            if code in NOT_PRIMARY:
                raise
            if code in TEMPORARY:
                return str(e)
        return ""  # a user without the right to run scripts gets that error from the first script it needs

    async def _execute(self, *args: str) -> Any:
        await wait_for(CONNECT_S, self._redis.send_command(*args))
        return await wait_for(CONNECT_S, self._redis.read_response())  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def code_of(error: redis_errors.RedisError) -> str:
    """Return the first word of an error reply, which redis-py removes from the errors that it has classes for."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return str(error).partition(" ")[0]


def is_permanent(error: BaseException) -> bool:
    """Return whether connecting again cannot help: the server rejected the login, or its certificate is invalid."""
    return _is(error, redis_errors.AuthenticationError, redis_errors.NoPermissionError, ssl.SSLCertVerificationError)


def _is(error: BaseException, *kinds: type[BaseException]) -> bool:
    """Return whether ``error``, or the error that redis-py wrapped in it while connecting, is one of ``kinds``."""
    return isinstance(error, kinds) or isinstance(error.__cause__ or error.__context__, kinds)


def reason_of(error: BaseException) -> str:
    """Return why connecting failed, with a pointer to the documentation if a permission is missing."""
    reason = str(error) or type(error).__name__
    return f"{reason} ({RULES})" if _is(error, redis_errors.NoPermissionError) else reason


async def end_of_cancelled(task: asyncio.Task[Any]) -> None:
    """Return when a cancelled task has ended. redis-py may lose a cancellation that coincides with its own timeout."""
    while not (await asyncio.wait([task], timeout=_CANCEL_AGAIN_S))[0]:
        task.cancel()


async def wait_for(seconds: float, awaitable: Awaitable[T]) -> T:
    """Like ``asyncio.wait_for``, but a cancellation that coincides with the result is raised (also Python < 3.12)."""
    task = asyncio.ensure_future(awaitable)
    try:
        done, _ = await asyncio.wait([task], timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait([task])
        raise
    if not done:
        task.cancel()
        await asyncio.wait([task])
        if task.cancelled():
            raise asyncio.TimeoutError
    return task.result()
