"""URLs of a service that sentinels watch: ``redis+sentinel://[user:password@]host[:port][,host[:port]…]/service``.

The user and the password are those of the primary. Options: ``db``; ``sentinel_username`` and ``sentinel_password``,
for the sentinels; any option that the URL of a single server may have. With ``rediss+sentinel://``, primary and
sentinels are reached by TLS, with the same ``ssl_`` options.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote, urlencode

from ...errors import ConfigError

SCHEMES = ("redis+sentinel", "rediss+sentinel")

_DEFAULT_PORT = 26379
_FORM = "redis+sentinel://host:26379,host:26379/service"


@dataclass(frozen=True, slots=True)
class SentinelService:
    """A service, and how to reach the sentinels that know its primary."""

    name: str
    sentinel_urls: tuple[str, ...]
    """A URL for each sentinel, with its credentials."""
    server_url: str
    """The URL of the primary, but for its host and port, which are those of a sentinel."""


def is_sentinel_url(url: str) -> bool:
    return url.partition("://")[0] in SCHEMES


def parse_sentinel_url(url: str, shown: str) -> SentinelService:
    """Return the service of ``url``; ``shown`` is the URL for messages.

    Raises:
        ConfigError: the URL is malformed. The message has no credentials.
    """
    scheme, _, rest = url.partition("://")
    authority, _, path = rest.partition("/")
    credentials, at, hosts = authority.rpartition("@")
    name, _, query = path.partition("?")
    if not name or "/" in name:
        raise ConfigError(f"{shown!r} must name one service of the sentinels, as in {_FORM}")
    addresses = [_address(host, shown) for host in hosts.split(",")]
    options = parse_qsl(query, keep_blank_values=True)
    own = {key: value for key, value in options if key in ("db", "sentinel_username", "sentinel_password")}
    db = own.get("db", "0")
    if not (db.isascii() and db.isdecimal()):
        raise ConfigError(f"{shown!r}: the database {db!r} must be a number")
    plain = scheme.removesuffix("+sentinel")
    others = [(key, value) for key, value in options if key not in own]
    tls = urlencode([(key, value) for key, value in others if key.startswith("ssl_")])
    user, password = (quote(own.get(f"sentinel_{part}", ""), safe="") for part in ("username", "password"))
    login = f"{user}:{password}@" if user or password else ""
    return SentinelService(
        unquote(name),
        tuple(f"{plain}://{login}{address}?{tls}" for address in addresses),
        f"{plain}://{credentials}{at}{addresses[0]}/{db}?{urlencode(others)}",
    )


def _address(text: str, shown: str) -> str:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):  # no port; the colons, if any, are those of an IPv6 address
        host, port = text, str(_DEFAULT_PORT)
    is_host = bool(host) and (":" not in host or (host.startswith("[") and host.endswith("]")))
    if not is_host or not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"{shown!r} must have host:port of each sentinel, separated by commas, as in {_FORM}")
    return f"{host}:{port}"
