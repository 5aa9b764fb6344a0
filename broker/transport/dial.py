"""Connecting to a server with redis-py: URL, TLS, AUTH, client name, and the classes of its errors."""

from __future__ import annotations

import ssl
from collections.abc import Sequence

from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection, Connection as _TcpConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from ..errors import RULES, BrokerFull, BrokerRefused, ConfigError, NotPermitted, StringTooLong
from ..wire.keys import PREFIX, shown_key
from .url import redis_options, shown_url

CONNECT_S = 5.0

_ERRORS: dict[str, type[BrokerRefused]] = {"NOPERM": NotPermitted, "OOM": BrokerFull}
_DENIED_IN_SCRIPT = ("ERR The user executing the script can't", "ERR ACL failure in script")
"""What servers say instead of ``NOPERM`` where a script meets what its user may not: up to Redis 7.0, and since."""
_TOO_LONG = "ERR Protocol error: invalid bulk length"


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
    """Whether the server will not have us, or we not it."""
    return _is(error, redis_errors.AuthenticationError, redis_errors.NoPermissionError, ssl.SSLCertVerificationError)


def _is(error: BaseException, *kinds: type[BaseException]) -> bool:
    """Look into what redis-py wraps it in, if it goes wrong while that connects."""
    return isinstance(error, kinds) or isinstance(error.__cause__ or error.__context__, kinds)


def reason_of(error: BaseException) -> str:
    """Return why there is no connection, and what to do where that can be said."""
    reason = str(error) or type(error).__name__
    return f"{reason} ({RULES})" if _is(error, redis_errors.NoPermissionError) else reason


class ErrorReply(Exception):
    """What a server says against a command, as it says it. `error_of` makes of it what others see."""

    @property
    def said(self) -> str:
        return str(self.args[0])

    @property
    def code(self) -> str:
        return self.said.partition(" ")[0]

    @property
    def lacks_script(self) -> bool:
        return self.said.startswith("NOSCRIPT ")


def error_of(said: str, command: Sequence[bytes], url: str) -> BrokerRefused:
    """Return what a server said against a command as one of our errors."""
    code, _, rest = said.partition(" ")
    kind = _ERRORS.get(code)
    if said.startswith(_DENIED_IN_SCRIPT):
        kind = NotPermitted
    elif said == _TOO_LONG:
        kind = StringTooLong
    told = (said if kind is None else rest, _described(command), shown_url(url), user_of(url))
    return (kind or BrokerRefused)(*told)


def _described(command: Sequence[bytes]) -> str:
    """Return a command's name and its keys, without what is secret in them."""
    name = command[0].decode("ascii", "replace")
    if name in ("EVAL", "EVALSHA"):
        keys = command[3 : 3 + int(command[2])]
    else:
        keys = [arg for arg in command[1:] if arg.startswith(PREFIX.encode())][:1]
    return " ".join([name, *(shown_key(key.decode("utf-8", "replace")) for key in keys)])
