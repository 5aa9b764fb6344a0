"""What a connection has from redis-py: the way to a server (URL, TLS, AUTH, name), and classes for what that says."""

from __future__ import annotations

import ssl

from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection, Connection as _TcpConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from .address import redis_options, shown_url
from .errors import ConfigError

CONNECT_S = 5.0

_ERRORS: dict[str, type[redis_errors.RedisError]] = {
    "LOADING": redis_errors.BusyLoadingError,
    "NOPERM": redis_errors.NoPermissionError,
    "NOSCRIPT": redis_errors.NoScriptError,
    "OOM": redis_errors.OutOfMemoryError,
    "READONLY": redis_errors.ReadOnlyError,
}
_DENIED_IN_SCRIPT = ("ERR The user executing the script can't", "ERR ACL failure in script")
"""What servers say instead of ``NOPERM`` where a script meets what its user may not: up to Redis 7.0, and since."""


def user_of(url: str) -> str:
    """Return the Redis user that ``url`` names; empty if it names none. Raises `ConfigError`: it is no Redis URL."""
    return str(redis_options(url, parse_url).get("username") or "")


def link_to(url: str, name: str) -> AbstractConnection:
    """Return what connects to ``url``. Raises `ConfigError`: it is no Redis URL, or one of its options cannot be."""
    options = redis_options(url, parse_url)
    kind: type[AbstractConnection] = options.pop("connection_class", _TcpConnection)
    # RESP2: plain lists, the same from every server; RESP3 measured no faster. No socket timeout: each send would go
    # through `wait_for`, and `Connection` notices silence. Nor its retries: that has its own.
    retry = Retry(NoBackoff(), 0)
    options.update(protocol=2, client_name=name, socket_timeout=None, socket_connect_timeout=CONNECT_S, retry=retry)
    try:
        return kind(**options)
    except (TypeError, ValueError, redis_errors.RedisError) as e:
        raise ConfigError(f"the options of {shown_url(url)!r} are not Redis's: {e}") from None


def turned_away(error: BaseException) -> bool:
    """Whether the server will not have us, or we not it. redis-py wraps what goes wrong while it connects."""
    refusals = (redis_errors.AuthenticationError, redis_errors.NoPermissionError, ssl.SSLCertVerificationError)
    return isinstance(error, refusals) or isinstance(error.__cause__ or error.__context__, refusals)


def error_of(reply: str) -> Exception:
    """Return what a server said against a command as redis-py's exception."""
    code, _, rest = reply.partition(" ")
    kind = redis_errors.NoPermissionError if reply.startswith(_DENIED_IN_SCRIPT) else _ERRORS.get(code)
    return redis_errors.ResponseError(reply) if kind is None else kind(rest)
