"""redis-py connections for a Redis URL: TCP, TLS or Unix socket, AUTH and client name; and the server's greeting."""

from __future__ import annotations

import socket
from typing import Any

from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection, Connection as _TcpConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.driver_info import DriverInfo

from ..errors import NO_CLUSTER, BrokerUnavailable, ConfigError
from .url import redis_options, sentinel_service, shown_url

CONNECT_S = 5.0
"""How long connecting, and each command of the handshake, may take."""
_CONNECT_TO_PRIMARY_S = 1.5
"""How long connecting to a server that sentinels named may take: a machine that is gone does not answer."""
_LISTENS_S = 0.5
"""How long `check_listens` waits for a connection that is neither made nor refused."""

_DRIVER = DriverInfo()
"""How redis-py names itself to the server. Its default looks up a version for each connection, in a millisecond."""

GREETING = "HELLO"
"""The command whose reply describes the server. Every user may send it, whatever the ACL rules are."""


class WrongServer(redis_errors.RedisError):
    """The URL leads to a server of a kind that cannot be a broker. Connecting again cannot help."""


def check_greeting(reply: list[Any]) -> None:
    """Check the reply to `GREETING`.

    Raises:
        WrongServer: the server is a node of a cluster, or a sentinel.
    """
    fields = {_text(name): _text(value) for name, value in zip(reply[::2], reply[1::2], strict=False)}
    kind = f"{fields.get('server', 'a server')} {fields.get('version', '')}".strip()
    if fields.get("mode") == "cluster":
        raise WrongServer(f"it is a node of a cluster ({kind}, mode cluster): {NO_CLUSTER}")
    if fields.get("mode") == "sentinel":
        raise WrongServer(
            f"it is a sentinel ({kind}): to reach the primary that it watches, write the URL as "
            "redis+sentinel://host:port/service"
        )


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def user_of(url: str) -> str:
    """Return the Redis user in ``url``, or "". Raises `ConfigError` if it is not a Redis URL."""
    return str(redis_options(url, parse_url).get("username") or "")


def check_listens(url: str) -> None:
    """Check at once whether the broker accepts connections. A `RedisConnection` would try again for 5 s.

    Raises:
        ConfigError: ``url`` is not a Redis URL.
        BrokerUnavailable: a connection was refused.
    """
    if sentinel_service(url) is not None:
        return  # Its own connection asks one sentinel after the other.
    options = redis_options(url, parse_url)
    try:
        if (path := options.get("path")) is not None:
            with socket.socket(socket.AF_UNIX) as connecting:
                connecting.settimeout(_LISTENS_S)
                connecting.connect(path)
        else:
            address = options.get("host", "localhost"), int(options.get("port", 6379))
            socket.create_connection(address, timeout=_LISTENS_S).close()
    except TimeoutError:
        return  # It may be slow. The connection that follows waits longer.
    except OSError as e:
        raise BrokerUnavailable(shown_url(url), e.strerror or str(e)) from None


def new_connection(url: str, name: str) -> AbstractConnection:
    """Return an unconnected redis-py connection to ``url``. Raises `ConfigError` for a wrong URL or option."""
    options = redis_options(url, parse_url)
    kind: type[AbstractConnection] = options.pop("connection_class", _TcpConnection)
    # RESP2: plain lists, the same from every server; RESP3 measured no faster. No socket timeout, as each send would
    # go through `wait_for`: `Session` detects silent servers. No retries: `RedisConnection` has its own.
    retry = Retry(NoBackoff(), 0)
    connect_s = CONNECT_S if sentinel_service(url) is None else _CONNECT_TO_PRIMARY_S
    options.update(
        protocol=2,
        client_name=name,
        driver_info=_DRIVER,
        socket_timeout=None,
        socket_connect_timeout=connect_s,
        retry=retry,
    )
    try:
        return kind(**options)
    except (TypeError, ValueError, redis_errors.RedisError) as e:
        raise ConfigError(f"the options of {shown_url(url)!r} are not Redis's: {e}") from None
