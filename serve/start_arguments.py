"""The arguments of ``serve.start``: validated, with their defaults, and checked against this machine. Needs no Ray."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from ..broker.defaults import ADMIN_TOKEN, default_instance, default_url
from ..broker.errors import ConfigError
from ..broker.transport.dial import user_of
from ..broker.transport.url import REDIS_URL, shown_url
from ..broker.wire.keys import Keys
from ..handles.json_bounds import MAX_ITEMS_VARIABLE
from ..proxy.http1.listening import PortInUse, bind
from ..runtime.logs import FORMAT_VARIABLE, LEVEL_VARIABLE, LogOptions
from .config import HTTPOptions
from .settings import dump_http
from .validation import check_memory

_ADOPTED = (LEVEL_VARIABLE, FORMAT_VARIABLE, MAX_ITEMS_VARIABLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartArguments:
    """Valid arguments of ``serve.start``; see there."""

    redis_url: str | None
    """None for the embedded server."""
    instance: str
    detached: bool
    http: HTTPOptions
    plain_http: dict[str, Any]
    """The fields of ``http`` without its middlewares."""
    middlewares: bytes
    """The middlewares of ``http``, pickled."""
    data_dir: str | os.PathLike[str] | None
    max_memory_bytes: int | None
    replica_redis_url: str | None
    proxy_redis_url: str | None
    environment: dict[str, str]
    """The variables that replicas, proxies and the controller adopt."""

    @classmethod
    def checked(
        cls,
        *,
        redis_url: object,
        instance: str | None,
        detached: bool,
        http_options: HTTPOptions | Mapping[str, Any] | None,
        data_dir: str | os.PathLike[str] | None,
        max_memory_bytes: int | None,
        replica_redis_url: str | None,
        proxy_redis_url: str | None,
    ) -> StartArguments:
        """Return the arguments with their defaults. Raises TypeError and `ConfigError`."""
        if not isinstance(cast(object, detached), bool):
            raise TypeError(f"detached must be a bool, not {type(detached).__name__}")
        name = instance_name(instance)
        http = _with_token(HTTPOptions.parse(http_options, "http_options"))
        url = broker_url(redis_url)
        _check_broker(url, detached, data_dir)
        memory_bytes = check_memory(url, max_memory_bytes)
        _check_other_url(url, "replica_redis_url", replica_redis_url)
        _check_other_url(url, "proxy_redis_url", proxy_redis_url)
        plain_http, middlewares = dump_http(http)
        return cls(
            redis_url=url,
            instance=name,
            detached=detached,
            http=http,
            plain_http=plain_http,
            middlewares=middlewares,
            data_dir=data_dir,
            max_memory_bytes=memory_bytes,
            replica_redis_url=replica_redis_url,
            proxy_redis_url=proxy_redis_url,
            environment=_adopted_environment(),
        )

    @property
    def proxy_options(self) -> dict[str, Any]:
        """The options of a proxy: the fields of ``http``."""
        return {**self.plain_http, "middlewares": list(self.http.middlewares)}

    def check_http_address(self) -> None:
        """Check that a proxy on this machine can listen. A proxy checks it again, for its own machine.

        Raises:
            ConfigError: the port is in use, or the host is not an address of this machine.
        """
        if self.http.location == "NoServer":
            return
        try:
            for sock in bind(self.http.host, self.http.port, shared=False):
                sock.close()
            if self.http.admin_port is not None:
                for sock in bind(self.http.admin_host, self.http.admin_port, shared=False):
                    sock.close()
        except PortInUse as e:
            raise ConfigError(str(e)) from None


def _with_token(http: HTTPOptions) -> HTTPOptions:
    """Return options with the admin token of the environment, where they need one."""
    token = os.environ.get(ADMIN_TOKEN)
    if not token or http.admin_port is None or http.admin_token is not None:
        return http
    try:
        return http.merged({"admin_token": token}, "http_options")
    except ConfigError as e:
        raise ConfigError(f"{e} (it is that of {ADMIN_TOKEN})") from None


def instance_name(given: str | None) -> str:
    """Return the name of an instance, by default that of the environment. Raises TypeError and `ConfigError`."""
    name = default_instance() if given is None else given
    Keys(name)
    return name


def broker_url(given: object) -> str | None:
    """Return the broker's URL, by default that of the environment; None if there is neither."""
    if not isinstance(given, str | None):
        raise TypeError(f"redis_url must be a str, not {type(given).__name__}")
    return given or default_url()


def _adopted_environment() -> dict[str, str]:
    try:
        LogOptions.from_environment()
    except ValueError as e:
        raise ConfigError(str(e)) from None
    return {name: value for name in _ADOPTED if (value := os.environ.get(name))}


def _check_broker(url: str | None, detached: bool, data_dir: object) -> None:
    if not isinstance(data_dir, str | os.PathLike | None):
        raise TypeError(f"data_dir must be a str or a Path, not {type(data_dir).__name__}")
    if url is not None and data_dir is not None:
        raise ConfigError(
            f"data_dir is for the embedded server, and redis_url is {shown_url(url)}: leave out one of them"
        )
    if url is None and detached:
        raise ConfigError(
            "a detached instance outlives this process, and an embedded server does not: give the redis_url of a "
            f"server that runs by itself, or set {REDIS_URL}"
        )


def _check_other_url(redis_url: str | None, name: str, given: object) -> None:
    if not isinstance(given, str | None):
        raise TypeError(f"{name} must be a str, not {type(given).__name__}")
    if given is None:
        return
    if redis_url is None:
        raise ConfigError(
            f"{name} is another URL of the broker at redis_url; without redis_url the broker is an embedded server"
        )
    user_of(given)
