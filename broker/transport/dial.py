"""Connecting to a server with redis-py (URL, TLS, AUTH, client name), and the mapping of its errors to ours."""

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
"""How long connecting, and each command of the handshake, may take."""

_ERRORS: dict[str, type[BrokerRefused]] = {"NOPERM": NotPermitted, "OOM": BrokerFull}
_DENIED_IN_SCRIPT = ("ERR The user executing the script can't", "ERR ACL failure in script")
"""Errors in place of ``NOPERM`` for a command inside a script: up to Redis 7.0, and of later versions."""
_TOO_LONG = "ERR Protocol error: invalid bulk length"


def user_of(url: str) -> str:
    """Return the Redis user in ``url``, or "". Raises `ConfigError` if it is not a Redis URL."""
    return str(redis_options(url, parse_url).get("username") or "")


def new_connection(url: str, name: str) -> AbstractConnection:
    """Return an unconnected redis-py connection to ``url``. Raises `ConfigError` for a wrong URL or option."""
    options = redis_options(url, parse_url)
    kind: type[AbstractConnection] = options.pop("connection_class", _TcpConnection)
    # RESP2: plain lists, the same from every server; RESP3 measured no faster. No socket timeout, as each send would
    # go through `wait_for`: `RedisConnection` detects silent servers. No retries: it has its own.
    retry = Retry(NoBackoff(), 0)
    options.update(protocol=2, client_name=name, socket_timeout=None, socket_connect_timeout=CONNECT_S, retry=retry)
    try:
        return kind(**options)
    except (TypeError, ValueError, redis_errors.RedisError) as e:
        raise ConfigError(f"the options of {shown_url(url)!r} are not Redis's: {e}") from None


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


class ErrorReply(Exception):
    """An error reply as it was received. `error_of` converts it to the error that callers see."""

    @property
    def message(self) -> str:
        return str(self.args[0])

    @property
    def code(self) -> str:
        return self.message.partition(" ")[0]

    @property
    def lacks_script(self) -> bool:
        return self.message.startswith("NOSCRIPT ")


def error_of(message: str, command: Sequence[bytes], url: str) -> BrokerRefused:
    """Return the error for an error reply ``message`` to ``command``, of the broker at ``url``."""
    code, _, rest = message.partition(" ")
    kind = _ERRORS.get(code)
    if message.startswith(_DENIED_IN_SCRIPT):
        kind = NotPermitted
    elif message == _TOO_LONG:
        kind = StringTooLong
    shown_message = message if kind is None else rest
    return (kind or BrokerRefused)(shown_message, _describe(command), shown_url(url), user_of(url))


def _describe(command: Sequence[bytes]) -> str:
    """Return a command's name and its keys, without the secrets that they contain."""
    name = command[0].decode("ascii", "replace")
    if name in ("EVAL", "EVALSHA"):
        keys = command[3 : 3 + int(command[2])]
    else:
        keys = [arg for arg in command[1:] if arg.startswith(PREFIX.encode())][:1]
    return " ".join([name, *(shown_key(key.decode("utf-8", "replace")) for key in keys)])
