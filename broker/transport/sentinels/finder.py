"""Search for the primary of a service: asks the sentinels of a URL, one after the other, until one knows it.

The procedure is that of https://redis.io/docs/latest/develop/reference/sentinel-clients/. A sentinel that did not
answer, or named a server that is not the primary, is asked last the next time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, cast

import redis
from redis import exceptions as redis_errors
from redis.asyncio.connection import Connection, parse_url as parse_asyncio_url
from redis.asyncio.retry import Retry as AsyncioRetry
from redis.backoff import NoBackoff
from redis.connection import parse_url  # pyright: ignore[reportUnknownVariableType]
from redis.retry import Retry

from ..url import redis_options, shown_url
from .url import SentinelService

ASK_S = 1.0
"""How long connecting to a sentinel, and its answer, may each take."""

WATCH_S = 1.0
"""Seconds between questions whether the primary is still the same."""

_COMMAND = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME")


class PrimaryFinder:
    """Finds the primary of ``service``, again and again. Keeps one connection to a sentinel open meanwhile."""

    def __init__(self, service: SentinelService) -> None:
        self._service = service
        self._sentinels = deque((url, _asyncio_connection(url)) for url in service.sentinel_urls)

    async def find(self) -> tuple[str, int]:
        """Return the host and port of the primary.

        Raises:
            redis_errors.ConnectionError: no sentinel knows the service, or none answers.
        """
        problems: list[str] = []
        for _ in range(len(self._sentinels)):
            url, connection = self._sentinels[0]
            try:
                await cast("Coroutine[Any, Any, None]", connection.connect())  # type: ignore[no-untyped-call]
                await connection.send_command(*_COMMAND, self._service.name)
                answer = await cast("Awaitable[Any]", connection.read_response())
                return _address_in(answer, self._service.name)
            except (OSError, redis_errors.RedisError, asyncio.TimeoutError) as e:
                problems.append(f"{shown_url(url)}: {e}")
                await _disconnect(connection)
                self.doubt()
            except BaseException:  # cancelled between the question and the answer
                await _disconnect(connection)
                raise
        raise _not_found(self._service, problems)

    def doubt(self) -> None:
        """Query the sentinel that answered last after all others the next time: its address turned out to be wrong."""
        self._sentinels.rotate(-1)

    async def watch(self, address: tuple[str, int], on_moved: Callable[[str], None]) -> None:
        """Return when a sentinel names another primary than ``address``, and call ``on_moved`` with the reason.

        Silent sentinels prove nothing: the primary may be well.
        """
        while True:
            await asyncio.sleep(WATCH_S)
            with contextlib.suppress(redis_errors.ConnectionError):
                if (now := await self.find()) != address:
                    on_moved(f"the sentinels name another primary, {now[0]}:{now[1]}")
                    return

    async def close(self) -> None:
        """Close the connections to sentinels. `find` opens them again."""
        for _, connection in self._sentinels:
            await _disconnect(connection)


class BlockingPrimaryFinder:
    """`PrimaryFinder` for threads."""

    def __init__(self, service: SentinelService, timeout_s: float = ASK_S) -> None:
        self._service = service
        self._sentinels = deque((url, _client(url, timeout_s)) for url in service.sentinel_urls)

    def find(self) -> tuple[str, int]:
        """Return the host and port of the primary. Raises as `PrimaryFinder.find` does."""
        problems: list[str] = []
        for _ in range(len(self._sentinels)):
            url, client = self._sentinels[0]
            try:
                answer = cast(Any, client.execute_command(*_COMMAND, self._service.name))  # type: ignore[no-untyped-call]
                return _address_in(answer, self._service.name)
            except redis_errors.RedisError as e:
                problems.append(f"{shown_url(url)}: {e}")
                self.doubt()
        raise _not_found(self._service, problems)

    def doubt(self) -> None:
        """See `PrimaryFinder.doubt`."""
        self._sentinels.rotate(-1)

    def close(self) -> None:
        for _, client in self._sentinels:
            client.connection_pool.disconnect()


def _asyncio_connection(url: str) -> Connection:
    options = redis_options(url, parse_asyncio_url)
    kind: type[Connection] = options.pop("connection_class", Connection)
    options.update(protocol=2, client_name="penstock-sentinel", retry=AsyncioRetry(NoBackoff(), 0))
    options.update(socket_timeout=ASK_S, socket_connect_timeout=ASK_S)
    return kind(**options)


def _client(url: str, timeout_s: float) -> redis.Redis:
    options = redis_options(url, parse_url)  # pyright: ignore[reportUnknownArgumentType]
    options.update(protocol=2, client_name="penstock-sentinel", retry=Retry(NoBackoff(), 0))
    options.update(socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
    return redis.Redis(connection_pool=redis.ConnectionPool(**options))


async def _disconnect(connection: Connection) -> None:
    # The socket is closed in any case, so an error here needs no handling.
    with contextlib.suppress(OSError, redis_errors.RedisError, asyncio.TimeoutError):
        await connection.disconnect(nowait=True)


def _address_in(answer: Any, service: str) -> tuple[str, int]:
    match answer:
        case [host, port]:
            # redis-py's callbacks of some versions have decoded it.
            return host.decode() if isinstance(host, bytes) else str(host), int(port)
        case _:
            raise redis_errors.ResponseError(f"it knows no service {service!r}")


def _not_found(service: SentinelService, problems: list[str]) -> redis_errors.ConnectionError:
    return redis_errors.ConnectionError(f"no sentinel names a primary of {service.name!r} ({'; '.join(problems)})")
