"""Settings of an instance that its controller reads from the registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, cast

from ray import cloudpickle
from starlette.middleware import Middleware

from ..broker.registry.store import Registry
from .config import HTTPOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One instance's."""

    owner: str
    """Who holds its lease: a token that its controller has, also after a restart."""
    node: str
    """The Ray node that called ``start``."""
    http: dict[str, Any] = field(default_factory=dict[str, Any])
    """All of `HTTPOptions` but its middlewares. Its ``port`` is 0 only until the first proxy has found one."""
    middlewares: str = ""
    """The digest of these, pickled, among the registry's code; empty if there are none."""
    detached: bool = False
    stopping: str = ""
    """``"erase"`` or ``"keep"`` (its keys) when the instance is to end."""
    stopped: bool = False
    """Nothing of it runs any more, and what it left in Redis can be resumed."""

    @classmethod
    async def read(cls, registry: Registry) -> Settings | None:
        raw = await registry.get_settings()
        return None if raw is None else cls(**_known(raw))

    async def write(self, registry: Registry) -> None:
        await registry.put_settings(asdict(self))

    async def http_options(self, registry: Registry) -> HTTPOptions:
        middlewares: list[Middleware] = []
        if self.middlewares:
            middlewares = cast(Any, cloudpickle).loads(await registry.get_code(self.middlewares))
        return HTTPOptions(**self.http, middlewares=middlewares)


def dump_http(options: HTTPOptions) -> tuple[dict[str, Any], bytes]:
    """Return ``options`` in two parts: what JSON can hold, and the pickled middlewares, empty if there are none.

    Raises:
        TypeError: a middleware cannot be pickled.
    """
    plain = options.model_dump(exclude={"middlewares"})
    if not options.middlewares:
        return plain, b""
    try:
        return plain, cast(bytes, cast(Any, cloudpickle).dumps(options.middlewares))
    except Exception as e:  # pickling runs whatever code the objects bring
        raise TypeError(f"HTTPOptions.middlewares must be picklable, as they run in the proxies: {e}") from e


def _known(raw: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(Settings)}
    return {name: value for name, value in raw.items() if name in names}
