"""Redis URLs: validation, and a form without credentials for logs and messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from ..errors import ConfigError
from .sentinels.url import SentinelService, is_sentinel_url, parse_sentinel_url

REDIS_URL = "PENSTOCK_REDIS_URL"
"""The environment variable with the broker's URL, for calls without ``redis_url``."""

MAX_MEMORY = "PENSTOCK_MAX_MEMORY_BYTES"
"""The environment variable with the embedded server's memory limit, for calls without ``max_memory_bytes``."""

_SCHEMES = ("redis", "rediss", "unix")
_ACCEPTED = frozenset(
    ("connection_class", "db", "host", "password", "path", "port", "socket_keepalive", "username"),
)
# Options that other clients of the same URL may need. Penstock's connections set their own values.
_IGNORED = frozenset(
    (
        "client_name",
        "decode_responses",
        "encoding",
        "encoding_errors",
        "health_check_interval",
        "legacy_responses",
        "max_connections",
        "protocol",
        "retry_on_timeout",
        "socket_connect_timeout",
        "socket_read_size",
        "socket_timeout",
        "timeout",
    )
)


def shown_url(url: str) -> str:
    """Return ``url`` for messages and logs: without its user, password and options."""
    scheme, separator, rest = url.partition("://")
    if not separator:  # not a URL, but it may contain a password
        scheme, rest = "", url
    # Up to the last "@": a password that was not percent-encoded may contain "/", "?" and "#".
    return f"{scheme}{separator}{rest.rpartition('@')[2].partition('?')[0]}"


def sentinel_service(url: str) -> SentinelService | None:
    """Return the service that ``url`` names; None if it is the URL of a server. Raises `ConfigError`."""
    return parse_sentinel_url(url, shown_url(url)) if is_sentinel_url(url) else None


def redis_options(url: object, parse: Callable[[str], Mapping[str, Any]]) -> dict[str, Any]:
    """Return the arguments of redis-py's connections for ``url``.

    If sentinels name the server, its ``host`` and ``port`` are not meant: a `PrimaryFinder` finds them.

    ``parse`` is redis-py's ``parse_url``, the one for asyncio or the other.

    Raises:
        TypeError: ``url`` is not a ``str``.
        ConfigError: it is not a Redis URL, or has an unknown option.
    """
    if not isinstance(url, str):
        raise TypeError(f"a Redis URL must be a str, not {type(url).__name__}")
    shown = shown_url(url)
    if (service := sentinel_service(url)) is not None:
        url = service.server_url
    try:
        parts = urlsplit(url)
        if parts.scheme not in _SCHEMES:
            raise ConfigError(
                f"{shown!r} is not a Redis URL: it must begin with redis://, rediss://, unix://, redis+sentinel:// or "
                "rediss+sentinel://"
            )
        options = dict(parse(url))
    except ConfigError:
        raise
    except ValueError:
        # Its message would quote the invalid port, which may be a part of the password.
        raise ConfigError(
            f"{shown!r} is not a Redis URL: its port or an option cannot be read "
            "(in a password, '/', '?', '#', '@' and ':' must be percent-encoded)"
        ) from None
    if parts.scheme == "unix":
        if not options.get("path"):
            raise ConfigError(f"{shown!r} is not a Redis URL: it has no path, as in unix:///run/redis.sock")
    elif (database := parts.path.strip("/").rpartition("@")[2]) and "db" not in options:
        raise ConfigError(f"{shown!r} is not a Redis URL: the database {database!r} must be a number")
    for name in list(options):
        if name in _IGNORED:
            del options[name]
        elif name not in _ACCEPTED and not (name.startswith("ssl_") and parts.scheme == "rediss"):
            raise ConfigError(f"{shown!r} has the option {name!r}, which is unknown for {parts.scheme}://")
    return options
