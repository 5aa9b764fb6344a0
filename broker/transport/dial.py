"""redis-py connections for a Redis URL: TCP, TLS or Unix socket, AUTH and client name."""

from __future__ import annotations

from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection, Connection as _TcpConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from ..errors import ConfigError
from .url import redis_options, shown_url

CONNECT_S = 5.0
"""How long connecting, and each command of the handshake, may take."""


def user_of(url: str) -> str:
    """Return the Redis user in ``url``, or "". Raises `ConfigError` if it is not a Redis URL."""
    return str(redis_options(url, parse_url).get("username") or "")


def new_connection(url: str, name: str) -> AbstractConnection:
    """Return an unconnected redis-py connection to ``url``. Raises `ConfigError` for a wrong URL or option."""
    options = redis_options(url, parse_url)
    kind: type[AbstractConnection] = options.pop("connection_class", _TcpConnection)
    # RESP2: plain lists, the same from every server; RESP3 measured no faster. No socket timeout, as each send would
    # go through `wait_for`: `Session` detects silent servers. No retries: `RedisConnection` has its own.
    retry = Retry(NoBackoff(), 0)
    options.update(protocol=2, client_name=name, socket_timeout=None, socket_connect_timeout=CONNECT_S, retry=retry)
    try:
        return kind(**options)
    except (TypeError, ValueError, redis_errors.RedisError) as e:
        raise ConfigError(f"the options of {shown_url(url)!r} are not Redis's: {e}") from None
