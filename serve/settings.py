"""The settings of an instance: stored in the registry by ``serve.start`` and read by the controller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from ..broker.registry.store import Registry
from ..workers.pickling import dumps, loads

if TYPE_CHECKING:  # The controller needs no pydantic.
    from .config import HTTPOptions

LEASE_S = 5.0
"""Expiry of the instance's ownership, which the controller renews. Ray restarts a controller in less time."""


class ProcessArguments(NamedTuple):
    """What the controller needs before it can read the registry, and passes on to replicas and proxies."""

    instance: str
    """The name of the instance."""
    redis_url: str
    """The broker's URL for the controller."""
    replica_redis_url: str
    """The broker's URL for replicas, such as with a Redis user of their own."""
    proxy_redis_url: str
    """The broker's URL for proxies."""
    environment: Mapping[str, str]
    """The variables that all of them adopt from the process that called ``start``."""

    def for_proxy(self, name: str, http: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the arguments of the actor of a proxy, whose options are ``http``."""
        return self.proxy_redis_url, self.instance, name, http, self.environment


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one instance."""

    owner: str
    """The token with which the controller renews its ownership, also after a restart."""
    node: str
    """The Ray node that called ``start``."""
    address: str = ""
    """The address of that node."""
    http: dict[str, Any] = field(default_factory=dict[str, Any])
    """The fields of `HTTPOptions` without its middlewares. ``port`` is 0 only until the first proxy has picked one."""
    middlewares: str = ""
    """The digest of the pickled middlewares in the registry; empty if there are none."""
    detached: bool = False
    stopping: str = ""
    """``"erase"`` or ``"keep"`` its keys: a request to the controller to end the instance; empty while it runs."""
    stopped: bool = False
    """Whether all processes have ended and the keys that are left can be resumed."""

    @classmethod
    async def read(cls, registry: Registry) -> Settings | None:
        """Return the settings, or None if there is no instance. Raises `BrokerUnavailable`."""
        raw = await registry.get_settings()
        return None if raw is None else cls(**_known(raw))

    async def write(self, registry: Registry) -> None:
        await registry.put_settings(asdict(self))

    async def proxy_options(self, registry: Registry) -> dict[str, Any]:
        """Return the options of proxies: the fields of `HTTPOptions`. Fields newer than the instance are missing."""
        middlewares: Any = loads(await registry.get_code(self.middlewares)) if self.middlewares else []
        return {**self.http, "middlewares": middlewares}


def dump_http(options: HTTPOptions) -> tuple[dict[str, Any], bytes]:
    """Return ``options`` in two parts: the fields that JSON can represent, and the pickled middlewares, or ``b""``.

    Raises:
        TypeError: a middleware cannot be pickled.
    """
    plain = options.model_dump(exclude={"middlewares"})
    if not options.middlewares:
        return plain, b""
    try:
        return plain, dumps(options.middlewares)
    except Exception as e:  # Pickling runs code of the objects.
        raise TypeError(f"HTTPOptions.middlewares must be picklable, because they run in the proxies: {e}") from e


def _known(raw: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(Settings)}
    return {name: value for name, value in raw.items() if name in names}
